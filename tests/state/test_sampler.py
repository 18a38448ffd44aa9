"""A data epoch that is interrupted anywhere, and goes on with any number of ranks, shows each sample once, in order."""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

import cloudckpt
from cloudckpt import CheckpointManager, Options, OptionsError, StateMismatchError
from cloudckpt.state.sampler import ResumableSampler
from tests.effort import examples
from tests.ranks.processes import run

CALM = Options(progress_timeout_s=60)
Tail = Literal["even", "drop", "pad", "uneven"]


class Numbers(Dataset[int]):
    """Its own places."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> int:
        return place


def _samplers(length: int, size: int, **options: Any) -> list[ResumableSampler]:
    return [ResumableSampler(length, num_replicas=size, rank=rank, **options) for rank in range(size)]


def _loader(sampler: ResumableSampler, length: int, batch_size: int, **options: Any) -> DataLoader[int]:
    return DataLoader(Numbers(length), batch_size=batch_size, sampler=sampler, collate_fn=list, **options)


def _order(length: int, data_epoch: int = 0, **options: Any) -> list[int]:
    """Return the order of a data epoch, as one process sees it."""
    (sampler,) = _samplers(length, 1, **options)
    sampler.set_data_epoch(data_epoch)
    return list(sampler)


# -- the order ----------------------------------------------------------------------------------------------


def test_an_order_is_its_own_for_each_seed_and_data_epoch_and_not_drawn_from_the_program_s_generator() -> None:
    before = torch.get_rng_state()
    orders = [_order(50, data_epoch, seed=seed) for seed in (0, 1) for data_epoch in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(50))] * 4
    assert len({tuple(order) for order in orders}) == 4
    assert _order(50, 1, seed=1) == orders[3]
    assert torch.equal(torch.get_rng_state(), before)


def test_an_order_stays_what_it_was_in_releases_before() -> None:
    assert _order(10, 3, seed=7) == [6, 7, 5, 0, 9, 4, 3, 2, 1, 8]


def test_without_shuffling_the_order_is_that_of_the_data_set() -> None:
    assert [list(sampler) for sampler in _samplers(7, 2, shuffle=False)] == [[0, 2, 4, 6], [1, 3, 5]]


@given(st.integers(1, 60), st.integers(1, 6), st.booleans(), st.integers(0, 3))
def test_any_number_of_ranks_deals_the_same_order_by_turns(
    length: int, size: int, shuffle: bool, data_epoch: int
) -> None:
    samplers = _samplers(length, size, shuffle=shuffle, seed=5)
    for sampler in samplers:
        sampler.set_data_epoch(data_epoch)
    shares = [list(sampler) for sampler in samplers]
    assert [len(share) for share in shares] == [len(sampler) for sampler in samplers]
    order = _order(length, data_epoch, shuffle=shuffle, seed=5)
    assert [order[rank::size] for rank in range(size)] == shares


@given(st.integers(1, 60), st.integers(1, 6))
def test_tails_give_all_ranks_as_many_samples_each(length: int, size: int) -> None:
    dropped = [list(sampler) for sampler in _samplers(length, size, tail="drop")]
    padded = [list(sampler) for sampler in _samplers(length, size, tail="pad")]
    assert {len(share) for share in dropped} == {length // size}
    assert {len(share) for share in padded} == {-(-length // size)}
    order = _order(length)
    assert Counter(chain(*dropped)) == Counter(order[: length // size * size])
    assert Counter(chain(*padded)) == Counter(order) + Counter(order[place % length] for place in range(-length % size))


@given(st.integers(1, 60), st.integers(1, 6))
def test_a_padded_share_without_its_padding_holds_each_sample_once(length: int, size: int) -> None:
    samplers = _samplers(length, size, tail="pad")
    kept = [list(sampler)[: len(sampler) - sampler.padded] for sampler in samplers]
    assert sorted(chain(*kept)) == list(range(length))


# -- interruptions, in pure form ----------------------------------------------------------------------------


def _steps(samplers: Sequence[ResumableSampler], loops: Sequence[Iterator[list[int]]]) -> Iterator[list[list[int]]]:
    """Yield what all ranks are handed in each step; all of them end with the same step."""
    while True:
        found = [next(loop, None) for loop in loops]
        if found[0] is None:
            assert found == [None] * len(samplers)
            return
        states = [sampler.state_dict() for sampler in samplers]
        assert all(state == states[0] for state in states)
        yield [batch for batch in found if batch is not None]


def _dealt(step: Sequence[Sequence[int]]) -> list[int]:
    """Return the samples of one step in the order in which they were dealt."""
    longest = max(map(len, step))
    return [batch[place] for place in range(longest) for batch in step if place < len(batch)]


worlds = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=4)


@settings(max_examples=examples(60))
@given(st.integers(1, 80), worlds, st.booleans())
def test_interruptions_and_other_worlds_leave_the_order_as_it_is(
    length: int, runs: list[tuple[int, int, int]], shuffle: bool
) -> None:
    order = _order(length, shuffle=shuffle, seed=3)
    seen: list[int] = []
    state: dict[str, object] | None = None
    for size, batch_size, stop in [*runs, (1, 7, 1_000)]:  # the last one takes all that is left
        samplers = _samplers(length, size, shuffle=shuffle, seed=3)
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(dict(state))
        loops = [sampler.batches(_loader(sampler, length, batch_size)) for sampler in samplers]
        for number, step in enumerate(_steps(samplers, loops)):
            seen += _dealt(step)
            state = samplers[0].state_dict()
            assert state["consumed"] == len(seen)
            assert seen == order[: len(seen)]  # a prefix, after each step, in every world
            if number >= stop:
                break
    assert seen == order


def _merging(sampler: ResumableSampler, length: int, batch_size: int) -> DataLoader[int]:
    return DataLoader(Numbers(length), batch_sampler=sampler.in_batches(batch_size), collate_fn=list)


@settings(max_examples=examples(60))
@given(st.integers(1, 80), worlds)
def test_batches_of_the_sampler_s_own_lose_nothing_however_often_the_world_changes(
    length: int, runs: list[tuple[int, int, int]]
) -> None:
    order = _order(length)
    seen: list[int] = []
    state = _samplers(length, 1)[0].state_dict()
    for size, batch_size, stop in [*runs, (1, 7, 1_000)]:
        samplers = _samplers(length, size)
        for sampler in samplers:
            sampler.load_state_dict(dict(state))
        loaders = [_merging(sampler, length, batch_size) for sampler in samplers]
        expected = {len(loader) for loader in loaders}
        loops = [sampler.batches(loader) for sampler, loader in zip(samplers, loaders, strict=True)]
        steps = 0
        for steps, step in enumerate(_steps(samplers, loops), start=1):
            seen += _dealt(step)
            state = samplers[0].state_dict()
            assert seen == order[: len(seen)]
            assert state["consumed"] == len(seen)
            assert {len(batch) for batch in step} <= {batch_size, batch_size + 1} or len(seen) == length
            if steps > stop:
                break
        else:
            assert expected == {steps}
            assert len(seen) == length or length - len(seen) < size
    assert seen == order


@given(st.integers(1, 80), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_an_even_tail_leaves_out_fewer_samples_than_ranks_and_only_if_some_would_have_no_batch(
    length: int, size: int, batch_size: int, drop_last: bool
) -> None:
    samplers = _samplers(length, size)
    loops = [sampler.batches(_loader(sampler, length, batch_size, drop_last=drop_last)) for sampler in samplers]
    seen = [number for step in _steps(samplers, loops) for number in _dealt(step)]
    left = length % (size * batch_size)
    assert seen == _order(length)[: length - left if drop_last or left < size else length]
    assert [(sampler.data_epoch, sampler.consumed) for sampler in samplers] == [(1, 0)] * size


@pytest.mark.parametrize(("tail", "counts"), [("even", [2, 2, 2]), ("uneven", [3, 2, 2]), ("pad", [3, 3, 3])])
def test_ranks_have_as_many_batches_each_unless_that_was_not_asked_for(tail: Tail, counts: list[int]) -> None:
    found = [len(list(sampler.batches(_loader(sampler, 13, 2)))) for sampler in _samplers(13, 3, tail=tail)]
    assert found == counts


def test_samples_that_are_left_out_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    (sampler, _) = _samplers(9, 2)
    with caplog.at_level(logging.WARNING, logger="cloudckpt"):
        list(sampler.batches(_loader(sampler, 9, 4)))
    assert "data epoch 0 ends with 1 samples for 2 ranks, which are left out" in caplog.text
    caplog.clear()
    (sampler, _) = _samplers(9, 2)
    assert [len(batch) for batch in sampler.batches(_merging(sampler, 9, 4))] == [5]
    assert caplog.text == ""


# -- what the loop was handed, not what workers have drawn --------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_draw_ahead_move_nothing(persistent: bool) -> None:
    order = [_order(40, data_epoch) for data_epoch in range(3)]
    (sampler,) = _samplers(40, 1)
    options = {"num_workers": 2, "prefetch_factor": 4, "persistent_workers": persistent}
    loader = _loader(sampler, 40, 4, **options)
    seen: list[int] = []
    for batch in sampler.batches(loader):
        seen += batch
        assert sampler.consumed == len(seen)
        if len(seen) == 12:
            break
    (restored,) = _samplers(40, 1)
    restored.load_state_dict(sampler.state_dict())
    for going_on in (sampler, restored):  # in the same process, and in another one
        again = loader if going_on is sampler else _loader(restored, 40, 4, **options)
        rest = [[number for batch in going_on.batches(again) for number in batch] for _ in range(3)]
        assert seen + rest[0] == order[0]
        assert rest[1:] == order[1:]
        assert going_on.data_epoch == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_draws_nothing_from_the_program_s_generator(workers: int) -> None:
    (sampler,) = _samplers(8, 1)
    before = torch.get_rng_state()
    list(sampler.batches(_loader(sampler, 8, 2, num_workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


def test_single_samples_and_batch_samplers_of_torch_s_own_are_counted() -> None:
    (sampler,) = _samplers(9, 1)
    single: DataLoader[int] = DataLoader(Numbers(9), batch_size=None, sampler=sampler)
    loop = sampler.batches(single)
    first = [next(loop) for _ in range(4)]
    del loop
    batched: DataLoader[int] = DataLoader(
        Numbers(9), batch_sampler=BatchSampler(sampler, 2, drop_last=False), collate_fn=list
    )
    rest = [(batch, sampler.consumed) for batch in sampler.batches(batched)]
    order = _order(9)
    assert first == order[:4]
    assert rest == [(order[4:6], 6), (order[6:8], 8), (order[8:], 9)]


def test_a_loop_of_one_s_own_counts_with_advance() -> None:
    samplers = _samplers(20, 2)
    seen = [
        [number for batch in _first(_loader(sampler, 20, 3), 2, sampler) for number in batch] for sampler in samplers
    ]
    assert [sampler.consumed for sampler in samplers] == [12, 12]
    assert _dealt(seen) == _order(20)[:12]
    assert [list(sampler) for sampler in samplers] == [_order(20)[12::2], _order(20)[13::2]]
    samplers[0].advance(4)
    with pytest.raises(OptionsError, match="0 are left"):
        samplers[0].advance(1)


def _first(loader: DataLoader[int], count: int, sampler: ResumableSampler) -> Iterator[list[int]]:
    for _, batch in zip(range(count), loader, strict=False):
        sampler.advance(len(batch))
        yield batch


def test_the_data_epoch_under_way_stays_where_it_is_when_it_is_set_again() -> None:
    (sampler,) = _samplers(10, 1)
    sampler.advance(4)
    sampler.set_epoch(0)
    assert (sampler.data_epoch, sampler.consumed) == (0, 4)
    sampler.set_epoch(2)
    assert (sampler.data_epoch, sampler.consumed) == (2, 0)
    assert list(sampler) == _order(10, 2)


# -- calls that are wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "options"),
    [(0, {}), (5, {"tail": "long"}), (5, {"rank": 2, "num_replicas": 2}), (5, {"rank": 0}), (5, {"num_replicas": 2})],
)
def test_a_sampler_that_cannot_be_is_refused(length: int, options: dict[str, Any]) -> None:
    with pytest.raises(OptionsError, match=r"give|ranks count"):
        ResumableSampler(length, **options)


def test_a_rank_without_a_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionsError, match="init_process_group"):
        ResumableSampler(5)
    assert len(ResumableSampler(5, rank=1, num_replicas=2)) == 2


class _Pairs(BatchSampler):
    """A kind of one's own."""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda sampler: [1, 2], "wants a DataLoader"),
        (lambda sampler: DataLoader(Numbers(5), batch_size=2), "another sampler"),
        (
            lambda sampler: DataLoader(
                Numbers(5), batch_sampler=BatchSampler(SequentialSampler(Numbers(5)), 2, drop_last=False)
            ),
            "another sampler",
        ),
        (lambda sampler: DataLoader(Numbers(5), batch_sampler=_Pairs(sampler, 2, drop_last=False)), "advance"),
        (lambda sampler: DataLoader(Numbers(5), sampler=sampler, num_workers=1, in_order=False), "in_order"),
    ],
)
def test_a_loader_whose_batches_cannot_be_counted_is_refused(make: Any, said: str) -> None:
    (sampler,) = _samplers(5, 1)
    with pytest.raises(OptionsError, match=said):
        sampler.batches(make(sampler))


