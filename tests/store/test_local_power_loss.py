"""What a power cut may take from a disk store: nothing that was acknowledged, and never a part of an object.

A save with retention is recorded call by call; for a cut after each call, the states that the kernel's promises
allow are rebuilt and looked at.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloudckpt.errors import ObjectExistsError
from cloudckpt.store.local import LocalStore
from tests.store.journal_disk import Journal, JournalDisk

RANDOM_STATES = 20


@dataclass
class Recorder:
    """A store whose acknowledgements are remembered, with where in the journal they came."""

    journal: Journal
    store: LocalStore
    values: dict[str, set[bytes]] = field(default_factory=dict)
    promises: list[tuple[int, dict[str, bytes | None]]] = field(default_factory=list)

    def promise(self, **changes: bytes | None) -> None:
        latest = dict(self.promises[-1][1]) if self.promises else {}
        self.promises.append((len(self.journal.log), latest | changes))

    def put(self, key: str, data: bytes) -> None:
        # While it is on its way the old bytes and the new ones are both right.
        self.values.setdefault(key, set()).add(data)
        self.promise(**{key: None})
        self.store.put(key, [memoryview(data)])
        self.promise(**{key: data})

    def create(self, key: str, data: bytes) -> None:
        self.values.setdefault(key, set()).add(data)
        self.store.create(key, data)
        self.promise(**{key: data})

    def delete(self, *keys: str) -> None:
        self.promise(**dict.fromkeys(keys))
        self.store.delete(keys)
        self.promise(**dict.fromkeys(keys, b"gone"))

    def promised_after(self, length: int) -> dict[str, bytes | None]:
        return next((state for at, state in reversed(self.promises) if at <= length), {})


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    journal = Journal(str(tmp_path))
    return Recorder(journal, LocalStore(f"{tmp_path}/runs/7", disk=JournalDisk(journal)))


def record(recorder: Recorder) -> None:
    """Two saves, a lost race for a manifest, an overwrite, a prune, a save again, and another process's directories."""
    recorder.create("epochs/1.json", b"claim")
    for step in ("s1", "s2"):
        for number in range(3):
            recorder.put(f"{step}/attempt/{number}", bytes([number]) * 5000)
        recorder.create(f"{step}/manifest", step.encode())
        with pytest.raises(ObjectExistsError):
            recorder.store.create(f"{step}/manifest", b"too late")
    recorder.put("s2/attempt/0", b"again")
    recorder.delete("s1/manifest")
    recorder.delete("s1/attempt/0", "s1/attempt/1", "s1/attempt/2")
    recorder.put("s1/attempt/0", b"in directories that were removed and made again")
    disk = JournalDisk(recorder.journal)
    for path in ("s3", "s3/attempt"):
        disk.make_directory(f"{recorder.journal.base}/runs/7/{path}", at=None)
    recorder.put("s3/attempt/0", b"in a directory of a process that died")


def states(length: int, journal: Journal) -> list[dict[str, bytes]]:
    rngs = [random.Random(seed) for seed in range(RANDOM_STATES)]
    choices: list[Callable[[], bool]] = [lambda: False, lambda: True]
    choices += [lambda rng=rng: rng.random() < 0.5 for rng in rngs]
    return [journal.files_after(length, survives) for survives in choices]


def test_a_power_cut_never_takes_what_was_acknowledged_nor_shows_a_part_of_an_object(recorder: Recorder) -> None:
    record(recorder)
    checked = 0
    for length in range(len(recorder.journal.log) + 1):
        promised = recorder.promised_after(length)
        for files in states(length, recorder.journal):
            checked += 1
            seen = {path.removeprefix("runs/7/"): data for path, data in files.items()}
            for key, data in promised.items():
                assert data is None or seen.get(key, b"gone") == data, f"cut after {length} calls: {key}"
            for key, data in seen.items():
                assert ".cloudckpt-tmp-" in key or data in recorder.values[key], f"cut after {length} calls: {key}"
    assert checked > 2000


@pytest.mark.parametrize("call", ["sync", "sync_directory"])
def test_the_law_above_notices_a_missing_fsync(recorder: Recorder, call: str) -> None:
    setattr(recorder.store._disk, call, lambda fd: None)
    with pytest.raises(AssertionError, match="cut after"):
        test_a_power_cut_never_takes_what_was_acknowledged_nor_shows_a_part_of_an_object(recorder)


def test_a_power_cut_after_a_whole_run_leaves_exactly_what_the_run_left(recorder: Recorder) -> None:
    record(recorder)
    root = Path(recorder.journal.base)
    there = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert recorder.journal.files_after(len(recorder.journal.log), lambda: True) == there
