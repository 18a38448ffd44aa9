"""The end of a process, of a `with` block and of a fork finishes a save that is under way, or gives it up in time.

Each case is a process of its own, whose script ends the way a job may end.
"""

from __future__ import annotations

import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager
from cloudckpt.options import MIB
from raw_access import FreshPrefix
from tests.effort import first
from tests.programs import run_forked

ROOT = Path(__file__).resolve().parents[2]

_PREAMBLE = """
import atexit, json, logging, multiprocessing, os, signal, sys, threading, time
import torch
from cloudckpt import CheckpointManager, CloudCkptError, Options
from tests.store.gates import Gate, slow
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
url, where = sys.argv[1], json.loads(sys.argv[2])
state = {"w": torch.arange(100_000), "config": {"step": 1}}
def opened(seconds=0.4, **options):
    manager = CheckpointManager(url, options=Options(**options), **where)
    slow(manager, seconds)
    return manager
"""
_SMASH = "\nstate['w'].zero_()\n"


@dataclass(frozen=True)
class Ending:
    """How a script ends, and what is to be seen of it."""

    script: str
    code: int = 0
    is_committed: bool = True
    said: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = field(default=("Exception ignored",))


WAITING = "WARNING the process ends; waiting up to 300 s for the save of step 1"
IN_A_BLOCK = "with opened() as manager:\n    manager.async_save(1, state); state['w'].zero_()\n"
HANGING = """
manager = opened(0, finish_timeout_s={patience})
gate = Gate(manager, verb="{verb}", when=lambda key: key.endswith(("{suffix}")))
"""
STUCK = HANGING.format(patience=300, verb="put", suffix=".safetensors")
ENDINGS = {
    "the script ends": Ending("manager = opened(); manager.async_save(1, state)" + _SMASH, said=(WAITING,)),
    "sys.exit": Ending("manager = opened(); manager.async_save(1, state); sys.exit(3)", code=3, said=(WAITING,)),
    "an exception without a block": Ending(
        "manager = opened(); manager.async_save(1, state); 1 / 0", code=1, said=(WAITING, "ZeroDivisionError")
    ),
    "the end of the block": Ending(IN_A_BLOCK, unsaid=("the process ends",)),
    "an exception in the block": Ending(
        IN_A_BLOCK + "    raise ValueError('of the user')",
        code=1,
        said=("ValueError: of the user",),
        unsaid=("the process ends", "During handling"),
    ),
    "sys.exit in the block": Ending(IN_A_BLOCK + "    sys.exit(7)", code=7, unsaid=("the process ends",)),
    "an interrupt in the block": Ending(
        IN_A_BLOCK + "    os.kill(os.getpid(), signal.SIGINT); time.sleep(30)",
        code=-signal.SIGINT,
        said=("KeyboardInterrupt",),
    ),
    "a second interrupt": Ending(
        STUCK
        + "with manager:\n"
        + "    manager.async_save(1, state); gate.await_request()\n"
        + "    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        + "    os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n",
        code=-signal.SIGINT,
        is_committed=False,
        said=("KeyboardInterrupt", "the wait for it was interrupted"),
        unsaid=("the process ends",),
    ),
    "a store that hangs": Ending(
        HANGING.format(patience=0.5, verb="put", suffix=".safetensors")
        + "with manager:\n    manager.async_save(1, state)",
        code=1,
        is_committed=False,
        said=("SaveFailedError: the save of step 1 was abandoned after 0.5 s; nothing was committed",),
        unsaid=("the process ends",),
    ),
    "a store that hangs, and nobody closes": Ending(
        HANGING.format(patience=0.5, verb="put", suffix=".safetensors") + "manager.async_save(1, state)",
        is_committed=False,
        said=("waiting up to 0.5 s", "ERROR the save of step 1 was abandoned after 0.5 s; nothing was committed"),
    ),
    "a commit that hangs": Ending(
        HANGING.format(patience=3, verb="create", suffix="manifest.json")
        + "with manager:\n    manager.async_save(1, state); gate.await_request()",
        code=1,
        is_committed=False,
        said=(
            "CommitUnknownError: the save of step 1 did not end within 3 s, so the checkpoint is whole or not there",
        ),
        unsaid=("the process ends",),
    ),
    "a forked child": Ending(
        STUCK
        + "with manager:\n"
        + "    handle = manager.async_save(1, state); gate.await_request()\n"
        + "    child = os.fork()\n"
        + "    if not child:\n"
        + "        try:\n            handle.result(0)\n"
        + "        except CloudCkptError as exc:\n            print(exc, file=sys.stderr, flush=True)\n"
        # The threads of PyTorch's own pools did not come along, and its destructors may wait for them.
        + "        atexit.register(os._exit, 5)\n        sys.exit(5)\n"
        + "    print('child:', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), handle.done(), file=sys.stderr)\n"
        + "    gate.open()\n",
        said=("the save of step 1 belongs to the process that this was forked from", "child: 5 False"),
        unsaid=("the process ends",),
    ),
    "a child that saves itself": Ending(
        "def work():\n"
        "    global manager\n"
        "    manager = opened()\n"
        "    manager.async_save(1, state)\n"
        "child = multiprocessing.get_context('fork').Process(target=work)\n"
        "child.start(); child.join(); sys.exit(child.exitcode)",
        said=(WAITING,),
    ),
    "a kill in the middle": Ending(
        STUCK + "manager.async_save(1, state); gate.await_request()\n" + "os.kill(os.getpid(), signal.SIGKILL)",
        code=-signal.SIGKILL,
        is_committed=False,
    ),
}


