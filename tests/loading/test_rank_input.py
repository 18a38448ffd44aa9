"""What people get wrong with several ranks, and what each rank asks of the store: every rank has the same answer."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import cloudckpt
from cloudckpt import (
    AccessDeniedError,
    CheckpointManager,
    IntegrityError,
    Options,
    OptionsError,
    RankLostError,
    SaveFailedError,
    StateMismatchError,
)
from cloudckpt.options import KIB, MIB
from cloudckpt.store import Intake
from raw_access import FreshPrefix
from tests.effort import diagonal
from tests.ranks.models import build
from tests.ranks.processes import World, run

CALM = Options(progress_timeout_s=60)
SHORT_S = 2.0


def _rank() -> int:
    return dist.get_rank()


def _error(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as exc:  # noqa: BLE001 (it is what the test looks at)
        return exc
    return None


def _steps(url: str, **storage: Any) -> list[int]:
    """List what is committed, in a process without a group."""
    with CheckpointManager(url, **storage) as manager:
        return [checkpoint.step for checkpoint in manager.checkpoints()]


def _files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


# -- calls that are wrong -----------------------------------------------------------------------------------


def test_several_ranks_without_a_process_group_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    monkeypatch.setenv("WORLD_SIZE", "2")
    calls: list[Callable[[], object]] = [
        lambda: CheckpointManager(root),
        lambda: cloudckpt.save({"w": torch.ones(2)}, root),
    ]
    for call in calls:
        with pytest.raises(OptionsError, match="init_process_group"):
            call()
    assert not root.exists()


def _save_made(url: str, make: Callable[[], tuple[int, dict[str, Any]]]) -> Exception | None:
    step, state = make()
    with CheckpointManager(url, options=CALM) as manager:
        return _error(lambda: manager.save(step, state))


def _other_value() -> tuple[int, dict[str, Any]]:
    return 1, {"w": torch.ones(4), "lr": 0.5 if _rank() == 1 else 0.25, "alike": 1}


def _missing_value() -> tuple[int, dict[str, Any]]:
    return 1, {"w": torch.ones(4), "alike": 1} | ({} if _rank() == 1 else {"lr": 0.25})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_other_value, "'lr' differs between ranks 0, 2 and rank 1"),
        (_missing_value, "'lr' is missing on rank 1"),
    ],
)
def test_values_that_differ_are_named_with_their_ranks_and_nothing_is_written(
    tmp_path: Path, make: Callable[[], tuple[int, dict[str, Any]]], said: str
) -> None:
    for error in run(3, _save_made, str(tmp_path), make):
        assert isinstance(error, SaveFailedError)
        assert said in str(error)
        assert "alike" not in str(error)
    assert _files(tmp_path) == []


def _other_step() -> tuple[int, dict[str, Any]]:
    return (2 if _rank() == 2 else 1), {"w": torch.ones(4)}


def test_ranks_that_save_different_steps_are_told_so_and_nothing_is_written(tmp_path: Path) -> None:
    for error in run(3, _save_made, str(tmp_path), _other_step):
        assert isinstance(error, OptionsError)
        for word in ("rank 0 is at 'save of step 1", "rank 2 at 'save of step 2"):
            assert word in str(error)
    assert _files(tmp_path) == []


def _save_here_restore_there(url: str) -> Exception | None:
    state = {"w": torch.ones(4)}
    with CheckpointManager(url, options=CALM) as manager:
        return _error(lambda: manager.restore(state) if _rank() == 1 else manager.save(1, state))


def test_ranks_of_which_some_save_and_others_restore_are_told_so_and_nothing_is_written(tmp_path: Path) -> None:
    for error in run(3, _save_here_restore_there, str(tmp_path)):
        assert isinstance(error, OptionsError)
        for word in ("rank 0 is at 'save of step 1", "rank 1 at 'restore of latest"):
            assert word in str(error)
    assert _files(tmp_path) == []


# -- tensors that do not fit together -----------------------------------------------------------------------


def _other_shape() -> tuple[int, dict[str, Any]]:
    return 1, {"v": torch.ones(3), "w": torch.ones(5 if _rank() == 2 else 4)}


def _other_dtype() -> tuple[int, dict[str, Any]]:
    return 1, {"v": torch.ones(3), "w": torch.ones(4, dtype=torch.float64 if _rank() == 2 else torch.float32)}


def _other_dtype_of_equal_size() -> tuple[int, dict[str, Any]]:
    return 1, {"v": torch.ones(3), "w": torch.ones(4, dtype=torch.bfloat16 if _rank() == 2 else torch.float16)}


@pytest.mark.parametrize("make", [_other_shape, _other_dtype, _other_dtype_of_equal_size])
def test_a_tensor_of_another_shape_or_dtype_on_one_rank_is_named_with_the_rank_and_no_shard_is_written(
    tmp_path: Path, make: Callable[[], tuple[int, dict[str, Any]]]
) -> None:
    for error in run(3, _save_made, str(tmp_path), make):
        assert isinstance(error, SaveFailedError)
        assert " w is " in str(error)
        assert " v is " not in str(error)
        assert "on ranks 0-1 and " in str(error)
        assert " on rank 2" in str(error)
    assert [name for name in _files(tmp_path) if not name.startswith("epochs/")] == []


def _missing_tensor() -> tuple[int, dict[str, Any]]:
    model = dict(build("fsdp2", "tall", 1).module.state_dict())
    if _rank() == 1:
        del model["layers.3.weight"]
    return 1, {"model": model}


def test_a_tensor_that_one_rank_of_a_sharded_model_lacks_is_named_and_nothing_is_committed(tmp_path: Path) -> None:
    for error in run(3, _save_made, str(tmp_path), _missing_tensor):
        assert isinstance(error, SaveFailedError)
        assert "model.layers.3.weight" in str(error)
    assert _steps(str(tmp_path)) == []


# -- stores that refuse one rank ----------------------------------------------------------------------------


def _save_with_wrong_keys(url: str, options: dict[str, Any], rank: int) -> Exception | None:
    wrong = {**options, "key": "AKIAWRONGWRONG", "secret": "canary-secret-canary"}
    given = wrong if _rank() == rank else options
    with CheckpointManager(url, storage_options=given, options=CALM) as manager:
        return _error(lambda: manager.save(1, {"w": torch.ones(4)}))


def test_a_rank_that_the_store_denies_is_named_on_every_rank_and_nothing_is_committed(s3_url: FreshPrefix) -> None:
    options = dict(s3_url.storage_options)
    for error in run(3, _save_with_wrong_keys, s3_url.url, options, 1):
        assert isinstance(error, SaveFailedError)
        assert error.failures.keys() == {1}
        denied = error.failures[1]
        assert isinstance(denied, AccessDeniedError)
        assert (denied.op, "/r00001-" in denied.key) == ("put", True)
        assert "rank 1" in str(error)
        assert "canary-secret-canary" not in f"{error!r} {denied!r}"
    assert _steps(s3_url.url, storage_options=options) == []


def test_what_rank_0_is_denied_for_all_is_raised_as_it_is_on_every_rank(s3_url: FreshPrefix) -> None:
    options = dict(s3_url.storage_options)
    for error in run(3, _save_with_wrong_keys, s3_url.url, options, 0):
        assert isinstance(error, AccessDeniedError)
        assert "canary-secret-canary" not in repr(error)
    assert _steps(s3_url.url, storage_options=options) == []


# -- ranks that do not come ---------------------------------------------------------------------------------


def _save_without(url: str, absent: int) -> Exception | None:
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(0, {"w": torch.zeros(4)})
        manager._saves.options = Options(progress_timeout_s=SHORT_S)
        dist.barrier()
        if _rank() == absent:
            time.sleep(60)  # its process is ended by the test
        return _error(lambda: manager.save(1, {"w": torch.ones(4)}))


def test_ranks_that_never_call_save_are_named_after_the_deadline(tmp_path: Path) -> None:
    worlds = {absent: World(3, _save_without, str(tmp_path / str(absent)), absent) for absent in (0, 2)}
    found = {absent: world.outcomes(timeout_s=40, but=[absent]) for absent, world in worlds.items()}
    for absent, outcomes in found.items():
        for outcome in outcomes:
            if outcome.rank == absent:
                continue
            assert isinstance(outcome.value, SaveFailedError), outcome
            assert outcome.value.failures.keys() == {absent}
            assert isinstance(outcome.value.failures[absent], RankLostError)
            assert f"rank {absent}" in str(outcome.value)
        assert _steps(str(tmp_path / str(absent))) == [0]


# -- restores that do not fit -------------------------------------------------------------------------------


def _restore_misfit(url: str) -> tuple[Exception | None, dict[str, Any]]:
    state: dict[str, Any] = {"w": torch.full((4,), -1.0), "v": torch.full((3,), -1.0), "config": {"lr": -1}}
    if _rank() == 1:
        state["w"] = torch.full((5,), -1.0)
    with CheckpointManager(url, options=CALM) as manager:
        error = _error(lambda: manager.restore(state))
    return error, state


def test_a_state_that_does_not_fit_on_one_rank_is_refused_on_all_and_changed_on_none(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": torch.ones(4), "v": torch.ones(3), "config": {"lr": 1}})
    for rank, (error, state) in enumerate(run(3, _restore_misfit, str(tmp_path))):
        assert isinstance(error, StateMismatchError)
        assert error.mismatched == {"w": ((5,), (4,))}
        assert "on rank 1" in getattr(error, "__notes__", [])
        assert torch.equal(state["w"], torch.full((5 if rank == 1 else 4,), -1.0))
        assert torch.equal(state["v"], torch.full((3,), -1.0))
        assert state["config"] == {"lr": -1}


# -- damage that one rank meets -----------------------------------------------------------------------------


def _flip(path: Path) -> None:
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _remove(path: Path) -> None:
    path.unlink()


def _sharded(step: int) -> dict[str, Any]:
    full = torch.arange(30_000.0).reshape(300, 100) + step
    return {"w": distribute_tensor(full, init_device_mesh("cpu", (3,)), [Shard(0)]), "step": step}


def _save_sharded(url: str) -> None:
    with CheckpointManager(url, options=CALM) as manager:
        for step in (1, 2):
            manager.save(step, _sharded(step))


@dataclass
class Restored:
    """What one rank has after a restore."""

    identity: tuple[Any, ...] = ()
    value: object = None
    is_right: bool = False
    error: Exception | None = None


def _restore_sharded(url: str) -> Restored:
    state = _sharded(-5)
    with CheckpointManager(url, options=CALM) as manager:
        try:
            checkpoint = manager.restore(state)
        except IntegrityError as exc:
            return Restored(error=exc)
    assert checkpoint is not None
    wanted = _sharded(checkpoint.step)["w"]
    assert isinstance(state["w"], DTensor)
    is_right = torch.equal(state["w"].to_local(), wanted.to_local())
    identity = (checkpoint.step, checkpoint.epoch, checkpoint.attempt, checkpoint.url, checkpoint.digest)
    return Restored(identity, state["step"], is_right)


@diagonal("damage, rank", [_flip, _remove], [0, 2])
def test_a_shard_that_is_corrupt_for_one_rank_takes_all_to_the_same_older_checkpoint(
    tmp_path: Path, damage: Callable[[Path], None], rank: int
) -> None:
    run(3, _save_sharded, str(tmp_path))
    (shard,) = tmp_path.glob(f"step-0000000002-*/*/r{rank:05d}-*.safetensors")
    damage(shard)
    found = run(3, _restore_sharded, str(tmp_path))
    with CheckpointManager(tmp_path) as manager:
        older = manager.checkpoints()[0]
    identity = (1, older.epoch, older.attempt, older.url, older.digest)
    assert found == [Restored(identity, 1, is_right=True)] * 3


def test_all_ranks_raise_when_every_checkpoint_is_corrupt_for_some_rank(tmp_path: Path) -> None:
    run(3, _save_sharded, str(tmp_path))
    for step, rank in ((1, 0), (2, 2)):
        (shard,) = tmp_path.glob(f"step-{step:010d}-*/*/r{rank:05d}-*.safetensors")
        _flip(shard)
    for restored in run(3, _restore_sharded, str(tmp_path)):
        assert isinstance(restored.error, IntegrityError)
        assert "step-0000000002" in str(restored.error)  # the newest one's


# -- what each rank asks of the store -----------------------------------------------------------------------


@dataclass
class Asked:
    """The requests of one rank: how many of each verb, the keys of reads, and the bytes that were got."""

    verbs: Mapping[str, int]
    keys: list[str] = field(default_factory=list)
    got_bytes: int = 0


class Ear:
    """Listens at the store's seam."""

    def __init__(self, manager: CheckpointManager) -> None:
        self._manager = manager
        self._before = manager._store.stats()
        self._keys: list[str] = []
        self._got_bytes = 0
        inner: Any = manager._store.inner  # type: ignore[attr-defined]
        self._stream, self._read = inner.stream, inner.read
        inner.stream, inner.read = self._note_stream, self._note_read

    def _note_stream(self, key: str, *, start: int, stop: int, into: Intake) -> None:
        self._keys.append(key)
        self._got_bytes += stop - start
        self._stream(key, start=start, stop=stop, into=into)

    def _note_read(self, key: str, *, limit_bytes: int) -> bytes:
        self._keys.append(key)
        data: bytes = self._read(key, limit_bytes=limit_bytes)
        return data

    def heard(self) -> Asked:
        spent = self._manager._store.stats() - self._before
        return Asked({verb: spent[verb].requests for verb in spent}, self._keys, self._got_bytes)