def test_two_loops_at_once_are_refused() -> None:
    (sampler,) = _samplers(8, 1)
    first = sampler.batches(_loader(sampler, 8, 2))
    next(first)
    with pytest.raises(OptionsError, match="under way"):
        next(sampler.batches(_loader(sampler, 8, 2)))
    with pytest.raises(OptionsError, match="by itself"):
        sampler.advance(2)
    list(sampler)
    with pytest.raises(OptionsError, match="two at once"):
        next(first)
    assert sum(map(len, sampler.batches(_loader(sampler, 8, 2)))) == 6  # the loop that failed is over


def test_a_sampler_that_is_moved_in_a_loop_over_it_is_refused() -> None:
    (sampler,) = _samplers(8, 1)
    loop = sampler.batches(_loader(sampler, 8, 2))
    next(loop)
    sampler.set_data_epoch(4)
    with pytest.raises(OptionsError, match="was moved"):
        next(loop)
    assert (sampler.data_epoch, sampler.consumed) == (4, 0)


class _Short(DataLoader[int]):
    """A loader that forgets its last batch."""

    def __iter__(self) -> Any:
        return iter([*super().__iter__()][:-1])


def test_a_loader_that_ends_early_does_not_end_the_data_epoch() -> None:
    (sampler,) = _samplers(8, 1)
    with pytest.raises(OptionsError, match="after 3 of 4 batches"):
        list(sampler.batches(_Short(Numbers(8), batch_size=2, sampler=sampler)))
    assert (sampler.data_epoch, sampler.consumed) == (0, 6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data_source": 11}, "length 11 here and 10 there"),
        ({"seed": 4}, "seed 4 here and 0 there"),
        ({"shuffle": False}, "shuffle False here and True there"),
    ],
)
def test_a_position_in_another_order_is_refused_before_anything_is_changed(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    (saved,) = _samplers(10, 1)
    saved.advance(4)
    checkpoint = cloudckpt.save({"w": torch.ones(2), "sampler": saved}, tmp_path / "c")
    other = ResumableSampler(**{"data_source": 10, "num_replicas": 1, "rank": 0, **options})
    w = torch.zeros(2)
    with pytest.raises(StateMismatchError, match=f"sampler has {said}"):
        cloudckpt.load({"w": w, "sampler": other}, checkpoint.url)
    assert (w.tolist(), other.consumed) == ([0.0, 0.0], 0)
    with pytest.raises(StateMismatchError, match=said):
        other.load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"order": "0123456789abcdef"}, "another order of data epoch 0"),
        ({"consumed": 11}, "stands at 11 of 10"),
        ({"consumed": -1}, "stands at -1 of 10"),
        ({"consumed": "4"}, "no state of a ResumableSampler"),
        ({"data_epoch": -1}, "no state of a ResumableSampler"),
    ],
)
def test_a_state_that_cannot_be_is_refused(change: dict[str, object], said: str) -> None:
    (saved, sampler) = (_samplers(10, 1)[0] for _ in range(2))
    saved.advance(4)
    with pytest.raises(StateMismatchError, match=said):
        sampler.load_state_dict({**saved.state_dict(), **change})
    assert (sampler.data_epoch, sampler.consumed) == (0, 0)


