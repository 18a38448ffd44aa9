"""State that is each rank's own goes back to its rank; another number of ranks is told what to do instead."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    Options,
    OptionsError,
    StateMismatchError,
    UnsupportedValueError,
)
from cloudckpt.errors import ManifestError
from cloudckpt.state.per_rank import PerRank, RankName, pack, unpack
from tests.effort import diagonal, first
from tests.ranks.processes import run

# torchdata asks torch for a name that torch has retired.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

CALM = Options(progress_timeout_s=60)


class Stream:
    """Something that reads on where it stood."""

    def __init__(self, place: object = 0) -> None:
        self.place = place

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


# -- names and bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loader", "data.loaders.0", "a\nb", "cloudckpt", "1-of-2.x"])
def test_a_name_says_whose_it_is(name: str) -> None:
    owner = RankName(name, 3, 123_456)
    assert RankName.parse(str(owner)) == owner
    assert str(owner).startswith("cloudckpt.per_rank.00003-of-123456.")


@pytest.mark.parametrize(
    "text", ["cloudckpt.rng.r00001", "loader", "cloudckpt.per_rank.1-of-2.x", "x.00001-of-00002.y"]
)
def test_other_names_say_nothing_of_a_rank(text: str) -> None:
    assert RankName.parse(text) is None


def test_small_changes_of_a_state_leave_its_size_as_it_is() -> None:
    sizes = {len(pack({"place": place, "seed": torch.arange(3)}, key="x")) for place in (0, 10, 10**9)}
    assert sizes == {4096}


def test_bytes_that_are_no_state_are_an_integrity_error() -> None:
    with pytest.raises(ManifestError, match="'x' is no JSON"):
        unpack(torch.frombuffer(bytearray(b"{]" + b" " * 100), dtype=torch.uint8), key="x")


@pytest.mark.parametrize("value", [3, torch.nn.Linear(1, 1), Stream])
def test_only_an_object_with_a_state_can_be_each_rank_s_own(value: Any) -> None:
    with pytest.raises(OptionsError, match="state_dict and load_state_dict"):
        PerRank(value)


# -- one process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [17, {"deep": [1, (2, 3)], "t": None}, "x" * 10_000])
def test_a_single_process_gets_its_own_back_whatever_its_size(tmp_path: Path, place: object) -> None:
    stream = Stream(0)
    state: dict[str, object] = {"streams": [PerRank(stream), {"of": PerRank(other := Stream(1))}], "w": torch.ones(2)}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state)
        stream.place, other.place = place, "other"
        manager.save(2, state)
        stream.place = other.place = None
        manager.restore(state)
        assert (stream.place, other.place) == (place, "other")
        manager.restore(state, 1)
        assert (stream.place, other.place) == (0, 1)


def test_reading_without_ranks_shows_what_they_share(tmp_path: Path) -> None:
    state: dict[str, object] = {"stream": PerRank(Stream(3)), "step": 5}
    checkpoint = cloudckpt.save(state, tmp_path / "c")
    assert cloudckpt.read(checkpoint.url) == {"step": 5}


def test_a_state_that_the_format_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedValueError, match=r"stream\.place"):
        cloudckpt.save({"stream": PerRank(Stream(object()))}, tmp_path / "c")


def test_an_entry_that_only_one_side_has_is_refused(tmp_path: Path) -> None:
    with_stream: dict[str, object] = {"stream": PerRank(Stream(3)), "step": 5}
    saved = cloudckpt.save(with_stream, tmp_path / "with")
    bare = cloudckpt.save({"step": 6}, tmp_path / "without")
    with pytest.raises(StateMismatchError) as caught:
        cloudckpt.load({"step": 0}, saved.url)
    assert caught.value.unexpected == ("stream",)
    with pytest.raises(StateMismatchError) as caught:
        cloudckpt.load(with_stream, bare.url)
    assert caught.value.missing == ("stream",)
    left: dict[str, object] = {"step": 0}
    cloudckpt.load(left, saved.url, strict=False)
    assert left == {"step": 5}


def test_an_object_that_is_not_marked_any_more_is_told_so(tmp_path: Path) -> None:
    saved = cloudckpt.save({"stream": PerRank(Stream(3))}, tmp_path / "c")
    with pytest.raises(StateMismatchError, match="stream is each rank's own there"):
        cloudckpt.load({"stream": Stream(0)}, saved.url)


def test_what_was_saved_before_it_was_marked_is_still_restored(tmp_path: Path) -> None:
    saved = cloudckpt.save({"stream": Stream([1, 2])}, tmp_path / "c")
    stream = Stream(0)
    cloudckpt.load({"stream": PerRank(stream)}, saved.url)
    assert stream.place == [1, 2]


# -- several ranks ------------------------------------------------------------------------------------------


def _save_streams(url: str) -> None:
    with CheckpointManager(url, options=CALM) as manager:
        for step, factor in ((1, 10), (2, 20)):
            place = {"at": factor * _rank(), "buffer": "b" * 5000 * _rank()}
            manager.save(step, {"stream": PerRank(Stream(place)), "w": torch.full((3,), float(step)), "step": step})


def _restore_streams(url: str, strict: bool = True) -> tuple[object, object, list[float], str]:
    stream = Stream("own")
    state: dict[str, object] = {"stream": PerRank(stream), "w": torch.zeros(3), "step": 0}
    said = ""
    with CheckpointManager(url, options=CALM) as manager:
        try:
            manager.restore(state, strict=strict)
        except StateMismatchError as exc:
            said = str(exc)
    assert isinstance(state["w"], torch.Tensor)
    return stream.place, state["step"], state["w"].tolist(), said


def test_each_rank_gets_its_own_back(tmp_path: Path) -> None:
    run(2, _save_streams, str(tmp_path))
    found = run(2, _restore_streams, str(tmp_path))
    places = [{"at": 20 * rank, "buffer": "b" * 5000 * rank} for rank in range(2)]
    assert found == [(place, 2, [2.0, 2.0, 2.0], "") for place in places]


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_ranks_is_refused_on_all_of_them_and_nothing_changes(tmp_path: Path, size: int) -> None:
    run(2, _save_streams, str(tmp_path))
    for place, step, w, said in run(size, _restore_streams, str(tmp_path)):
        assert (place, step, w) == ("own", 0, [0.0, 0.0, 0.0])
        here = "is 1 rank" if size == 1 else "are 3 ranks"
        for words in (
            f"stream was saved by 2 ranks, each for itself, and here {here}",
            "ResumableSampler",
            "strict=False",
        ):
            assert words in said


def test_another_number_of_ranks_may_go_on_without_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(2, _save_streams, str(tmp_path))
    assert run(3, _restore_streams, str(tmp_path), False) == [("own", 2, [2.0, 2.0, 2.0], "")] * 3
    with caplog.at_level(logging.WARNING, logger="cloudckpt"):
        assert _restore_streams(str(tmp_path), strict=False) == ("own", 2, [2.0, 2.0, 2.0], "")
    assert "stream was saved by 2 ranks, each for itself, and here is 1 rank: it is NOT restored" in caplog.text


# -- torchdata's loader, sample by sample -------------------------------------------------------------------


class Numbers(Dataset[int]):
    """The numbers of one rank's part."""

    def __init__(self, length: int, part: int, parts: int) -> None:
        self.own = range(part, length, parts)

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, place: int) -> int:
        return self.own[place] * 10