def _save_and_restore_listening(url: str) -> tuple[Asked, Asked, Asked]:
    with CheckpointManager(url, options=CALM) as manager:
        heard = []
        for step in (1, 2):
            ear = Ear(manager)
            manager.save(step, _sharded(step))
            heard.append(ear.heard())
    with CheckpointManager(url, options=CALM) as manager:
        ear = Ear(manager)
        manager.restore(_sharded(-5))
        return heard[0], heard[1], ear.heard()


def test_only_rank_0_lists_and_reads_manifests_and_indexes(tmp_path: Path) -> None:
    found = run(3, _save_and_restore_listening, str(tmp_path))
    for asked in (asked for of_rank in found[1:] for asked in of_rank[:2]):
        assert asked.verbs == {"put": 1}
    for *_, asked in found[1:]:
        assert asked.verbs.keys() == {"get"}
        assert {key.endswith(".safetensors") for key in asked.keys} == {True}
    _, again, restored = found[0]
    assert (again.verbs["put"], again.verbs["create"]) == (2, 1)  # its shard, the index, and the manifest
    read = Counter(key.rpartition("/")[2] for key in restored.keys if not key.endswith(".safetensors"))
    assert read == {"manifest.json": 1, "index.bin": 1}
    assert restored.verbs["list"] == 1


