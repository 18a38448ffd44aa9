"""A DTensor of a mesh that only some ranks are in: the others know its name, and hold none of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import cloudckpt
from cloudckpt import CheckpointManager, CloudReader, CloudWriter, Options
from tests.ranks.processes import run

HALVES = ([0, 1], [2, 3])


def _state(value: float) -> dict[str, Any]:
    """Return tensors of every kind on each half of four ranks, and a plain one, which every rank names."""
    state: dict[str, Any] = {"plain": torch.full((3,), value)}
    for number, ranks in enumerate(HALVES):
        mesh = DeviceMesh("cpu", ranks)
        full = value * torch.arange(14.0).reshape(7, 2) + 100 * number * bool(value)
        state |= {
            f"rows{number}": distribute_tensor(full, mesh, [Shard(0)]),
            f"columns{number}": distribute_tensor(full[:, 1], mesh, [Shard(0)]),
            f"replicated{number}": distribute_tensor(full, mesh, [Replicate()]),
            f"scalar{number}": distribute_tensor(full[1, 1], mesh, [Replicate()]),
            f"thin{number}": distribute_tensor(full[:1], mesh, [Shard(0)]),  # empty on a rank of the mesh
        }
    return state


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is(state: dict[str, Any], value: float) -> bool:
    return all(torch.equal(_local(state[name]), _local(tensor)) for name, tensor in _state(value).items())


def _save(state: dict[str, Any], url: str, how: str) -> str:
    if how == "dcp":
        dcp.save(state, storage_writer=CloudWriter(url))
        return url
    if how == "save":
        return cloudckpt.save(state, url).url
    with CheckpointManager(url) as manager:
        saved = manager.async_save(1, state).result()
    assert saved is not None
    return saved.url


def _go_around(root: str, how: str) -> list[bool]:
    url = _save(_state(2.0), f"{root}/c", how)
    found = []
    for read_once in ("never", "always"):
        state = _state(0.0)
        cloudckpt.load(state, url, options=Options(read_once=read_once))  # type: ignore[arg-type]
        found.append(_is(state, 2.0))
    state = _state(0.0)
    dcp.load(state, storage_reader=CloudReader(url))
    whole = cloudckpt.read(url)
    expected = [torch.equal(whole[f"rows{half}"], _full(half)) for half in (0, 1)]  # type: ignore[arg-type]
    dist.barrier()
    return [*found, _is(state, 2.0), *expected]


def _full(half: int) -> torch.Tensor:
    return 2.0 * torch.arange(14.0).reshape(7, 2) + 100 * half


@pytest.mark.parametrize("how", ["save", "async", "dcp"])
def test_what_lies_on_half_of_the_ranks_is_restored_there_and_the_others_hold_none_of_it(
    tmp_path: Path, how: str
) -> None:
    assert run(4, _go_around, str(tmp_path), how) == [[True] * 5] * 4
