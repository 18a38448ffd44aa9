"""A value of any size is saved, loaded and read by every way; ranks must agree on it, and a part may not be lost."""

from __future__ import annotations

import io
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    CloudReader,
    CloudWriter,
    IntegrityError,
    Options,
    OptionsError,
    PerRank,
    SaveFailedError,
    UnsupportedValueError,
)
from tests.format.test_codec import fingerprint
from tests.ranks.processes import run

MIB = 1 << 20
SMALL_SHARDS = Options(shard_bytes=MIB, block_bytes=MIB // 4, progress_timeout_s=60)
ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def replay(seed: int = 0) -> dict[str, Any]:
    """Return a value of some 6 MiB, as a program has it that keeps what it saw."""
    numbers = np.random.default_rng(seed)
    return {
        "seen": numbers.standard_normal((300, 500)),
        "acts": [numbers.integers(0, 9, 4000) for _ in range(20)],
        "queue": deque([torch.arange(300_000) + seed, torch.ones(3, dtype=torch.bfloat16)], maxlen=9),
        "log": "line é\n" * 100_000,
        "raw": io.BytesIO(bytes([seed]) * MIB),
        "place": 7,
    }


def state_of(seed: int) -> dict[str, Any]:
    return {"replay": replay(seed), "w": torch.full((4,), float(seed)), "other": np.arange(200_000) + seed, "n": seed}


def test_a_large_value_is_loaded_and_read(tmp_path: Path) -> None:
    cloudckpt.save(state_of(1), tmp_path / "c", options=SMALL_SHARDS)

    live = state_of(2)
    cloudckpt.load(live, tmp_path / "c")

    assert fingerprint(live) == fingerprint(state_of(1))
    assert fingerprint(cloudckpt.read(tmp_path / "c")) == fingerprint(state_of(1))
    assert fingerprint(cloudckpt.read(tmp_path / "c", "replay")) == fingerprint({"replay": replay(1)})
    assert next((tmp_path / "c").rglob("index.bin")).stat().st_size < MIB // 8


def test_a_large_value_goes_through_a_manager_and_an_async_save(tmp_path: Path) -> None:
    state = state_of(3)
    with CheckpointManager(tmp_path, options=SMALL_SHARDS) as manager:
        manager.save(1, state)
        state.update(state_of(4))
        handle = manager.async_save(2, state)
        state["other"][:] = 0  # it was copied
        handle.result()
        manager.restore(state)
        assert fingerprint(state) == fingerprint(state_of(4))
        manager.restore(state, 1)
        assert fingerprint(state) == fingerprint(state_of(3))


@ALONE
def test_a_large_value_goes_through_dcp(tmp_path: Path) -> None:
    state = state_of(5)
    dcp.save(state, storage_writer=CloudWriter(tmp_path / "c"), no_dist=True)

    live: dict[str, Any] = state_of(6)
    live["replay"] = {**dict.fromkeys(live["replay"]), "acts": [None] * 20}
    dcp.load(live, storage_reader=CloudReader(tmp_path / "c"), no_dist=True)

    assert fingerprint(live) == fingerprint(state)
    assert not any(map(is_ours, CloudReader(tmp_path / "c").read_metadata().state_dict_metadata))


def is_ours(name: str) -> bool:
    return name.startswith("cloudckpt.")


@ALONE
def test_a_name_of_a_part_is_refused_in_a_plan(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException) as caught:
        dcp.save({"cloudckpt.value.00001.x": torch.ones(1)}, storage_writer=CloudWriter(tmp_path / "c"), no_dist=True)
    error, _ = caught.value.failures[0]
    assert isinstance(error, OptionsError)
    assert "library's own" in str(error)


def test_what_is_left_out_is_not_read(tmp_path: Path) -> None:
    cloudckpt.save(state_of(1), tmp_path / "c", options=SMALL_SHARDS)
    for shard in (tmp_path / "c").rglob("*.safetensors"):
        if b"cloudckpt.value.00001.replay" in shard.read_bytes()[:4096]:
            shard.unlink()

    live = {"n": 0}
    cloudckpt.load(live, tmp_path / "c", strict=False)
    assert live == {"n": 1}
    whole = state_of(2)
    with pytest.raises(IntegrityError):
        cloudckpt.load(whole, tmp_path / "c")
    assert fingerprint(whole) == fingerprint(state_of(2))


def test_metadata_of_a_manifest_stay_small(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedValueError, match="put it into the state"):
        cloudckpt.save({"n": 1}, tmp_path / "c", metadata={"big": bytes(2 * MIB)})


# -- several ranks ---------------------------------------------------------------------------------------------------


def _save(url: str, differ: bool = False) -> str:
    state = state_of(1)
    if differ and dist.get_rank():
        state["replay"]["seen"][-1, -1] += 1
    try:
        cloudckpt.save(state, url, options=SMALL_SHARDS)
    except SaveFailedError as exc:
        return str(exc)
    return ""


def _load(url: str, read_once: str) -> bool:
    live = state_of(2)
    options = Options(read_once=read_once, progress_timeout_s=60)  # type: ignore[arg-type]
    cloudckpt.load(live, url, options=options)
    return fingerprint(live) == fingerprint(state_of(1))


@pytest.mark.parametrize("read_once", ["always", "never"])
def test_ranks_write_a_large_value_once_and_all_have_it_back(tmp_path: Path, read_once: str) -> None:
    assert run(2, _save, str(tmp_path / "c")) == ["", ""]

    assert run(2, _load, str(tmp_path / "c"), read_once) == [True, True]
    size_bytes = sum(path.stat().st_size for path in (tmp_path / "c").rglob("*.safetensors"))
    assert 5 * MIB < size_bytes < 9 * MIB


def _through_dcp(url: str) -> bool:
    dcp.save(state_of(1), storage_writer=CloudWriter(url))
    live = state_of(2)
    live["replay"] = {**dict.fromkeys(live["replay"]), "acts": [None] * 20}
    dcp.load(live, storage_reader=CloudReader(url))
    return fingerprint(live) == fingerprint(state_of(1))


def test_ranks_have_a_large_value_back_through_dcp(tmp_path: Path) -> None:
    assert run(2, _through_dcp, str(tmp_path / "c")) == [True, True]


def test_ranks_that_differ_in_a_large_value_are_told_its_name(tmp_path: Path) -> None:
    for said in run(2, _save, str(tmp_path / "c"), True):
        assert "'replay' differs between rank 0 and rank 1" in said


# -- each rank's own -------------------------------------------------------------------------------------------------


class Stream:
    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def _rank_state(rank: int) -> dict[str, Any]:
    return {**replay(rank), "buffer": torch.arange(700_000, dtype=torch.float64) + rank, "dtype": torch.bfloat16}


def _save_own(url: str) -> None:
    cloudckpt.save({"stream": PerRank(Stream(_rank_state(dist.get_rank())))}, url, options=SMALL_SHARDS)


def _load_own(url: str) -> bool:
    stream = Stream({})
    cloudckpt.load({"stream": PerRank(stream)}, url, options=SMALL_SHARDS)
    return fingerprint(stream.state) == fingerprint(_rank_state(dist.get_rank()))


def test_each_rank_keeps_tensors_of_any_size_for_itself(tmp_path: Path) -> None:
    run(2, _save_own, str(tmp_path / "c"))
    assert run(2, _load_own, str(tmp_path / "c")) == [True, True]