# -- what several ranks need is read once -------------------------------------------------------------------

SMALL = {
    "shard_bytes": MIB,
    "block_bytes": 64 * KIB,
    "span_bytes": 256 * KIB,
    "memory_budget_bytes": 16 * MIB,
    "progress_timeout_s": 60,
}


def _replicated(seed: int) -> dict[str, Any]:
    """Tensors of many sizes, dtypes and strides: what is passed on must fit into each of them."""
    generator = torch.Generator().manual_seed(seed)
    large = {f"large{number}": torch.randn(384, 1024, generator=generator) for number in range(6)}
    turned = torch.randn(257, 129, generator=generator)
    odd = {
        "turned": turned if seed % 2 else turned.T.contiguous().T,
        "half": torch.randn(33, 7, generator=generator).to(torch.bfloat16),
        "flags": torch.rand(1001, generator=generator) > 0.5,
        "scalar": torch.tensor(float(seed)),
        "nothing": torch.empty(0, 4),
        "column": torch.randn(5, 3, generator=generator)[:, 1],
    }
    small = {f"small{number}": torch.randn(17, generator=generator) for number in range(50)}
    return {"tensors": {**large, **odd, **small}, "seed": seed}


def _is_replicated_state(state: dict[str, Any], seed: int) -> bool:
    wanted = _replicated(seed)
    found = state["tensors"]
    are_equal = [torch.equal(found[name], tensor) for name, tensor in wanted["tensors"].items()]
    return all(are_equal) and found.keys() == wanted["tensors"].keys() and state["seed"] == seed


