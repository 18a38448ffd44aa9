"""A tensor without bytes of its own is waited for, or refused by name before a byte is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.testing._internal.two_tensor import TwoTensor

import cloudckpt
from cloudckpt import CheckpointManager, CloudReader, CloudWriter, OptionsError, UnsupportedValueError
from tests.ranks.processes import run

# DCP says so in every process that has no group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Marked(torch.Tensor):
    """Of a type of its own, with memory of its own."""


def two() -> torch.Tensor:
    tensor: torch.Tensor = TwoTensor(torch.ones(2, 3), torch.zeros(2, 3))
    return tensor


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def freed() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def part_of_another() -> torch.Tensor:
    tensor: Any = torch.ones(4)
    tensor.global_shape, tensor.global_offsets = (16,), ((4,),)
    tensor.local_offsets, tensor.local_sizes = ((0,),), ((4,),)
    return tensor  # type: ignore[no-any-return]


def module() -> nn.Module:
    made = nn.Linear(3, 2)
    made.weight = nn.Parameter(two())
    return made


BAD: dict[str, tuple[Callable[[], object], str, str]] = {
    "wrapper": (two, "TwoTensor", r"save what it consists of \(a, b\)"),
    "parameter": (lambda: nn.Parameter(two()), "TwoTensor", "no bytes of its own"),
    "in a list": (lambda: [1, {"k": two()}], "TwoTensor", "TwoTensor"),
    "in a tuple": (lambda: (two(), 2), "TwoTensor", "TwoTensor"),
    "fake": (fake, "FakeTensor", "it is a fake one"),
    "freed": (freed, "Tensor", "its storage was freed"),
    "part": (part_of_another, "CheckpointableTensor", "save a DTensor in its place"),
}


def save_with_dcp(state: dict[str, Any], url: Path) -> None:
    try:
        dcp.save(state, storage_writer=CloudWriter(url))
    except CheckpointException as exc:
        raise exc.failures[0][0] from exc


def save_async(state: dict[str, Any], url: Path) -> None:
    with CheckpointManager(url) as manager:
        manager.async_save(1, state)


@pytest.mark.parametrize("save", [cloudckpt.save, save_with_dcp, save_async])
@pytest.mark.parametrize("kind", BAD)
def test_a_tensor_without_bytes_of_its_own_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, kind: str, save: Callable[[dict[str, Any], Path], object]
) -> None:
    make, type_name, words = BAD[kind]
    with pytest.raises(UnsupportedValueError, match=words) as caught:
        save({"fine": torch.ones(1000), "bad": make()}, tmp_path / "c")
    assert caught.value.key.startswith("bad")
    assert caught.value.type_name.endswith(type_name)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_parameter_without_bytes_of_its_own_is_refused_by_its_name_in_the_module(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedValueError, match=r"tensor 'model\.weight' is a TwoTensor"):
        cloudckpt.save({"model": module()}, tmp_path / "c")


def test_a_subclass_with_memory_of_its_own_is_saved_like_any_tensor(tmp_path: Path) -> None:
    state: dict[str, Any] = {"t": torch.arange(5.0).as_subclass(Marked)}
    cloudckpt.save(state, tmp_path / "c")
    live: dict[str, Any] = {"t": torch.zeros(5).as_subclass(Marked)}
    cloudckpt.load(live, tmp_path / "c")
    assert torch.equal(live["t"], state["t"])


def test_a_live_tensor_without_memory_of_its_own_is_refused_by_name_and_nothing_is_restored(tmp_path: Path) -> None:
    cloudckpt.save({"a": torch.ones(3), "b": torch.ones(2, 3)}, tmp_path / "c")
    live: dict[str, Any] = {"a": torch.zeros(3), "b": two()}
    with pytest.raises(OptionsError, match="'b' is a TwoTensor in the state"):
        cloudckpt.load(live, tmp_path / "c")
    assert torch.equal(live["a"], torch.zeros(3))


def _save_what_is_under_way(root: str) -> list[bool]:
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for how in ("ours", "dcp"):
        pending = all_reduce(torch.full((1000,), 1.0 + dist.get_rank()), "sum", mesh.get_group())
        local = all_reduce(torch.full((2, 3), 1.0), "sum", mesh.get_group())
        assert isinstance(pending, AsyncCollectiveTensor)
        state: dict[str, Any] = {"t": pending, "d": DTensor.from_local(local, mesh, [Shard(0)], run_check=False)}
        if how == "ours":
            cloudckpt.save(state, f"{root}/{how}")
        else:
            dcp.save(state, storage_writer=CloudWriter(f"{root}/{how}"))
        whole: dict[str, Any] = {"t": torch.zeros(1000), "d": torch.zeros(4, 3)}
        dcp.load(whole, storage_reader=CloudReader(f"{root}/{how}"))
        found += [bool((whole["t"] == 3).all()), bool((whole["d"] == 2).all())]
    return found


def test_the_result_of_a_collective_that_is_under_way_is_waited_for_and_saved(tmp_path: Path) -> None:
    assert run(2, _save_what_is_under_way, str(tmp_path)) == [[True] * 4] * 2


def _save_a_dtensor_of_wrappers(root: str) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    state = {"d": DTensor.from_local(two(), mesh, [Shard(0)], run_check=False)}
    found = []
    for save in (cloudckpt.save, save_with_dcp):
        with pytest.raises(UnsupportedValueError, match="'d' is a TwoTensor") as caught:
            save(state, Path(root) / "c")
        found.append(caught.value.key)
    return found


def test_a_dtensor_of_parts_without_bytes_of_their_own_is_refused(tmp_path: Path) -> None:
    assert run(2, _save_a_dtensor_of_wrappers, str(tmp_path)) == [["d", "d"]] * 2
    assert not list(tmp_path.rglob("*.safetensors"))


def _of_shards(value: float) -> dict[str, Any]:
    """Return a DTensor of five rows: two shards on rank 0, one on rank 1, as torchrec has them."""
    mesh = init_device_mesh("cpu", (2,))
    if dist.get_rank() == 0:
        parts = LocalShardsWrapper([torch.full((2, 3), value), torch.full((1, 3), 2 * value)], [(0, 0), (2, 0)])
    else:
        parts = LocalShardsWrapper([torch.full((2, 3), 3 * value)], [(3, 0)])
    whole = {"shape": torch.Size((5, 3)), "stride": (3, 1)}
    return {"d": DTensor.from_local(parts, mesh, [Shard(0)], run_check=False, **whole)}


def _save_shards(root: str) -> list[list[float]]:
    found = []
    for save in (cloudckpt.save, save_with_dcp):
        url = Path(root) / save.__name__
        save(_of_shards(1.0), url)
        state = _of_shards(0.0)
        cloudckpt.load(state, url)
        found.append([float(shard[0, 0]) for shard in state["d"].to_local().local_shards()])
        state = _of_shards(0.0)
        dcp.load(state, storage_reader=CloudReader(url))
        found.append([float(shard[0, 0]) for shard in state["d"].to_local().local_shards()])
    return found


def test_a_tensor_that_tells_dcp_of_its_parts_is_saved_and_restored_part_by_part(tmp_path: Path) -> None:
    assert run(2, _save_shards, str(tmp_path)) == [[[1.0, 2.0]] * 4, [[3.0]] * 4]