# -- through checkpoints, with ranks and workers ------------------------------------------------------------


def _train(url: str, length: int, batch_size: int, workers: int, stop: int | None) -> list[list[int]]:
    """Go on from the newest checkpoint; return what this rank saw, batch by batch, up to the save."""
    # Ranks of a test are daemons, which may not start a loader's workers.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    sampler = ResumableSampler(Numbers(length), seed=9)
    batches = sampler.in_batches(batch_size)
    loader: DataLoader[int] = DataLoader(Numbers(length), batch_sampler=batches, collate_fn=list, num_workers=workers)
    state: dict[str, object] = {"sampler": sampler, "w": torch.zeros(3)}
    seen: list[list[int]] = []
    with CheckpointManager(url, options=CALM) as manager:
        restored = manager.restore(state)
        step = restored.step if restored else 0
        while sampler.data_epoch < 2:
            for batch in sampler.batches(loader):
                seen.append(batch)
                step += 1
                if len(seen) == stop:
                    manager.save(step, state)
                    return seen
    return seen


def _together(of_ranks: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    return [number for step in zip(*of_ranks, strict=True) for number in _dealt(step)]


@pytest.mark.parametrize(
    ("first", "second", "batch_size", "workers", "stop"),
    [
        pytest.param(2, 3, 4, 2, 5, marks=pytest.mark.slow),
        pytest.param(3, 2, 3, 0, 7, marks=pytest.mark.slow),
        (1, 4, 5, 0, 3),
        (2, 3, 4, 0, 12),
    ],
)
def test_ranks_of_another_number_go_on_with_the_very_next_samples(
    tmp_path: Path, first: int, second: int, batch_size: int, workers: int, stop: int
) -> None:
    length = 90
    before = run(first, _train, str(tmp_path), length, batch_size, workers, stop)
    after = run(second, _train, str(tmp_path), length, batch_size, workers, None)
    uninterrupted = _order(length, 0, seed=9) + _order(length, 1, seed=9)
    seen = _together(before)
    assert len(seen) == min(stop * first * batch_size, length)
    seen += _together(after)
    assert seen == uninterrupted


def _save_out_of_step(url: str) -> str:
    sampler = ResumableSampler(20)
    sampler.advance(2 + dist.get_rank())
    with CheckpointManager(url, options=CALM) as manager, pytest.raises(cloudckpt.SaveFailedError) as caught:
        manager.save(1, {"sampler": sampler})
    return str(caught.value)


def test_ranks_that_are_not_in_step_are_refused(tmp_path: Path) -> None:
    for said in run(2, _save_out_of_step, str(tmp_path)):
        assert "'sampler' differs between rank 0 and rank 1" in said


# -- loops that count nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loop_that_counts_nothing_is_told_so_once(caplog: pytest.LogCaptureFixture, workers: int) -> None:
    sampler = ResumableSampler(12, seed=1)
    loader = DataLoader(list(range(12)), batch_size=4, sampler=sampler, num_workers=workers)
    for _ in range(3):
        for _ in loader:
            pass
    (told,) = [record.getMessage() for record in caplog.records]
    assert "nothing was counted, and it began again where it stood before" in told
    assert "loop over sampler.batches(loader), or call sampler.advance(samples) for each batch" in told


def test_a_position_that_was_not_counted_is_told_when_it_is_saved(caplog: pytest.LogCaptureFixture) -> None:
    sampler = ResumableSampler(12, seed=1)
    for data_epoch in range(2):
        sampler.set_epoch(data_epoch)
        for _ in sampler:
            pass
    assert caplog.text == ""
    sampler.state_dict()
    assert "nothing was counted, and it is saved at the position where the loop began" in caplog.text


def test_loops_that_count_are_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    sampler = ResumableSampler(12, seed=1)
    loader = DataLoader(list(range(12)), batch_size=4, sampler=sampler)
    sampler.state_dict()
    for _ in range(2):
        for _ in sampler.batches(loader):
            sampler.state_dict()
    for data_epoch in (2, 3):
        for batch in loader:
            sampler.advance(len(batch))
            sampler.state_dict()
        sampler.set_data_epoch(data_epoch + 1)
    for _ in sampler.batches(loader):
        break
    sampler.state_dict()
    assert caplog.text == ""


# -- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [np.int64, torch.tensor], ids=["numpy", "torch"])
def test_a_position_is_in_whole_numbers_of_python_whosever_were_given(of: Callable[[int], Any]) -> None:
    sampler = ResumableSampler(of(20), seed=of(7), rank=of(0), num_replicas=of(1))
    sampler.set_epoch(of(1))
    sampler.advance(of(4))
    loader = DataLoader(range(20), batch_sampler=sampler.in_batches(of(4)))
    next(iter(sampler.batches(loader)))
    state = sampler.state_dict()
    assert {type(value) for value in state.values()} <= {int, bool, str}
    assert (state["data_epoch"], state["consumed"]) == (1, 8)
    ResumableSampler(20, seed=7).load_state_dict(state)


@pytest.mark.parametrize("bad", [1.5, True, "1", None, torch.tensor([1, 2])], ids=str)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("the data epoch", lambda bad: ResumableSampler(20).set_data_epoch(bad)),
        ("samples", lambda bad: ResumableSampler(20).advance(bad)),
        ("batch_size", lambda bad: ResumableSampler(20).in_batches(bad)),
        ("batch_size", lambda bad: ResumableSampler(20).steps_left(bad)),
        ("seed", lambda bad: ResumableSampler(20, seed=bad)),
    ],
)
def test_what_is_no_whole_number_is_refused_by_name(name: str, call: Callable[[Any], object], bad: object) -> None:
    with pytest.raises(OptionsError, match=f"^{name} is .*; give a whole number"):
        call(bad)


@pytest.mark.parametrize("bad", [1.5, True, None])
def test_a_data_set_without_a_length_is_refused(bad: Any) -> None:
    with pytest.raises(OptionsError, match=r"^the length of the data set is"):
        ResumableSampler(bad)