def _loader(rank: int, size: int, workers: int) -> StatefulDataLoader[int]:
    return StatefulDataLoader(Numbers(72, rank, size), batch_size=4, shuffle=True, num_workers=workers)


def _seen(loader: StatefulDataLoader[int]) -> Iterator[tuple[list[int], float]]:
    """Yield what training would see: a batch, and a number of torch's generator after it (say, of a dropout)."""
    for batch in loader:
        yield batch.tolist(), torch.rand(()).item()


def _interrupt(url: str, workers: int, after: int) -> tuple[list[Any], list[Any]]:
    """Return what two data epochs show from a save on, uninterrupted and restored."""
    rank, size = _rank(), dist.get_world_size() if dist.is_initialized() else 1
    # Ranks of a test are daemons, which may not start a loader's workers.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    torch.manual_seed(40 + rank)
    loader = _loader(rank, size, workers)
    wanted: list[Any] = []
    with CheckpointManager(url, options=CALM) as manager:
        if after == 0:
            manager.save(1, {"loader": loader})
        for data_epoch in range(2):
            for number, seen in enumerate(_seen(loader), start=1):
                wanted.append(seen)
                if data_epoch == 0 and number == after:
                    wanted.clear()
                    manager.save(1, {"loader": loader})
        torch.manual_seed(77)
        restored = _loader(rank, size, workers)
        manager.restore({"loader": restored})
        is_ended = after == len(loader)
        found = [] if is_ended else list(_seen(restored))
        return wanted, found + list(_seen(restored))


@diagonal("after, workers", [0, 1, 7, 17], [0, 2])
def test_a_stateful_loader_goes_on_with_the_very_next_sample(tmp_path: Path, workers: int, after: int) -> None:
    wanted, found = _interrupt(str(tmp_path), workers, after)
    assert len(wanted) == 2 * 18 - after
    assert found == wanted


@pytest.mark.parametrize("workers", first([0, 2], [0]))
def test_the_stateful_loader_of_each_rank_goes_on_with_the_very_next_sample(tmp_path: Path, workers: int) -> None:
    of_ranks = run(2, _interrupt, str(tmp_path), workers, 5)
    for wanted, found in of_ranks:
        assert len(wanted) == 2 * 9 - 5
        assert found == wanted
    second = [sorted(number for batch, _ in wanted[-9:] for number in batch) for wanted, _ in of_ranks]
    assert second == [[number * 10 for number in range(rank, 72, 2)] for rank in range(2)]


class Counting(IterableDataset[int]):
    """A stream that knows where it stands; each worker has one of its own."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        part = worker.id if worker else 0
        while self.at < 20:
            self.at += 1
            yield 100 * part + self.at
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_in_workers_goes_on_where_each_of_them_stood(tmp_path: Path, workers: int) -> None:
    loader = StatefulDataLoader(Counting(), batch_size=3, num_workers=workers)
    seen = []
    with CheckpointManager(tmp_path) as manager:
        for number, batch in enumerate(loader):
            seen.append(batch.tolist())
            if number == 2:
                manager.save(1, {"data": {"loader": loader}})
        restored = StatefulDataLoader(Counting(), batch_size=3, num_workers=workers)
        manager.restore({"data": {"loader": restored}})
        assert [batch.tolist() for batch in restored] == seen[3:]
    assert len(seen) == 7 * max(1, workers)


def _save_loader(url: str) -> None:
    loader = _loader(_rank(), 2, 0)
    next(iter(loader))
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(1, {"loader": loader})


def _restore_loader(url: str) -> str:
    with CheckpointManager(url, options=CALM) as manager, pytest.raises(StateMismatchError) as caught:
        manager.restore({"loader": _loader(_rank(), 3, 0)})
    return str(caught.value)


def test_a_stateful_loader_of_two_ranks_is_refused_by_three(tmp_path: Path) -> None:
    run(2, _save_loader, str(tmp_path))
    for said in run(3, _restore_loader, str(tmp_path)):
        assert "loader was saved by 2 ranks, each for itself, and here are 3 ranks" in said
        assert "ResumableSampler" in said
