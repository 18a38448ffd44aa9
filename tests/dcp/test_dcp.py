"""Stock `torch.distributed.checkpoint` works unchanged: any planner, any layout, its own errors, and never a pickle."""

from __future__ import annotations

import base64
import io
import json
import pickle
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.futures import Future

import cloudckpt
from cloudckpt import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CloudReader,
    CloudWriter,
    IntegrityError,
    Options,
    OptionsError,
    SaveFailedError,
    UnsupportedValueError,
)
from cloudckpt.format.boxes import Box as TableBox
from cloudckpt.format.boxes import BoxTable
from cloudckpt.format.codec import JsonValue
from cloudckpt.options import KIB
from cloudckpt.saving.tally import Written
from cloudckpt.store import RetryingStore, open_store
from servers import FreshPrefix
from tests.effort import diagonal, examples

# DCP says so in every process that has no group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

CUT = Options(shard_bytes=256, block_bytes=64, span_bytes=128, memory_budget_bytes=8 * KIB, concurrency=3)


def state_dict() -> dict[str, object]:
    return {
        "model": {"0.weight": torch.arange(60.0).reshape(6, 10), "0.bias": torch.ones(6, dtype=torch.bfloat16)},
        "optimizer": {"state": {"w": {"exp_avg": torch.full((6, 10), 2.0), "step": torch.tensor(3.0)}}, "lr": 0.5},
        "history": [torch.arange(3), {"loss": torch.tensor(0.25)}],
        "epoch": 7,
        "name": "run",
        "schedule": (1, 2.5, None),
    }