def _save_replicated(url: str, steps: tuple[int, ...]) -> None:
    with CheckpointManager(url, options=Options(**SMALL)) as manager:  # type: ignore[arg-type]
        for step in steps:
            manager.save(step, _replicated(step))


def _restore_replicated(url: str, read_once: str) -> tuple[int, int, int, bool]:
    """Return the step, the checkpoint's bytes, those that this rank got, and whether all is right."""
    state = _replicated(1000 + _rank())
    with CheckpointManager(url, options=Options(read_once=read_once, **SMALL)) as manager:  # type: ignore[arg-type]
        ear = Ear(manager)
        checkpoint = manager.restore(state)
        got_bytes = ear.heard().got_bytes
    assert checkpoint is not None
    return checkpoint.step, checkpoint.total_bytes, got_bytes, _is_replicated_state(state, checkpoint.step)


@pytest.mark.parametrize(("read_once", "least", "most"), [("always", 0.99, 1.3), ("never", 3.9, 4.3)])
def test_what_all_ranks_need_is_read_from_the_store_as_often_as_was_asked_for(
    tmp_path: Path, read_once: str, least: float, most: float
) -> None:
    run(4, _save_replicated, str(tmp_path), (1,))
    found = run(4, _restore_replicated, str(tmp_path), read_once)
    assert [(step, is_right) for step, _, _, is_right in found] == [(1, True)] * 4
    total_bytes = found[0][1]
    assert total_bytes > 9 * MIB
    assert least * total_bytes < sum(got_bytes for _, _, got_bytes, _ in found) < most * total_bytes
    if read_once == "always":
        assert max(got_bytes for _, _, got_bytes, _ in found) < 0.5 * total_bytes  # nobody reads for all


