"""What several ranks hold of one name is the same on all of them, to the bit, or the save names it, writing nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import cloudckpt
from cloudckpt import CheckpointManager, Options, PerRank, SaveFailedError
from cloudckpt.saving import replicas as module
from cloudckpt.saving.dedup import Replicas
from cloudckpt.saving.replicas import digests_of_sets
from tests.effort import examples
from tests.ranks.processes import run

CALM = Options(progress_timeout_s=60)


def told(call: Callable[[], object]) -> str:
    """Return what a call is refused with, "" if it is not refused."""
    try:
        call()
    except SaveFailedError as exc:
        return str(exc)
    return ""


def save(url: str, state: dict[str, Any]) -> str:
    return told(lambda: cloudckpt.save(state, url, options=CALM))


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


# -- digests ----------------------------------------------------------------------------------------------------


def digest(*tensors: torch.Tensor, turn: int = 0, is_first: bool = False) -> bytes:
    alike = Replicas(3, 0, np.arange(len(tensors), dtype=np.int64))
    return digests_of_sets([alike], lambda row: tensors[row], turn=turn, is_first=is_first)[3]


@given(
    st.lists(st.integers(1, 9), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int64]),
    st.integers(0, 5),
    st.data(),
)
@settings(max_examples=examples(100), deadline=None)
def test_a_digest_follows_the_elements_and_not_how_they_lie(
    shape: list[int], dtype: torch.dtype, turn: int, data: st.DataObject
) -> None:
    tensor = torch.randint(0, 100, shape).to(dtype)
    order = data.draw(st.permutations(range(len(shape))))
    back = [order.index(axis) for axis in range(len(shape))]
    strided = tensor.permute(order).contiguous().permute(back)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_BYTES", 64)
        patch.setattr(module, "_AGAIN_BYTES", data.draw(st.sampled_from([1, 100, 10_000])))
        assert digest(strided, turn=turn) == digest(tensor, turn=turn)


def test_a_conjugated_tensor_counts_as_what_it_stands_for() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    assert digest(tensor.conj()) == digest(torch.tensor([1 - 2j, 3 + 4j]))
    assert digest(tensor.conj().imag) == digest(torch.tensor([-2.0, 4.0]))


def test_tensors_of_a_device_are_copied_together_and_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(module, "_BATCH_BYTES", 200)
    tensors = [torch.tensor(3), torch.randn(40, 3).t(), torch.tensor([True]), torch.randn(7).to(torch.complex64).conj()]
    for turn in range(3):
        parts = list(module._parts(tensors, turn=turn, limit_bytes=200))
        batches = [bytes(batch) for batch in module._device_bytes(iter(parts))]
        assert b"".join(batches) == b"".join(map(bytes, map(module._host_bytes, parts)))
        assert max(map(len, batches)) < 200 + 64


@pytest.mark.parametrize("is_strided", [False, True])
def test_every_element_of_a_large_tensor_counts_once_all_turns_were_taken(
    monkeypatch: pytest.MonkeyPatch, is_strided: bool
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(module, "_AGAIN_BYTES", 256)
    first, large = torch.zeros(30, 5), torch.zeros(50, 6)
    if is_strided:
        large = large.t().contiguous().t()
    turns = -(-large.nbytes - first.nbytes) // 256 + 1
    before = [digest(first, large, turn=turn) for turn in range(7, 7 + turns)]
    for row in range(50):
        changed = large.clone()
        changed[row, row % 6] = 1
        after = [digest(first, changed, turn=turn) for turn in range(7, 7 + turns)]
        assert after != before


def test_small_tensors_count_whole_at_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(module, "_AGAIN_BYTES", 64)
    small, large = [torch.zeros(16) for _ in range(9)], torch.zeros(4096)
    for turn in range(8):
        before = digest(*small, large, turn=turn)
        for number in range(9):
            changed = [tensor.clone() for tensor in small]
            changed[number][15] = 1
            assert digest(*changed, large, turn=turn) != before


def test_every_element_counts_at_once_where_ranks_have_not_compared_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(module, "_AGAIN_BYTES", 64)
    large = torch.zeros(300)
    for element in range(300):
        changed = large.clone()
        changed[element] = 1
        assert digest(changed, is_first=True) != digest(large, is_first=True)


def test_what_is_compared_of_large_tensors_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1024)
    tensors = [torch.zeros(10_000) for _ in range(5)]
    for turn in range(30):
        parts = list(module._parts(tensors, turn=turn, limit_bytes=8192))
        assert 0 < sum(part.stop - part.start for part in parts) * 4 <= 8192


# -- ranks --------------------------------------------------------------------------------------------------------


def rank_s_own(kind: str) -> dict[str, Any]:
    """Return a state that differs between ranks in one place of each kind."""
    rank = dist.get_rank()
    if kind == "scalar":
        return {"alike": torch.ones(3), "best": torch.tensor(float(rank))}
    if kind == "last bit":
        tensor = torch.zeros(100_000)
        tensor.view(torch.int32)[-1] = rank
        return {"alike": torch.ones(3), "best": tensor}
    if kind == "negative zero":
        return {"alike": torch.ones(3), "best": torch.tensor([0.0 if rank else -0.0])}
    if kind == "strided":
        return {"alike": torch.ones(3), "best": torch.full((4, 5), float(rank)).t()}
    if kind == "dtensor":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return {
            "alike": DTensor.from_local(torch.ones(3), mesh, [Replicate()], run_check=False),
            "best": DTensor.from_local(torch.full((3,), float(rank)), mesh, [Replicate()], run_check=False),
        }
    generator = torch.Generator().manual_seed(rank)
    return {"alike": torch.ones(3), "best": Holder({"state": generator.get_state()})}


class Holder:
    """An object with a state."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def save_what_differs(url: str, kind: str) -> list[str]:
    state = rank_s_own(kind)
    found = [save(f"{url}/c", state)]
    with CheckpointManager(f"{url}/root", options=CALM) as manager:
        found.append(told(lambda: manager.save(1, state)))
        found.append(told(lambda: manager.async_save(2, state)))
    return found