def emptied(value: object) -> object:
    """Return the same nested state with zeroed tensors and no values."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: emptied(child) for key, child in value.items()}
    if isinstance(value, list):
        return [emptied(child) for child in value]
    return None


def empty_state_dict() -> dict[str, object]:
    return {name: emptied(value) for name, value in state_dict().items()}


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other, strict=True))
    return one == other


def is_committed(url: Path) -> bool:
    return (url / "manifest.json").exists()


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one rank, on loopback."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def memory() -> Iterator[Callable[[], str]]:
    """Fresh places in memory."""
    top = f"/{secrets.token_hex(8)}"
    yield lambda: f"memory:/{top}/{secrets.token_hex(8)}"
    MemoryFileSystem().rm(top, recursive=True)


# -- stock calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [Options(), CUT], ids=["default", "cut"])
def test_a_nested_state_dict_with_values_goes_through_save_and_load(tmp_path: Path, options: Options) -> None:
    writer = CloudWriter(tmp_path / "c", options=options, metrics={"loss": 0.5})
    dcp.save(state_dict(), storage_writer=writer)
    loaded = empty_state_dict()

    dcp.load(loaded, storage_reader=CloudReader(tmp_path / "c", options=options))

    assert equal(loaded, state_dict())
    assert writer.checkpoint is not None
    assert dict(writer.checkpoint.metrics) == {"loss": 0.5}


@pytest.mark.parametrize("engine", ["obstore", "fsspec"])
def test_stock_calls_reach_a_real_object_store(s3_url: FreshPrefix, engine: str) -> None:
    there = {"storage_options": s3_url.storage_options, "engine": engine, "options": CUT}
    dcp.save(state_dict(), storage_writer=CloudWriter(s3_url.url, **there))
    loaded = empty_state_dict()
    dcp.load(loaded, storage_reader=CloudReader(s3_url.url, **there))
    assert equal(loaded, state_dict())


def test_a_checkpoint_id_points_writer_and_reader_elsewhere(tmp_path: Path) -> None:
    dcp.save(state_dict(), checkpoint_id=tmp_path / "there", storage_writer=CloudWriter(tmp_path / "here"))
    loaded = empty_state_dict()
    dcp.load(loaded, checkpoint_id=str(tmp_path / "there"), storage_reader=CloudReader(tmp_path / "here"))

    assert equal(loaded, state_dict())
    assert not (tmp_path / "here").exists()


def test_one_reader_loads_one_checkpoint_after_the_other(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        dcp.save({"t": torch.full((3,), value)}, storage_writer=CloudWriter(tmp_path / str(value)))
    reader = CloudReader(tmp_path / "1.0")
    found = []
    for place in (None, tmp_path / "2.0", None, tmp_path / "1.0"):
        target = {"t": torch.zeros(3)}
        dcp.load(target, checkpoint_id=place, storage_reader=reader)
        found.append(target["t"][0].item())
    assert found == [1.0, 2.0, 2.0, 1.0]


@pytest.mark.usefixtures("group")
def test_async_save_commits_what_the_state_was_at_the_call(tmp_path: Path) -> None:
    state = state_dict()
    future = dcp.async_save(state, storage_writer=CloudWriter(tmp_path / "c"))
    state["model"]["0.weight"].zero_()  # type: ignore[index]
    future.result(timeout=60)
    loaded = empty_state_dict()

    dcp.load(loaded, storage_reader=CloudReader(tmp_path / "c"))

    assert equal(loaded, state_dict())


@pytest.mark.usefixtures("group")
def test_an_async_save_that_fails_says_so_in_its_future(tmp_path: Path) -> None:
    dcp.save(state_dict(), storage_writer=CloudWriter(tmp_path / "c"))
    future = dcp.async_save(state_dict(), storage_writer=CloudWriter(tmp_path / "c"))
    with pytest.raises(CheckpointException) as caught:
        future.result(timeout=60)
    assert isinstance(caught.value.failures[0][0], CheckpointExistsError)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_a_dtensor_goes_through_save_and_load(tmp_path: Path, placement: Shard | Replicate) -> None:
    mesh = init_device_mesh("cpu", (1,))
    whole = torch.arange(60.0).reshape(6, 10)
    dcp.save({"t": distribute_tensor(whole, mesh, [placement])}, storage_writer=CloudWriter(tmp_path / "c"))
    target = {"t": distribute_tensor(torch.zeros(6, 10), mesh, [placement])}

    dcp.load(target, storage_reader=CloudReader(tmp_path / "c", options=CUT))

    assert isinstance(target["t"], DTensor)
    assert torch.equal(target["t"].full_tensor(), whole)


@pytest.mark.usefixtures("group")
def test_save_and_load_of_the_library_work_inside_a_process_group(tmp_path: Path) -> None:
    state = {"t": torch.arange(5.0), "n": 3}
    cloudckpt.save(dict(state), tmp_path / "c")
    live: dict[str, object] = {"t": torch.zeros(5), "n": 0}
    cloudckpt.load(live, tmp_path / "c")
    assert equal(live, state)


def test_plan_caching_saves_the_values_of_each_call_under_an_attempt_of_its_own(tmp_path: Path) -> None:
    class CachingPlanner(DefaultSavePlanner):
        """Under a name of its own, because the caches are kept by class name for the whole process."""

    attempts = []
    for value in (1.0, 2.0, 3.0):
        writer = CloudWriter(tmp_path / str(value), options=CUT)
        state = {"t": torch.full((100,), value), "value": value}
        dcp.save(state, storage_writer=writer, planner=CachingPlanner(enable_plan_caching=True))
        assert writer.checkpoint is not None
        attempts.append(writer.checkpoint.attempt)

    assert SavePlanner._cached_save_plan["CachingPlanner"].usable
    assert len(set(attempts)) == 3
    for value in (1.0, 2.0, 3.0):
        assert equal(cloudckpt.read(tmp_path / str(value)), {"t": torch.full((100,), value), "value": value})


# -- planners of the user's own ----------------------------------------------------------------------------------


class HalfPlanner(DefaultSavePlanner):
    """Saves every tensor as float16."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data = super().resolve_data(write_item)
        return data.to(torch.float16) if isinstance(data, torch.Tensor) else data


@pytest.mark.parametrize("options", [Options(), CUT], ids=["default", "cut"])
def test_a_planner_may_convert_on_save(tmp_path: Path, options: Options) -> None:
    weight = torch.linspace(-1, 1, 91).reshape(7, 13)
    state: dict[str, object] = {"w": weight, "t": weight.t(), "config": {"lr": 0.5, "tuple": (1, 2)}}
    dcp.save(state, storage_writer=CloudWriter(tmp_path / "c", options=options), planner=HalfPlanner())

    found = cloudckpt.read(tmp_path / "c")

    expected = {"w": weight.half(), "t": weight.t().half(), "config": {"lr": 0.5, "tuple": (1, 2)}}
    assert equal(found, expected)