@pytest.mark.parametrize("read_once", ["always", "never"])
def test_a_corrupt_shard_of_one_reader_takes_all_ranks_to_the_older_checkpoint(tmp_path: Path, read_once: str) -> None:
    run(4, _save_replicated, str(tmp_path), (1, 2))
    _flip(min(tmp_path.glob("step-0000000002-*/*/r00003-*.safetensors")))
    found = run(4, _restore_replicated, str(tmp_path), read_once)
    assert [(step, is_right) for step, _, _, is_right in found] == [(1, True)] * 4


# -- random numbers -----------------------------------------------------------------------------------------


def _draws() -> list[float]:
    return [*torch.rand(3).tolist(), random.random(), *np.random.rand(2).tolist()]  # noqa: NPY002 (the global one)


def _go_on_after_restore(url: str) -> tuple[list[float], list[float]]:
    rank = _rank()
    torch.manual_seed(100 + rank)
    random.seed(200 + rank)
    np.random.seed(300 + rank)  # noqa: NPY002 (as above)
    _draws()
    state = {"w": torch.ones(4)}
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(1, state)
        wanted = _draws()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 (as above)
        manager.restore(state)
    return wanted, _draws()


def test_the_random_numbers_of_each_rank_go_on_where_its_own_stood(tmp_path: Path) -> None:
    found = run(3, _go_on_after_restore, str(tmp_path))
    for wanted, drawn in found:
        assert drawn == wanted
    assert len({tuple(wanted) for wanted, _ in found}) == 3


def _seeds_of_other_worlds(url: str) -> tuple[list[float], list[float]]:
    torch.manual_seed(500 + _rank())
    own = torch.get_rng_state()
    expected = torch.rand(2).tolist()
    torch.set_rng_state(own)
    with CheckpointManager(url, options=CALM) as manager:
        manager.restore({"w": torch.ones(4)})
    return expected, torch.rand(2).tolist()


def test_a_rank_that_the_saving_world_did_not_have_keeps_its_own_random_numbers(tmp_path: Path) -> None:
    run(2, _go_on_after_restore, str(tmp_path))
    found = run(3, _seeds_of_other_worlds, str(tmp_path))
    assert [own == drawn for own, drawn in found] == [False, False, True]
