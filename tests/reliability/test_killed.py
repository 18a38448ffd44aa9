"""Real processes, killed at random moments: ours, and other ways to save in the same file or folder.

What a job of ours does, and what is looked at after each kill, is in `tests/test_kill.py`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp

from raw_access import FreshPrefix
from tests.ranks.processes import fork
from tests.reliability.records import Section, Trials, dose
from tests.test_kill import Job, Record, kill_after, seconds_per_save

SECTION = Section(
    number=30,
    title="Processes that are killed",
    about=(
        "`kill -9` at random moments of a loop of saves with retention, whose next process restores, reads back every "
        "checkpoint in the list and compares it bit by bit. Of the other ways to save, which write one place again and "
        "again, lost is a kill after which that place can no longer be loaded, or holds a mixture of two saves."
    ),
)
SEED = 20_231
KILLS = dose(34, short=4)  # of each of six cases
_ELEMENTS = 300_000
_PATIENCE_S = 300


def kill_ours(job: Job, store: str) -> None:
    with Trials(SECTION, "kill -9 in a loop of saves", store=store, saves=job.how, seed=SEED) as trials:
        moments, record = random.Random(SEED), Record()
        save_s = seconds_per_save(job, record)
        for _ in range(KILLS):
            hits = record.hit_count
            try:
                kill_after(job, moments.randrange(3), moments.uniform(0.0, save_s), record)
            except AssertionError as exc:
                trials.lose(f"after step {record.acknowledged}, seed {SEED}: {exc}")
            else:
                trials.count("killed in a save" if record.hit_count > hits else "killed elsewhere")
        with job.start(record):  # what the last kill left
            pass


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("how", ["save", "async_save"])
def test_a_killed_job_loses_nothing_on_a_disk(tmp_path: Path, how: str) -> None:
    kill_ours(Job(str(tmp_path / "root"), {}, "auto", how), "disk")


@pytest.mark.slow
@pytest.mark.timeout(2_400)
@pytest.mark.parametrize("how", ["save", "async_save"])
def test_a_killed_job_loses_nothing_on_seaweedfs(s3_url: FreshPrefix, how: str) -> None:
    kill_ours(Job(s3_url.url, s3_url.storage_options, "auto", how), "SeaweedFS")


@pytest.mark.slow
@pytest.mark.timeout(2_400)
@pytest.mark.parametrize("how", ["save", "async_save"])
def test_a_killed_job_loses_nothing_on_fake_gcs(gs_url: FreshPrefix, how: str) -> None:
    kill_ours(Job(gs_url.url, gs_url.storage_options, "auto", how), "fake-gcs-server")


# -- what other people have --------------------------------------------------------------------------------------


def _state(step: int) -> dict[str, torch.Tensor]:
    return {name: torch.full((_ELEMENTS,), float(step)) for name in ("a", "b", "c")}


def _save_file(place: str, step: int) -> None:
    with fsspec.open(f"{place}/last.ckpt", "wb") as file:
        torch.save(_state(step), file)


def _load_file(place: str) -> dict[str, torch.Tensor]:
    with fsspec.open(f"{place}/last.ckpt", "rb") as file:
        found: dict[str, torch.Tensor] = torch.load(file)
    return found


def _save_in_transaction(place: str, step: int) -> None:
    # What Lightning does for any path: the file gets its name at the end.
    filesystem, path = fsspec.core.url_to_fs(f"{place}/last.ckpt")
    with filesystem.transaction, filesystem.open(path, "wb") as file:
        torch.save(_state(step), file)


def _save_dcp(place: str, step: int) -> None:
    dcp.save(_state(step), checkpoint_id=f"{place}/last", no_dist=True)


def _load_dcp(place: str) -> dict[str, torch.Tensor]:
    found = _state(-1)
    dcp.load(found, checkpoint_id=f"{place}/last", no_dist=True)
    return found


OTHERS: dict[str, tuple[Callable[[str, int], None], Callable[[str], dict[str, torch.Tensor]]]] = {
    "torch.save by fsspec": (_save_file, _load_file),
    "torch.save in a transaction of fsspec": (_save_in_transaction, _load_file),
    "stock DCP": (_save_dcp, _load_dcp),
}


def save_for_ever(told: Connection, name: str, place: str) -> None:
    torch.set_num_threads(1)
    save, _ = OTHERS[name]
    step = 0
    while True:
        step += 1
        save(place, step)
        told.send(step)


def look(name: str, place: str, acknowledged: int) -> str:
    """Say what is wrong with what is there; "" if it is one whole save, no older than was acknowledged."""
    try:
        found = OTHERS[name][1](place)
    except (Exception, dcp.api.CheckpointException) as exc:  # noqa: BLE001 (whatever a reader meets; DCP's is none)
        return f"cannot be loaded: {type(exc).__name__}"
    values = {float(value) for tensor in found.values() for value in tensor.unique()}
    if len(values) > 1:
        return f"holds a mixture of steps {sorted(values)}"
    return "" if min(values) >= acknowledged else f"holds step {min(values):.0f}, and {acknowledged} was acknowledged"


@pytest.mark.timeout(1_200)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_what_a_kill_leaves_of_other_ways_to_save_is_counted(tmp_path: Path, name: str) -> None:
    moments = random.Random(SEED)
    with Trials(SECTION, "kill -9 in a loop of saves", name, store="disk", seed=SEED) as trials:
        for number in range(KILLS):
            place = tmp_path / str(number)
            place.mkdir()
            child, told = fork(save_for_ever, name, str(place))
            assert told.poll(_PATIENCE_S)
            acknowledged = told.recv()
            began_s = time.monotonic()
            assert told.poll(_PATIENCE_S)
            acknowledged = told.recv()
            time.sleep(moments.uniform(0.0, 2 * (time.monotonic() - began_s)))
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join(30)
            with suppress(EOFError, ConnectionError):
                while told.poll():
                    acknowledged = told.recv()
            wrong = look(name, str(place), acknowledged)
            if wrong:
                trials.lose(wrong)
            else:
                trials.count("one whole save is there")