class CountingPlanner(DefaultSavePlanner):
    """Changes a value on its way."""

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is not WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        data = io.BytesIO()
        torch.save(self.lookup_object(write_item.index) + 1, data)
        return data


def test_a_planner_may_change_values_on_save(tmp_path: Path) -> None:
    dcp.save({"n": 41}, storage_writer=CloudWriter(tmp_path / "c"), planner=CountingPlanner())
    assert cloudckpt.read(tmp_path / "c") == {"n": 42}


def test_a_planner_of_the_user_s_own_may_carry_every_value_that_a_stock_one_may(tmp_path: Path) -> None:
    """None of these could be read back from the bytes that the planner hands out, without trusting a pickle."""
    values = {"array": np.arange(3), "range": range(3), "slice": slice(1, 2), "complex": np.complex64(1j)}
    dcp.save(dict(values), storage_writer=CloudWriter(tmp_path / "c"), planner=HalfPlanner())
    found = cloudckpt.read(tmp_path / "c")
    assert repr(found) == repr(values)


def test_a_planner_that_makes_bytes_of_what_cannot_be_held_is_refused(tmp_path: Path) -> None:
    class Wrapping(CountingPlanner):
        def lookup_object(self, index: MetadataIndex) -> object:
            return Unholdable()

    error = failure(lambda: dcp.save({"n": 1}, storage_writer=CloudWriter(tmp_path / "c"), planner=Wrapping()))
    assert isinstance(error, UnsupportedValueError)
    assert error.key == "n"
    assert not is_committed(tmp_path / "c")


class Unholdable:
    """Pickles, and can be added to."""

    def __add__(self, other: int) -> Unholdable:
        return self


