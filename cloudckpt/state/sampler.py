"""Deal the samples of a data epoch to the ranks so that training can stop anywhere and go on with any number of ranks.

    order[consumed:] ──▶ dealt like cards: rank r of n takes every n-th, from the r-th on

After k samples on each rank exactly the first k × n of what was dealt are consumed, whatever the batch size is, so one
number says where all ranks stand. It counts what the training loop was handed, not what worker processes have drawn
ahead. Knows samplers and loaders; knows no store. A sampler belongs to one thread, of the main process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Literal, TypeVar

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from cloudckpt.errors import OptionsError, StateMismatchError
from cloudckpt.options import as_count
from cloudckpt.ranks import Group
from cloudckpt.state.order import Order, mixed

__all__ = ["ResumableSampler"]

logger = logging.getLogger(__name__)

BatchT = TypeVar("BatchT")

_AT_ONCE = 4096


class ResumableSampler(Sampler[int]):
    """A sampler for a plain `DataLoader` whose position can be saved, and restored by any number of ranks.

    ```python
    sampler = ResumableSampler(dataset, seed=7)
    loader = DataLoader(dataset, batch_sampler=sampler.in_batches(32), num_workers=4)
    state = {"model": model, "optimizer": optimizer, "sampler": sampler}
    manager.restore(state)
    while sampler.data_epoch < data_epochs:
        for batch in sampler.batches(loader):
            train(batch)
            ...                                   # a save here counts this batch as done
    ```

    All ranks go in step: the same number of batches of the same size. The state is the same on all of them. A restored
    sampler goes on in the middle of its data epoch: what is left is dealt to the ranks that are there now, and over the
    data epoch no sample is lost or seen twice (`DataLoader(batch_size=32, sampler=sampler)` is fine, too: see `tail`).

    What a data set draws at random in a worker process does not go on where it stood, because workers start anew;
    let such draws depend on the index.
    """

    def __init__(
        self,
        data_source: Sized | int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        tail: Literal["even", "drop", "pad", "uneven"] = "even",
    ) -> None:
        """Stand at the start of data epoch 0.

        Args:
            data_source: the data set, or its length.
            shuffle: a new order for each data epoch; else the order of the data set.
            seed: of the orders; the same on all ranks.
            num_replicas: how many ranks share the samples; by default those of the process group, else one.
            rank: which of them this is.
            tail: what happens at the end of a data epoch when the samples left are no multiple of the ranks.
                `even`: every sample is dealt, so that some ranks' last batch has one sample more; only when fewer
                samples than ranks are left for the last batch, `batches` leaves them out, because some ranks would
                have no batch to go in step with (`in_batches` keeps these, too). `drop`: leave out the last samples,
                fewer than there are ranks, so that all batches are of one size. `pad`: fill up with samples from the
                beginning of the order, as `DistributedSampler` does; `padded` tells. `uneven`: every sample is dealt,
                and some ranks may have a batch more than others (for an evaluation without collectives).

        Raises:
            OptionsError: no such rank or tail, or an empty data set.
        """
        length = as_count("the length of the data set", _length_of(data_source))
        seed = as_count("seed", seed, least=None)
        self._rank, self._size = _place(rank, num_replicas)
        if length < 1 or tail not in ("even", "drop", "pad", "uneven"):
            raise OptionsError(
                f"{length} samples with tail {tail!r}; give 1 or more, and 'even', 'drop', 'pad' or 'uneven'"
            )
        self._order = Order(length, seed=seed, is_shuffled=shuffle)
        self._tail = tail
        self._data_epoch = 0
        self._consumed = 0
        self._iteration = 0
        self._jumps = 0
        self._is_handing_out = False
        self._is_drawn, self._is_counted = False, False  # since somebody began to iterate
        self._is_told = False

    # -- where it stands ---------------------------------------------------------------------------------------

    @property
    def data_epoch(self) -> int:
        """Which pass over the data this is, counted from 0."""
        return self._data_epoch

    @property
    def consumed(self) -> int:
        """Samples of this data epoch that all ranks together were handed."""
        return self._consumed

    @property
    def padded(self) -> int:
        """How many samples at the end of this rank's share of the data epoch are padding: 0 or 1."""
        return int(self._tail == "pad" and 0 < self._left % self._size <= self._rank)

    @property
    def _left(self) -> int:
        """Samples of this data epoch that no rank was handed."""
        return self._order.length - self._consumed

    def __len__(self) -> int:
        """Return how many samples of this data epoch are left for this rank."""
        return self._share_of(self._rank)

    def _share_of(self, rank: int) -> int:
        if self._tail == "drop":
            return self._left // self._size
        return -(-(self._left if self._tail == "pad" else max(0, self._left - rank)) // self._size)

    def set_data_epoch(self, data_epoch: int) -> None:
        """Go to the start of a data epoch; stay where it is, if that data epoch is under way.

        Raises:
            OptionsError: it is no whole number, or negative.
        """
        data_epoch = as_count("the data epoch", data_epoch)
        if data_epoch != self._data_epoch:
            self._jump(data_epoch, 0)

    def set_epoch(self, epoch: int) -> None:
        """Do as `set_data_epoch`; the name under which trainers know it."""
        self.set_data_epoch(epoch)

    def _jump(self, data_epoch: int, consumed: int) -> None:
        self._data_epoch, self._consumed = data_epoch, consumed
        self._jumps += 1
        self._is_counted = True

    # -- samples -----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[int]:
        """Return this rank's samples from where training stands to the end of the data epoch; moves nothing.

        A loader's workers draw ahead, so what is drawn says nothing of what training was handed: `batches` counts that,
        or `advance`. A loop over the loader that does neither is told so, once, in the log.
        """
        self._tell_uncounted("began again where it stood before, so that the same samples come in the same order")
        self._is_drawn, self._is_counted = False, False
        self._iteration += 1
        return self._numbers(self._share(), self._iteration)

    def _numbers(self, share: torch.Tensor, iteration: int) -> Iterator[int]:
        for start in range(0, len(share), _AT_ONCE):
            for number in share[start : start + _AT_ONCE].tolist():
                if iteration != self._iteration:
                    raise OptionsError(
                        "the sampler is iterated by two at once, who would get the same samples; use one loader at a "
                        "time, each with a sampler of its own"
                    )
                self._is_drawn = True
                yield number

    def _tell_uncounted(self, what: str) -> None:
        """Tell who draws samples and counts none what that leads to."""
        is_uncounted = self._is_drawn and not self._is_counted and not self._is_handing_out
        if is_uncounted and not self._is_told:
            self._is_told = True
            logger.warning(
                "a ResumableSampler was iterated, nothing was counted, and it %s; loop over sampler.batches(loader), "
                "or call sampler.advance(samples) for each batch and set_data_epoch for each data epoch",
                what,
            )

    def _share(self) -> torch.Tensor:
        start = self._consumed + self._rank
        places = torch.arange(start, start + len(self) * self._size, self._size, device="cpu") % self._order.length
        return self._order.samples(self._data_epoch, places)

    # -- the training loop -------------------------------------------------------------------------------------

    def batches(self, loader: Iterable[BatchT]) -> Iterator[BatchT]:
        """Yield the batches that are left of this data epoch, and count each one as it is handed out.

        When the loop has taken all of them, the next data epoch begins. A loop that is left early does not lose
        count: the next call goes on after the last batch that was handed out. torch's own generator is not drawn from.

        Args:
            loader: a `DataLoader` with this sampler.

        Raises:
            OptionsError: not so; it has a batch sampler of its own kind (see `advance`), or returns batches out of
                order; or another loop over this sampler is under way.
        """
        batch_size, drop_last, has_merged = self._batching(loader)
        return self._hand_out(loader, batch_size, drop_last=drop_last, has_merged=has_merged)

    def _batching(self, loader: object) -> tuple[int, bool, bool]:
        if not isinstance(loader, DataLoader):
            raise OptionsError(f"batches wants a DataLoader with this sampler, not a {type(loader).__name__}")
        if loader.num_workers and not loader.in_order:
            raise OptionsError("the loader has in_order=False, so that no position says what was trained on; drop it")
        of_batches: object = loader.batch_sampler
        drawn_from = loader.sampler if of_batches is None else getattr(of_batches, "sampler", None)
        if drawn_from is not self:
            raise OptionsError("the loader draws from another sampler; make it with sampler=this one")
        if of_batches is None:
            return 1, False, False
        if isinstance(of_batches, _Batches):
            return of_batches.batch_size, of_batches.drop_last, of_batches.may_merge
        if type(of_batches) is BatchSampler:
            return as_count("batch_size", of_batches.batch_size, least=1), of_batches.drop_last, False
        raise OptionsError(
            f"a {type(of_batches).__name__} makes batches of sizes that are not known here; iterate the loader itself, "
            "and call advance(samples) for each batch"
        )

    def _hand_out(
        self, loader: Iterable[BatchT], batch_size: int, *, drop_last: bool, has_merged: bool
    ) -> Generator[BatchT]:
        if self._is_handing_out:
            raise OptionsError("another loop over this sampler is under way; end that one first")
        self._is_handing_out = True
        try:
            steps = self.steps_left(batch_size, drop_last=drop_last)
            self._log_left_out(batch_size, steps, drop_last=drop_last, has_merged=has_merged)
            jumps, handed = self._jumps, 0
            for batch in islice(self._opened(loader), steps) if steps else ():
                handed += 1
                self._move(batch_size + (has_merged and handed == steps))
                yield batch
                if jumps != self._jumps:
                    raise OptionsError("the sampler was moved in a loop over its batches; leave the loop first")
        finally:
            self._is_handing_out = False
        if handed != steps:
            raise OptionsError(f"the loader ended after {handed} of {steps} batches; does it keep all of its samples?")
        self._jump(self._data_epoch + 1, 0)

    def _log_left_out(self, batch_size: int, steps: int, *, drop_last: bool, has_merged: bool) -> None:
        left_out = self._left if has_merged and not steps else self._left % (batch_size * self._size)
        if self._tail == "even" and not drop_last and 0 < left_out < self._size and not (has_merged and steps):
            logger.warning(
                "data epoch %d ends with %d samples for %d ranks, which are left out: not every rank would have a "
                "batch (see `in_batches`)",
                self._data_epoch,
                left_out,
                self._size,
            )

    def _opened(self, loader: Iterable[BatchT]) -> Iterator[BatchT]:
        """Return an iterator, made with a seed of its own for the workers."""
        # A loader draws it from torch's generator otherwise, once per iterator; a resumed run makes one more of these.
        with _seeded(mixed(self._order.seed, self._data_epoch, self._consumed, self._rank)):
            return iter(loader)

    def steps_left(self, batch_size: int, *, drop_last: bool = False) -> int:
        """Return how many batches `batches` hands to this rank up to the end of the data epoch.

        That is as many as every rank has, unless the tail is `uneven`.
        """
        batch_size = as_count("batch_size", batch_size, least=1)
        shares = [self._share_of(rank) for rank in (self._rank, self._size - 1)]
        own, fewest = (share // batch_size if drop_last else -(-share // batch_size) for share in shares)
        return fewest if self._tail == "even" else own

    def in_batches(self, batch_size: int, *, drop_last: bool = False) -> Sampler[list[int]]:
        """Return a batch sampler for `DataLoader(batch_sampler=)` that leaves out no sample at the end of a data epoch.

        Where fewer samples than ranks would be left for one more batch, and the tail is `even`, they are added to the
        last batch of as many ranks, one to each. So every sample is seen once, and all ranks have as many batches.
        """
        return _Batches(self, batch_size, drop_last=drop_last, may_merge=self._tail == "even" and not drop_last)

    def advance(self, samples: int) -> None:
        """Count a batch as done in a loop without `batches`; call `set_data_epoch` at the end of each data epoch.

        Args:
            samples: how many samples each rank had, the same number on every rank.

        Raises:
            OptionsError: no whole number, a negative one, more than are left, or inside of `batches`, which counts by
                itself.
        """
        if self._is_handing_out:
            raise OptionsError("batches counts by itself; call advance only in loops without it")
        samples, most = as_count("samples", samples), self._share_of(0)
        if not 0 <= samples <= most:
            raise OptionsError(f"{samples} samples are counted where {most} are left for each rank")
        self._move(samples)

    def _move(self, samples: int) -> None:
        """Count samples of every rank; the last batch may be smaller, and smaller on some ranks than on others."""
        dealt = self._left - self._left % self._size if self._tail == "drop" else self._left
        self._consumed += min(samples * self._size, dealt)
        self._is_counted = True

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """Return the position in the data epoch, and what it is a position in; the same on all ranks."""
        self._tell_uncounted("is saved at the position where the loop began")
        return {
            "data_epoch": self._data_epoch,
            "consumed": self._consumed,
            "length": self._order.length,
            "shuffle": self._order.is_shuffled,
            "seed": self._order.seed,
            "order": self._order.fingerprint(self._data_epoch) if self._consumed else "",
            "num_replicas": self._size,
        }

    def state_dict_misfits(self, state_dict: Mapping[str, object]) -> Sequence[str]:
        """Return why a position cannot be taken, in words."""
        data_epoch, consumed, length = (state_dict.get(key) for key in ("data_epoch", "consumed", "length"))
        if type(data_epoch) is not int or type(consumed) is not int or type(length) is not int or data_epoch < 0:
            return ["is no state of a ResumableSampler in the checkpoint"]
        order = self._order
        reasons = [
            f"has {key} {mine!r} here and {state_dict.get(key)!r} there"
            for key, mine in (("length", order.length), ("shuffle", order.is_shuffled), ("seed", order.seed))
            if state_dict.get(key) != mine
        ]
        if reasons:
            reasons[-1] += " (the position means nothing then: give the same, or leave the sampler out of the state)"
        elif not 0 <= consumed <= length:
            reasons.append(f"stands at {consumed} of {length} samples there")
        elif consumed and state_dict.get("order") != order.fingerprint(data_epoch):
            reasons.append(
                f"makes another order of data epoch {data_epoch} here than there (another torch?); go on with the one "
                f"that saved it, or leave the sampler out of the state and call set_data_epoch({data_epoch + 1})"
            )
        return reasons

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go to a saved position; what is left of the data epoch is dealt to the ranks that are here now.

        Raises:
            StateMismatchError: it is a position in another order of samples; nothing was changed.
        """
        reasons = self.state_dict_misfits(state_dict)
        if reasons:
            raise StateMismatchError(f"the sampler {'; '.join(reasons)}")
        self._jump(int(str(state_dict["data_epoch"])), int(str(state_dict["consumed"])))


class _Batches(Sampler[list[int]]):
    """Batches of a sampler's samples, of which the last one may have one sample more."""

    def __init__(self, sampler: ResumableSampler, batch_size: int, *, drop_last: bool, may_merge: bool) -> None:
        self.sampler = sampler
        self.batch_size = as_count("batch_size", batch_size, least=1)
        self.drop_last = drop_last
        self.may_merge = may_merge

    def __len__(self) -> int:
        return self.sampler.steps_left(self.batch_size, drop_last=self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        steps = len(self)
        numbers = iter(self.sampler)
        for step in range(steps):
            yield list(islice(numbers, self.batch_size + (self.may_merge and step + 1 == steps)))


def _length_of(data_source: object) -> object:
    """Return the length of a data set, or what was given in its place; a tensor without dimensions has none."""
    try:
        return len(data_source)  # type: ignore[arg-type]
    except TypeError:
        return data_source


def _place(rank: int | None, num_replicas: int | None) -> tuple[int, int]:
    """Return which of how many ranks this is."""
    if (rank is None) != (num_replicas is None):
        raise OptionsError("give both rank and num_replicas, or none of them")
    if rank is None or num_replicas is None:
        group = Group.of_world()
        alleged = os.environ.get("WORLD_SIZE", "1")
        if group.size == 1 and alleged != "1":
            raise OptionsError(
                f"WORLD_SIZE is {alleged} and there is no process group; call torch.distributed.init_process_group "
                "first, or give rank and num_replicas"
            )
        return group.rank, group.size
    rank, num_replicas = as_count("rank", rank), as_count("num_replicas", num_replicas)
    if not 0 <= rank < num_replicas:
        raise OptionsError(f"rank {rank} of {num_replicas}; ranks count from 0")
    return rank, num_replicas


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Give torch's CPU generator another seed for a moment."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