def run(script: str, url: str, where: str = "{}") -> subprocess.CompletedProcess[str]:
    return run_forked("-c", _PREAMBLE + script, url, where, cwd=ROOT)


# A process that starts with torch takes seconds; the rest goes with the long ones.
_FIRST = ("a forked child", "a commit that hangs")


@pytest.mark.parametrize("name", first(ENDINGS, _FIRST))
def test_the_end_of_a_job_finishes_its_save_or_gives_it_up_in_time(tmp_path: Path, name: str) -> None:
    ending = ENDINGS[name]
    with CheckpointManager(tmp_path, save_rng=False) as manager:
        manager.save(0, {"w": torch.zeros(3)})
    done = run(ending.script, str(tmp_path))
    assert done.returncode == ending.code, done.stderr
    for text in ending.said:
        assert text in done.stderr
    for text in ending.unsaid:
        assert text not in done.stderr
    check_newest(str(tmp_path), 1 if ending.is_committed else 0)


def check_newest(url: str, step: int, **where: object) -> None:
    with CheckpointManager(url, **where) as manager:  # type: ignore[arg-type]
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == list(range(step + 1))
        latest = manager.latest()
    assert latest is not None
    expected = torch.arange(100_000) if step else torch.zeros(3)
    assert torch.equal(cloudckpt.read(latest.url, **where)["w"], expected)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["obstore", "fsspec"])
def test_the_end_of_a_process_finishes_its_save_on_s3(s3_url: FreshPrefix, engine: str) -> None:
    import json

    where = {"storage_options": s3_url.storage_options, "engine": engine}
    script = "manager = opened(); manager.save(0, {'w': torch.zeros(3)}); manager.async_save(1, state); sys.exit(3)"
    done = run(script, s3_url.url, json.dumps(where, default=dict))
    assert done.returncode == 3, done.stderr
    assert WAITING in done.stderr
    check_newest(s3_url.url, 1, **where)


# -- memory ------------------------------------------------------------------------------------------------

_MEASURE = """
def status_bytes(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024
MIB = 1 << 20
CheckpointManager(url + "/warm").save(0, {"w": torch.ones(3 * MIB)})
state = {f"w{number}": torch.ones(8 * MIB) for number in range(COUNT)}
manager = CheckpointManager(url, options=Options(memory_budget_bytes=BUDGET, shard_bytes=32 * MIB))
before_bytes = status_bytes("VmRSS")
seen = []
for step in range(SAVES):
    manager.async_save(step, state).result()
    seen.append(status_bytes("VmRSS") - before_bytes)
manager.close()
print(json.dumps([status_bytes("VmHWM") - before_bytes, seen]))
"""


def measured(url: Path, *, count: int, saves: int, budget_bytes: int | None) -> tuple[int, list[int]]:
    """Return the peak, and what was resident after each save, in bytes beyond the state."""
    import json

    script = f"COUNT, SAVES, BUDGET = {count}, {saves}, {budget_bytes}\n{_MEASURE}"
    done = run(script, str(url))
    assert done.returncode == 0, done.stderr
    peak_bytes, seen = json.loads(done.stdout)
    return peak_bytes, seen


@pytest.mark.parametrize("budget_mib", [pytest.param(None, marks=pytest.mark.slow), 64])
def test_an_async_save_takes_the_copy_or_its_budget_and_hardly_more(tmp_path: Path, budget_mib: int | None) -> None:
    budget_bytes = None if budget_mib is None else budget_mib * MIB
    peak_bytes, _ = measured(tmp_path, count=8, saves=2, budget_bytes=budget_bytes)
    assert peak_bytes <= (budget_bytes or 256 * MIB) + 64 * MIB


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_memory_does_not_grow_over_fifty_saves(tmp_path: Path) -> None:
    _, seen = measured(tmp_path, count=2, saves=50, budget_bytes=None)
    assert max(seen[5:]) <= min(seen[5:]) + 32 * MIB