class RenamingSavePlanner(DefaultSavePlanner):
    """Saves everything under other names."""

    def set_up_planner(
        self,
        state_dict: dict[str, object],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        renamed = {f"foo_{name}": value for name, value in state_dict.items()}
        super().set_up_planner(renamed, storage_meta, is_coordinator)


class RenamingLoadPlanner(DefaultLoadPlanner):
    """Loads from other names."""

    def set_up_planner(
        self, state_dict: dict[str, object], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner({f"foo_{name}": value for name, value in state_dict.items()}, metadata, is_coordinator)
        self.asked = state_dict

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.asked[read_item.dest_index.fqn.removeprefix("foo_")] = torch.load(value, weights_only=False)


def test_planners_may_rename_on_save_and_on_load(tmp_path: Path) -> None:
    state: dict[str, object] = {"w": torch.arange(5.0), "n": 3}
    dcp.save(dict(state), storage_writer=CloudWriter(tmp_path / "c"), planner=RenamingSavePlanner())
    loaded: dict[str, object] = {"w": torch.zeros(5), "n": 0}

    dcp.load(loaded, storage_reader=CloudReader(tmp_path / "c"), planner=RenamingLoadPlanner())

    assert set(cloudckpt.read(tmp_path / "c")) == {"foo_w", "foo_n"}
    assert equal(loaded, state)


class MaterializingPlanner(DefaultLoadPlanner):
    """Puts each tensor into new memory of any kind, and into the state dict when it is complete."""

    def __init__(self, make: Callable[[Sequence[int]], torch.Tensor]) -> None:
        super().__init__()
        self.make = make
        self.committed: list[str] = []

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.make(read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        place = (read_item.dest_index.fqn, *read_item.dest_offsets)
        self.committed.append(str(place))
        whole = self.state_dict[read_item.dest_index.fqn]
        for axis, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            whole = whole.narrow(axis, start, size)
        whole.copy_(tensor)


MAKERS: dict[str, Callable[[Sequence[int]], torch.Tensor]] = {
    "dense": torch.empty,
    "double": lambda size: torch.empty(size, dtype=torch.float64),
    "half": lambda size: torch.empty(size, dtype=torch.float16),
    "transposed": lambda size: torch.empty(*reversed(size)).permute(*reversed(range(len(size)))),
    "every second": lambda size: torch.empty(*size[:-1], size[-1] * 2)[..., ::2],
    "with gradient": lambda size: torch.empty(size, requires_grad=True),
}


@pytest.mark.parametrize("options", [Options(), CUT], ids=["default", "cut"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_load_planner_may_resolve_to_memory_of_any_kind(
    tmp_path: Path, make: Callable[[Sequence[int]], torch.Tensor], options: Options
) -> None:
    saved = torch.arange(77.0).reshape(7, 11)
    cloudckpt.save({"w": saved}, tmp_path / "c", options=options)
    loaded = {"w": torch.zeros(7, 11)}
    planner = MaterializingPlanner(make)

    dcp.load(loaded, storage_reader=CloudReader(tmp_path / "c", options=options), planner=planner)

    assert torch.equal(loaded["w"], saved)
    assert len(planner.committed) == len(set(planner.committed))


def test_a_target_of_another_shape_than_was_asked_for_is_refused(tmp_path: Path) -> None:
    cloudckpt.save({"w": torch.ones(7, 11)}, tmp_path / "c")
    planner = MaterializingPlanner(lambda size: torch.empty(3))
    error = failure(
        lambda: dcp.load({"w": torch.zeros(7, 11)}, storage_reader=CloudReader(tmp_path / "c"), planner=planner)
    )
    assert isinstance(error, OptionsError)
    assert "'w'" in str(error)


# -- errors ------------------------------------------------------------------------------------------------------


def failure(call: Callable[[], object]) -> BaseException:
    """Return the error that one rank met."""
    with pytest.raises(CheckpointException) as caught:
        call()
    assert set(caught.value.failures) == {0}
    error: BaseException = caught.value.failures[0][0]
    return error


def test_errors_of_ours_arrive_inside_the_exception_of_dcp(tmp_path: Path) -> None:
    dcp.save({"t": torch.ones(100)}, storage_writer=CloudWriter(tmp_path / "c"))
    (shard,) = (tmp_path / "c").rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")

    exists = failure(lambda: dcp.save({"t": torch.ones(1)}, storage_writer=CloudWriter(tmp_path / "c")))
    missing = failure(lambda: dcp.load({"t": torch.ones(1)}, storage_reader=CloudReader(tmp_path / "nothing")))
    corrupt = failure(lambda: dcp.load({"t": torch.ones(100)}, storage_reader=CloudReader(tmp_path / "c")))

    assert isinstance(exists, CheckpointExistsError)
    assert isinstance(missing, CheckpointNotFoundError)
    assert isinstance(corrupt, IntegrityError)
    assert corrupt.key == str(shard.relative_to(tmp_path / "c"))


@pytest.mark.parametrize(
    ("bad", "key"),
    [(torch.eye(3).to_sparse(), "bad"), (torch.ones(3, device="meta"), "bad"), (lambda: None, "bad")],
    ids=["sparse", "meta", "function"],
)
@pytest.mark.parametrize("planner", [DefaultSavePlanner, HalfPlanner])
def test_what_the_format_cannot_hold_is_refused_and_nothing_is_committed(
    tmp_path: Path, bad: object, key: str, planner: type[DefaultSavePlanner]
) -> None:
    if planner is HalfPlanner and callable(bad):
        pytest.skip("torch itself cannot pickle a lambda")
    state = {"fine": torch.ones(3), "bad": bad}
    error = failure(lambda: dcp.save(state, storage_writer=CloudWriter(tmp_path / "c"), planner=planner()))
    assert isinstance(error, UnsupportedValueError)
    assert error.key == key
    assert not is_committed(tmp_path / "c")


def test_a_reader_that_failed_once_can_be_used_again(tmp_path: Path) -> None:
    reader = CloudReader(tmp_path / "c")
    failure(lambda: dcp.load({"t": torch.zeros(3)}, storage_reader=reader))
    dcp.save({"t": torch.ones(3)}, storage_writer=CloudWriter(tmp_path / "c"))
    target = {"t": torch.zeros(3)}
    dcp.load(target, storage_reader=reader)
    assert torch.equal(target["t"], torch.ones(3))


def test_saving_without_collectives_is_refused(tmp_path: Path) -> None:
    with pytest.raises((OptionsError, CheckpointException)) as caught:
        dcp.save({"t": torch.ones(1)}, storage_writer=CloudWriter(tmp_path / "c"), use_collectives=False)
    error = caught.value.failures[0][0] if isinstance(caught.value, CheckpointException) else caught.value
    assert isinstance(error, OptionsError)
    assert not is_committed(tmp_path / "c")


# -- plan and results --------------------------------------------------------------------------------------------


class TamperingWriter(CloudWriter):
    """Reports other results than were written."""

    tamper: Callable[[list[WriteResult]], list[WriteResult]]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        future: Future[list[WriteResult]] = Future()
        future.set_result(type(self).tamper(results))
        return future


def _rewritten(change: Callable[[Written], Written]) -> Callable[[list[WriteResult]], list[WriteResult]]:
    """Return a change of the one message that a rank's results carry."""

    def tamper(results: list[WriteResult]) -> list[WriteResult]:
        (place,) = [place for place, result in enumerate(results) if result.storage_data is not None]
        message = change(Written.decode(results[place].storage_data)).encode()
        return [replace(result, storage_data=message) if at == place else result for at, result in enumerate(results)]

    return tamper


def _boxes(change: Callable[[TableBox], list[TableBox]]) -> Callable[[list[WriteResult]], list[WriteResult]]:
    """Return a change of what a rank says of its pieces; a piece becomes none, one or several at the same place."""

    def rewrite(written: Written) -> Written:
        changed = [change(box) for box in written.boxes]
        times = [len(boxes) for boxes in changed]
        return replace(
            written,
            boxes=BoxTable.of([box for boxes in changed for box in boxes]),
            shard=np.repeat(written.shard, times),
            start=np.repeat(written.start, times),
        )

    return _rewritten(rewrite)


def _changed(name: str, **fields: object) -> Callable[[list[WriteResult]], list[WriteResult]]:
    return _boxes(lambda box: [box._replace(**fields) if box.name == name else box])


def _values(change: Callable[[dict[str, JsonValue]], dict[str, JsonValue]]) -> Callable[..., list[WriteResult]]:
    return _rewritten(lambda written: replace(written, values=change(written.values)))


TAMPERS: dict[str, Callable[[list[WriteResult]], list[WriteResult]]] = {
    "a tensor is missing": _boxes(lambda box: [box] if box.name != "b" else []),
    "a value is missing": _values(lambda values: {}),
    "a tensor is there twice": _boxes(lambda box: [box] * (1 + (box.name == "b"))),
    "a rank reports twice": lambda results: results * 2,
    "a tensor was never planned": _boxes(lambda box: [box, box._replace(name="x", sizes=(0,), shape=(0,))]),
    "a value was never planned": _values(lambda values: {**values, "x": 1}),
    "a chunk is smaller": _changed("b", sizes=(4,)),
    "a chunk is elsewhere": _changed("b", offsets=(1,)),
    "the dtype is another": _changed("b", dtype="int32"),
    "the shape is another": _changed("b", shape=(5, 1), offsets=(0, 0), sizes=(5, 1)),
    "a piece is missing": _rewritten(
        lambda written: replace(
            written, boxes=written.boxes.take([0]), shard=written.shard[:1], start=written.start[:1]
        )
    ),
    "a value came for a tensor": lambda results: _values(lambda values: {**values, "b": 1})(
        _boxes(lambda box: [box] if box.name != "b" else [])(results)
    ),
    "a tensor came for a value": lambda results: _values(lambda values: {})(
        _boxes(lambda box: [box, box._replace(name="n", shape=(0,), sizes=(0,))])(results)
    ),
    "something came as both": _values(lambda values: {**values, "b": 1}),
    "no shard was reported": _rewritten(
        lambda written: replace(written, shard_sizes=written.shard_sizes[:0], digests=b"")
    ),
    "digests are missing": _rewritten(lambda written: replace(written, digests=written.digests[8:])),
    "a piece lies beyond its shard": _rewritten(lambda written: replace(written, start=written.start + 10**6)),
    "two pieces share bytes": _rewritten(lambda written: replace(written, start=written.start * 0 + written.start[0])),
    "nothing at all": lambda results: [],
    "no message": lambda results: [replace(result, storage_data=None) for result in results],
}


@pytest.mark.parametrize("tamper", TAMPERS.values(), ids=TAMPERS)
def test_results_that_differ_from_the_plan_are_refused_before_the_commit(
    tmp_path: Path, tamper: Callable[[list[WriteResult]], list[WriteResult]]
) -> None:
    class Writer(TamperingWriter):
        pass

    Writer.tamper = staticmethod(tamper)
    state = {"a": torch.ones(3), "b": torch.ones(5), "n": 1}

    error = failure(lambda: dcp.save(state, storage_writer=Writer(tmp_path / "c")))

    assert isinstance(error, SaveFailedError)
    assert not is_committed(tmp_path / "c")
    with pytest.raises(CheckpointNotFoundError):
        cloudckpt.read(tmp_path / "c")


class LyingPlanner(DefaultSavePlanner):
    """Resolves to something else than it planned."""

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return torch.ones(5, dtype=torch.float64)


def test_a_planner_that_resolves_to_another_dtype_than_it_planned_is_refused(tmp_path: Path) -> None:
    error = failure(
        lambda: dcp.save({"t": torch.ones(5)}, storage_writer=CloudWriter(tmp_path / "c"), planner=LyingPlanner())
    )
    assert isinstance(error, OptionsError)
    assert "a plan must describe what is written" in str(error)
    assert not is_committed(tmp_path / "c")


# -- pickles -----------------------------------------------------------------------------------------------------


def _stored(url: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(url)): path.read_bytes() for path in url.rglob("*") if path.is_file()}
    for name, data in list(found.items()):
        if name.endswith("index.bin"):
            # The header's frame; the section's follows it.
            frames = data[24:]
            found[name + " (header)"] = zstandard.ZstdDecompressor().decompress(frames)
            sections = frames[int.from_bytes(data[16:24], "little") :]
            found[name + " (section)"] = zstandard.ZstdDecompressor().decompress(sections)
    return found


def _looks_pickled(data: bytes) -> bool:
    is_stream = data[:1] == b"\x80" and data[1:2] in b"\x00\x01\x02\x03\x04\x05"
    return is_stream or b"PK\x03\x04" in data or b"data.pkl" in data or b"torch._utils" in data


@pytest.mark.parametrize("planner", [DefaultSavePlanner, HalfPlanner])
def test_no_pickle_reaches_the_store(tmp_path: Path, planner: type[DefaultSavePlanner]) -> None:
    assert _looks_pickled(pickle.dumps({"a": 1}))
    buffer = io.BytesIO()
    torch.save({"a": 1}, buffer)
    assert _looks_pickled(buffer.getvalue())
    zeros = {"t": torch.zeros(1000), "config": {"a": (1, None, b"x")}, "n": 1, "list": [1, {"b": torch.zeros(2)}]}
    dcp.save(zeros, storage_writer=CloudWriter(tmp_path / "c"), planner=planner())
    texts = _stored(tmp_path / "c")
    assert len(texts) == 5
    assert [name for name, data in texts.items() if _looks_pickled(data)] == []
    index = json.loads(next(data for name, data in texts.items() if name.endswith("(header)")))
    inner = [
        base64.b64decode(value["data"])
        for value in index["values"].values()
        if isinstance(value, dict) and "data" in value
    ]
    assert [data for data in inner if _looks_pickled(data)] == []


def test_nothing_that_was_read_from_the_store_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dcp.save(state_dict(), storage_writer=CloudWriter(tmp_path / "c"))
    stored = _stored(tmp_path / "c")
    unpickled: list[bytes] = []
    real = torch.load

    def spied(file: io.BytesIO, *arguments: object, **options: object) -> object:
        unpickled.append(file.getvalue())
        return real(file, *arguments, **options)  # type: ignore[arg-type]

    def forbidden(*arguments: object, **options: object) -> object:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(torch, "load", spied)
    monkeypatch.setattr(pickle, "load", forbidden)
    monkeypatch.setattr(pickle, "loads", forbidden)
    loaded = empty_state_dict()
    dcp.load(loaded, storage_reader=CloudReader(tmp_path / "c"))

    assert equal(loaded, state_dict())
    assert unpickled, "the stock planner asks for bytes"
    assert [data for data in unpickled if any(data in other for other in stored.values())] == []
    unpickled.clear()
    cloudckpt.load(empty_state_dict(), tmp_path / "c")
    cloudckpt.read(tmp_path / "c")
    assert unpickled == []


# -- resources and credentials -----------------------------------------------------------------------------------


def test_writer_and_reader_close_the_stores_that_they_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[RetryingStore] = []
    closed: list[RetryingStore] = []

    class Closing(RetryingStore):
        def close(self) -> None:
            closed.append(self)
            super().close()

    def remembered(*arguments: object, **options: object) -> RetryingStore:
        store = Closing(open_store(*arguments, **options).inner, Options().retry)  # type: ignore[arg-type]
        opened.append(store)
        return store

    monkeypatch.setattr("cloudckpt.dcp.address.open_store", remembered)
    state = {"t": torch.ones(3)}
    dcp.save(state, storage_writer=CloudWriter(tmp_path / "c"))
    failure(lambda: dcp.save({"t": torch.eye(2).to_sparse()}, storage_writer=CloudWriter(tmp_path / "d")))
    failure(lambda: dcp.save({"f": print}, storage_writer=CloudWriter(tmp_path / "d")))
    dcp.load(state, storage_reader=CloudReader(tmp_path / "c"))
    failure(lambda: dcp.load(state, storage_reader=CloudReader(tmp_path / "nothing")))

    assert len(opened) == 5
    assert set(closed) == set(opened)


@pytest.mark.parametrize("kind", [CloudWriter, CloudReader])
def test_a_writer_and_a_reader_pickle_without_connections_and_never_with_credentials(
    tmp_path: Path, kind: type[CloudWriter | CloudReader]
) -> None:
    dcp.save({"t": torch.ones(3)}, storage_writer=CloudWriter(tmp_path / "c"))
    again = pickle.loads(pickle.dumps(kind(tmp_path / ("d" if kind is CloudWriter else "c"))))
    target = {"t": torch.zeros(3)}
    if isinstance(again, CloudWriter):
        dcp.save({"t": torch.ones(3)}, storage_writer=again)
        again = CloudReader(tmp_path / "d")
    dcp.load(target, storage_reader=again)
    assert torch.equal(target["t"], torch.ones(3))

    with pytest.raises(OptionsError) as caught:
        pickle.dumps(kind("s3://bucket/x", storage_options={"key": "canary", "secret": "canary"}))
    assert "canary" not in str(caught.value)


# -- resharding --------------------------------------------------------------------------------------------------

Box = tuple[tuple[int, ...], tuple[int, ...]]


class GridSavePlanner(SavePlanner):
    """Plans one tensor as boxes, as if each were another rank's."""

    def __init__(self, tensor: torch.Tensor, boxes: Sequence[Box]) -> None:
        self.tensor = tensor
        self.boxes = boxes

    def set_up_planner(
        self, state_dict: dict[str, object], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None: ...

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(offsets, sizes) for offsets, sizes in self.boxes])

    def _item(self, offsets: Sequence[int], sizes: Sequence[int]) -> WriteItem:
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        properties = TensorProperties.create_from_tensor(self.tensor)
        data = TensorWriteData(chunk=chunk, properties=properties, size=self.tensor.size())
        return WriteItem(index=MetadataIndex("t", chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        first = all_plans[0].items[0].tensor_data
        assert first is not None
        chunks = [item.tensor_data.chunk for plan in all_plans for item in plan.items if item.tensor_data is not None]
        described = TensorStorageMetadata(properties=first.properties, size=first.size, chunks=chunks)
        return all_plans, Metadata(state_dict_metadata={"t": described})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data = write_item.tensor_data
        assert data is not None
        return cut(self.tensor, data.chunk.offsets, data.chunk.sizes)


class GridLoadPlanner(DefaultLoadPlanner):
    """Loads boxes of one tensor into tensors of their own."""

    def __init__(self, targets: Mapping[Box, torch.Tensor]) -> None:
        super().__init__()
        self.targets = targets

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata["t"]
        assert isinstance(saved, TensorStorageMetadata)
        wanted = [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes in self.targets
        ]
        return LoadPlan(create_read_items_for_chunk_list("t", saved, wanted))

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = next(
            target
            for (offsets, _), target in self.targets.items()
            if offsets == tuple(read_item.dest_index.offset or ())
        )
        return cut(target, read_item.dest_offsets, read_item.lengths)


def cut(tensor: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    for axis, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(axis, start, size)
    return tensor


def grid(shape: Sequence[int], cuts: Sequence[Sequence[int]]) -> list[Box]:
    """Return the boxes between cuts along each axis."""
    boxes: list[Box] = [((), ())]
    for size, at in zip(shape, cuts, strict=True):
        edges = [0, *sorted(set(at)), size]
        spans = [(start, stop - start) for start, stop in pairwise(edges)]
        boxes = [((*offsets, start), (*sizes, length)) for offsets, sizes in boxes for start, length in spans]
    return boxes


def reshard(url: str, tensor: torch.Tensor, saved: Sequence[Box], loaded: Sequence[Box], options: Options) -> None:
    """Save in some boxes, load in others, and compare every byte."""
    dcp.save({}, storage_writer=CloudWriter(url, options=options), planner=GridSavePlanner(tensor, saved))
    for is_transposed in (False, True):
        targets = {box: torch.full(box[1], -1, dtype=tensor.dtype) for box in loaded}
        if is_transposed:
            targets = {
                box: target.mT.contiguous().mT if target.dim() > 1 else target for box, target in targets.items()
            }
        dcp.load({}, storage_reader=CloudReader(url, options=options), planner=GridLoadPlanner(targets))
        for (offsets, sizes), target in targets.items():
            assert torch.equal(target, cut(tensor, offsets, sizes))


ROWS, COLUMNS = ((3, 4, 9), ()), ((), (1, 7))
WHOLE = ((), ())
TILES = ((5, 6), (2, 9))
PARTS = {"whole": WHOLE, "rows": ROWS, "columns": COLUMNS, "tiles": TILES}


@diagonal(
    "saved, loaded, options",
    [pytest.param(PARTS[name], id=name) for name in ("whole", "rows", "columns", "tiles")],
    [pytest.param(PARTS[name], id=name) for name in ("tiles", "whole", "rows", "columns")],
    [pytest.param(Options(), id="default"), pytest.param(CUT, id="cut")],
)
def test_what_was_saved_in_some_parts_loads_in_any_others(
    memory: Callable[[], str], saved: Sequence[Sequence[int]], loaded: Sequence[Sequence[int]], options: Options
) -> None:
    tensor = torch.arange(130, dtype=torch.int64).reshape(10, 13)
    reshard(memory(), tensor, grid((10, 13), saved), grid((10, 13), loaded), options)


@st.composite
def _shape_and_cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]], list[list[int]]]:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    cuts = [
        [draw(st.lists(st.integers(1, size - 1), max_size=3) if size > 1 else st.just([])) for size in shape]
        for _ in "12"
    ]
    return shape, cuts[0], cuts[1]


@settings(max_examples=examples(60), deadline=None)
@given(
    _shape_and_cuts(),
    st.sampled_from([torch.uint8, torch.int16, torch.int64]),
    st.integers(8, 200),
    st.integers(1, 40),
    st.integers(1, 3),
)
def test_any_grid_loads_as_any_other(
    memory: Callable[[], str],
    parts: tuple[tuple[int, ...], list[list[int]], list[list[int]]],
    dtype: torch.dtype,
    shard_bytes: int,
    block_bytes: int,
    blocks: int,
) -> None:
    shape, saved, loaded = parts
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int64).to(dtype).reshape(shape)
    options = Options(
        shard_bytes=shard_bytes, block_bytes=block_bytes, span_bytes=block_bytes * blocks, memory_budget_bytes=KIB
    )
    reshard(memory(), tensor, grid(shape, saved), grid(shape, loaded), options)
