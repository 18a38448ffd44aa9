"""Save state that each rank has for itself: names that say whose it is, and bytes that hold it.

    object ──state_dict──▶ codec's JSON and parts ──▶ uint8 tensor `cloudckpt.per_rank.<rank>-of-<ranks>.<name>`

Everything else in a state is one thing that all ranks share. What is each rank's own is a tensor of a name of its own,
which only that rank writes and reads; it stands nowhere in the nested state, so no path goes with it. Nothing here
touches a store.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import msgspec
import numpy as np
import torch

from cloudckpt.errors import ManifestError, OptionsError
from cloudckpt.format import Flat, codec
from cloudckpt.ranks import Group
from cloudckpt.state.backup import backup_of
from cloudckpt.state.collector import collector_awake
from cloudckpt.state.entry import Entry, Place
from cloudckpt.state.protocol import Stateful

__all__ = ["RNG", "PerRank", "PerRankEntry", "RankName", "is_stateful_loader", "pack", "unpack"]

RNG = "cloudckpt.rng"
"""What the generators of each rank are called."""
_RNG = re.compile(r"cloudckpt\.rng\.r(\d{5,10})")
_NAME = re.compile(r"cloudckpt\.per_rank\.(\d{5,10})-of-(\d{5,10})\.(.+)", re.DOTALL)
_PAD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class RankName:
    """A name in the state, the rank whose it is, and how many ranks there were."""

    name: str
    rank: int
    size: int

    @classmethod
    def here(cls, name: str) -> RankName:
        """Return the name of this rank's own."""
        group = Group.of_world()
        return cls(name, group.rank, group.size)

    @classmethod
    def parse(cls, text: str) -> RankName | None:
        """Return what a tensor's name says, None if it says nothing of a rank."""
        found = _NAME.fullmatch(text)
        return None if found is None else cls(found[3], int(found[1]), int(found[2]))

    @staticmethod
    def rank_of_generators(text: str) -> int | None:
        """Return whose generators a tensor holds, None if it holds none."""
        found = _RNG.fullmatch(text)
        return None if found is None else int(found[1])

    def __str__(self) -> str:
        if self.name == RNG:
            return f"{RNG}.r{self.rank:05d}"
        return f"cloudckpt.per_rank.{self.rank:05d}-of-{self.size:05d}.{self.name}"


def pack(value: object, *, key: str) -> torch.Tensor:
    """Return a value as bytes, uint8 of one dimension, padded so that small changes leave their number as it is.

    Its JSON comes first; where it has parts, a NUL ends that, and they follow, copied once.

    Raises:
        UnsupportedValueError: the codec cannot hold it.
    """
    parts = codec.Parts(alone_bytes=None)
    text = msgspec.json.encode(codec.encode(value, key=key, parts=parts))
    head_bytes = _padded(len(text) + 1) if parts.together_bytes else len(text)
    packed = torch.full((_padded(head_bytes + parts.together_bytes),), ord(" "), dtype=torch.uint8, device="cpu")
    target = packed.numpy()
    target[: len(text)] = np.frombuffer(text, np.uint8)
    if parts.together_bytes:
        target[head_bytes - 1] = 0
        parts.write(target[head_bytes:])
    return packed


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _PAD_BYTES) * _PAD_BYTES


def unpack(packed: torch.Tensor, *, key: str) -> object:
    """Return the value that `pack` was given; it shares no memory with the bytes.

    Raises:
        ManifestError: the bytes are nothing that `pack` makes.
    """
    data = packed.numpy().data
    nul = re.search(b"\0", data)
    head_bytes = nul.end() if nul else len(data)
    try:
        value = msgspec.json.decode(data[: nul.start() if nul else head_bytes])
    except (msgspec.DecodeError, RecursionError) as exc:
        raise ManifestError(f"the saved state of {key!r} is no JSON: {exc}", key=key) from exc
    return codec.decode(value, key=key, parts={0: packed[head_bytes:]})


class PerRank:
    """An object of the state whose state is each rank's own, such as a loader that reads a part of the data.

    ```python
    state = {"model": model, "stream": PerRank(stream)}
    ```

    As many ranks as saved it can restore it, each its own. A `StatefulDataLoader` of torchdata needs no `PerRank`.

    Attributes:
        inner: the object.
    """

    def __init__(self, inner: Stateful) -> None:
        """Mark `inner`, which has `state_dict` and `load_state_dict`.

        Raises:
            OptionsError: it has not, or its state is shared by all ranks by its nature.
        """
        if not isinstance(inner, Stateful) or isinstance(inner, type | torch.nn.Module | torch.optim.Optimizer):
            raise OptionsError(
                f"PerRank is for an object with state_dict and load_state_dict that is no module and no optimizer, "
                f"not for a {type(inner).__name__}"
            )
        self.inner = inner

    def state_dict(self) -> dict[str, object]:
        """Return the object's state."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Give the object its state back."""
        self.inner.load_state_dict(state_dict)


class PerRankEntry(Entry):
    """An object whose state is one tensor of bytes, of a name that only this rank has."""

    other_world = (
        "restore with as many ranks, or use a DataLoader with cloudckpt.ResumableSampler, which fits any number"
    )

    def __init__(self, place: Place, stateful: Stateful) -> None:
        super().__init__(place)
        self._stateful = stateful
        # A loader is not asked: it could not take its old state back, whose workers may be at work.
        self.is_asked = not is_stateful_loader(stateful)

    def backup(self) -> Callable[[], None] | None:
        return None if is_stateful_loader(self._stateful) else backup_of(self._stateful)

    def current(self) -> object:
        with collector_awake():
            state = self._stateful.state_dict()
        return pack(state, key=self.name)

    def flat(self, nested: object) -> Flat:
        if isinstance(nested, torch.Tensor):
            return Flat({str(RankName.here(self.name)): nested})
        return super().flat(nested)

    def fillable(self) -> object:
        return {}  # asking a loader for its state may start its workers

    def holds_own(self, name: str) -> bool:
        return name == self.name

    def allocate_own(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        return torch.empty(shape, dtype=dtype, device="cpu") if dtype == torch.uint8 and len(shape) == 1 else None

    def load_own(self, own: Mapping[str, torch.Tensor]) -> None:
        self.load(unpack(own[self.name], key=self.name), None)

    def load(self, restored: object, live: object) -> None:
        # Not of `load_own`: from before it counted as each rank's own, and the same for all ranks.
        self._stateful.load_state_dict(cast("dict[str, object]", restored))
        if is_stateful_loader(self._stateful):
            _open_loader(self._stateful)


def is_stateful_loader(value: object) -> bool:
    """Tell whether a value is torchdata's `StatefulDataLoader`; without an import, since nobody may have it."""
    return any(
        kind.__name__ == "StatefulDataLoader" and kind.__module__.split(".")[0] == "torchdata"
        for kind in type(value).__mro__
    )


def _open_loader(loader: Stateful) -> None:
    """Have a restored loader make its iterator now."""
    # It draws a seed from torch's generator for it, which the saved run had done before the save: one draw too many for
    # an exact resume. Asking for the state makes the iterator, and the next loop over the loader uses that one.
    generator = torch.get_rng_state()
    loader.state_dict()
    torch.set_rng_state(generator)