@pytest.mark.parametrize("kind", ["scalar", "last bit", "negative zero", "strided", "dtensor", "generator"])
def test_a_tensor_that_differs_between_ranks_is_named_with_them_and_nothing_is_written(
    tmp_path: Path, kind: str
) -> None:
    for found in run(2, save_what_differs, str(tmp_path), kind):
        for text in found:
            assert "'best" in text
            assert "differs between rank 0 and rank 1" in text
            assert "cloudckpt.PerRank" in text
            assert "alike'" not in text
    assert [name for name in files(tmp_path) if not name[0].isdigit()] == []


def save_one_after_the_other(url: str) -> list[str]:
    rank = dist.get_rank()
    state = {"a": torch.zeros(3), "b": torch.zeros(5)}
    found = []
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(1, state)
        for step, value in ((2, float(rank)), (3, 7.0)):
            state["b"][4] = value
            found.append(told(lambda step=step: manager.save(step, state)))  # type: ignore[misc]
            found.append(told(lambda step=step: manager.async_save(10 + step, state)))  # type: ignore[misc]
            manager.wait()
    return found


def test_a_plan_that_is_used_again_still_compares(tmp_path: Path) -> None:
    for found in run(2, save_one_after_the_other, str(tmp_path)):
        for text in found[:2]:
            assert "'b' (float32 (5,)) differs between rank 0 and rank 1" in text
        assert found[2:] == ["", ""]
    with CheckpointManager(tmp_path) as manager:
        assert [one.step for one in manager.checkpoints()] == [1, 3, 13]


