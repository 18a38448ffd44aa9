"""SIGKILL at random points of a copy: the same copy once more ends it, and sends nothing that was there."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, Options
from cloudckpt.copying.lead import Selection, copy_places
from cloudckpt.copying.places import opened
from cloudckpt.format import MANIFEST_NAME
from cloudckpt.options import KIB
from cloudckpt.root import Catalog
from cloudckpt.store import RetryingStore, open_store
from servers import FreshPrefix
from tests.effort import examples
from tests.ranks.processes import fork

KILLS = examples(20, short=3)
OPTIONS = Options(shard_bytes=64 * KIB, block_bytes=16 * KIB, span_bytes=32 * KIB, memory_budget_bytes=512 * KIB)
STEPS = 2


class Telling:
    """A gauge that tells of each shard."""

    def __init__(self, told: Callable[[int], object]) -> None:
        self._told = told

    def begin(self, total_bytes: int) -> None: ...

    def move(self, size_bytes: int) -> None:
        if size_bytes:
            self._told(size_bytes)


class Noting(RetryingStore):
    """A store that keeps the keys of its puts."""

    def __init__(self, store: RetryingStore) -> None:
        super().__init__(store.inner, OPTIONS.retry)
        self.keys: list[str] = []

    def put(self, key: str, buffers: Sequence[memoryview]) -> None:
        self.keys.append(key)
        super().put(key, buffers)


def copied(
    source: str, target: str, storage_options: Mapping[str, Any] | None, told: Callable[[int], object]
) -> list[str]:
    """Copy a whole root; return the keys of what was put in the target."""
    with (
        opened(source, storage_options=None, engine="auto", options=OPTIONS) as one,
        opened(target, storage_options=storage_options, engine="auto", options=OPTIONS) as other,
    ):
        assert isinstance(other.catalog.store, RetryingStore)
        store = Noting(other.catalog.store)
        copy_places([one], replace(other, catalog=Catalog(store)), Selection(is_all=True), OPTIONS, Telling(told))
        return store.keys


def work(pipe: Connection, source: str, target: str, storage_options: Mapping[str, Any] | None) -> None:
    """Be a copy that is killed."""
    torch.set_num_threads(1)
    copied(source, target, storage_options, pipe.send)


def sizes_at(url: str, storage_options: Mapping[str, Any] | None) -> dict[str, int]:
    with open_store(url, storage_options=storage_options) as store:
        return {info.key: info.size_bytes for info in store.list("").objects if info.key.startswith("step-")}


def kill_and_repeat(source: str, target: str, storage_options: Mapping[str, Any] | None, *, after: int) -> None:
    child, told = fork(work, source, target, storage_options)
    for _ in range(after):
        assert told.poll(120), "the copy neither went on nor failed"
        told.recv()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    whole, there = sizes_at(source, None), sizes_at(target, storage_options)
    assert all(whole[key] == size_bytes for key, size_bytes in there.items())
    missing = {key for key in whole.keys() - there.keys() if not key.endswith(MANIFEST_NAME)}
    puts = copied(source, target, storage_options, lambda _: None)
    if storage_options is None:
        # On a disk the index of what is not committed is put again, which makes its directory durable.
        uncommitted = {key.partition("/")[0] for key in whole if key.endswith(MANIFEST_NAME) and key not in there}
        again = {key for key in there if key.endswith("index.bin") and key.partition("/")[0] in uncommitted}
        assert sorted(puts) == sorted(missing | again)
    else:
        # What the killed client had in flight lands after its end, and what has landed is not sent.
        assert sorted(puts) == sorted(missing.intersection(puts))
    assert sizes_at(target, storage_options) == whole
    found = cloudckpt.verify_all(target, deep=True, storage_options=storage_options, options=OPTIONS)
    assert [one.state for one in found] == ["whole"] * STEPS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("killed") / "root"
    with CheckpointManager(root, options=OPTIONS, progress="off", save_rng=False) as manager:
        for step in range(STEPS):
            manager.save(step, {"w": torch.full((200_000,), float(step))})
    return str(root)


@pytest.mark.timeout(300)
def test_a_copy_that_was_killed_is_ended_by_the_same_copy_on_a_disk(source: str, tmp_path: Path) -> None:
    points = random.Random(7)
    shards = len(list(Path(source).rglob("*.safetensors")))
    for number in range(KILLS):
        kill_and_repeat(source, str(tmp_path / str(number)), None, after=points.randrange(1, shards + 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_copy_that_was_killed_is_ended_by_the_same_copy_in_a_bucket(source: str, s3_url: FreshPrefix) -> None:
    points = random.Random(8)
    shards = len(list(Path(source).rglob("*.safetensors")))
    for number in range(examples(20)):
        url = f"{s3_url.url}/{number}"
        kill_and_repeat(source, url, s3_url.storage_options, after=points.randrange(1, shards + 1))