def save_until_it_is_found(url: str) -> list[str]:
    """Let one element in the middle of a large tensor go another way on rank 1, after a save."""
    module._AGAIN_BYTES = 1 << 20
    state = {"w": torch.zeros(1 << 20)}
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(0, state)
        state["w"][700_000] = dist.get_rank()
        return [told(lambda step=step: manager.save(step, state)) for step in range(1, 5)]  # type: ignore[misc]


def test_every_block_of_a_large_tensor_has_its_turn_within_a_few_saves(tmp_path: Path) -> None:
    for found in run(2, save_until_it_is_found, str(tmp_path)):
        assert sum("'w' (float32 (1048576,)) differs between rank 0 and rank 1" in text for text in found) == 1


def save_on_a_grid(url: str, changed: int) -> str:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "part"))
    local = torch.arange(6.0).reshape(3, 2) + 10 * (rank % 2)
    if rank == changed:
        local[2, 1] += 1
    sharded = DTensor.from_local(local, mesh, [Replicate(), Shard(0)], run_check=False)
    return save(url, {"w": sharded, "step": torch.tensor(3.0)})


@pytest.mark.parametrize("changed", [2, 3])
def test_replicas_of_shards_are_compared_among_those_that_hold_them(tmp_path: Path, changed: int) -> None:
    for text in run(4, save_on_a_grid, str(tmp_path), changed):
        where = f"the box of (3, 2) at ({3 * (changed % 2)}, 0) of 'w' (float32 (6, 2))"
        assert f"{where} differs between rank {changed - 2} and rank {changed}." in text
        assert "step" not in text
    assert files(tmp_path) == []


def save_beside_another_order(url: str) -> str:
    names = ["a", "b", "c"] if dist.get_rank() else ["c", "a", "b"]
    return save(url, {name: torch.full((4,), float(ord(name))) for name in names})


def test_ranks_that_name_the_tensors_in_another_order_are_alike(tmp_path: Path) -> None:
    assert run(2, save_beside_another_order, str(tmp_path)) == ["", ""]


def save_many_that_differ(url: str) -> str:
    return save(url, {f"t{number:02}": torch.tensor(dist.get_rank()) for number in range(20)})


def test_at_most_eight_tensors_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    for text in run(3, save_many_that_differ, str(tmp_path)):
        assert sum(f"'t{number:02}'" in text for number in range(20)) == 8
        assert "differs between rank 0 and rank 1 and rank 2" in text
        assert "; and 12 more. " in text


def save_each_its_own(url: str) -> list[int]:
    rank = dist.get_rank()
    holder = Holder({"state": torch.tensor([rank, rank])})
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(1, {"alike": torch.ones(2), "own": PerRank(holder)})
        fresh = Holder({})
        manager.restore({"alike": torch.zeros(2), "own": PerRank(fresh)})
    return list(fresh.state["state"].tolist())


def test_what_is_each_ranks_own_is_saved_as_such(tmp_path: Path) -> None:
    assert run(2, save_each_its_own, str(tmp_path)) == [[0, 0], [1, 1]]


def sample_other_blocks(url: str) -> Sequence[str]:
    """Play ranks that hold a tensor on different devices, of which other numbers of bytes are compared."""
    module._FIRST_BYTES = (1 << 20) if dist.get_rank() else (2 << 20)
    state = {"w": torch.arange(2.0 * (1 << 20))}
    found = [save(f"{url}/1", state)]
    state["w"][-1] = dist.get_rank()
    return [*found, save(f"{url}/2", state)]


def test_digests_of_different_samples_refuse_nothing_that_is_alike(tmp_path: Path) -> None:
    for found in run(2, sample_other_blocks, str(tmp_path)):
        assert found[0] == ""
        assert "'w' (float32 (2097152,)) differs between rank 0 and rank 1" in found[1]


def test_a_single_element_of_any_stride_is_bytes_on_every_device() -> None:
    part = module._Part(torch.arange(2.0)[::2], 0, 1)
    assert [bytes(batch) for batch in module._device_bytes(iter([part]))] == [bytes(4)]
