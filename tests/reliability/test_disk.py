"""Each system call of a save fails in each way that disks know: what was committed stays, and a save is whole."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch

from cloudckpt import CheckpointManager, CloudCkptError, KeepLast, Options
from cloudckpt.options import KIB, RetryPolicy
from tests.reliability.records import Section, Trials, dose
from tests.store.fault_disk import FaultDisk

SECTION = Section(
    number=40,
    title="Disks that fail",
    about=(
        "Each call that a save makes to the file system fails, once or from then on, with no room, a full quota, an "
        "error of the device, or a disk that has become read-only; the next job restores. Lost is a checkpoint that "
        "was acknowledged, or one that is there and not whole. The calls are failed where the package makes them."
    ),
)
CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
WRITES = ("open_new", "write", "sync", "sync_directory", "link", "rename", "rename_new", "make_directory", "unlink")
OPTIONS = Options(shard_bytes=8 * KIB, block_bytes=KIB, concurrency=1, retry=RetryPolicy(max_attempts=2, deadline_s=60))
# By default every so-manieth call of a kind.
STRIDE = dose(1, short=40)


def _state(step: int) -> dict[str, object]:
    return {"w": torch.arange(4_000, dtype=torch.float32) + step, "config": {"step": step}}


def _life(root: Path, first: int, disk: FaultDisk | None = None) -> list[int]:
    """Save two steps after what is there, on a disk that may fail; return what was acknowledged."""
    acknowledged: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        if disk is not None:
            patch.setattr("cloudckpt.store.local.Disk", lambda: disk)
        try:
            with CheckpointManager(
                root, options=OPTIONS, retention=[KeepLast(2)], prune_grace_s=0, save_rng=False, progress="off"
            ) as manager:
                for step in range(first, first + 2):
                    manager.save(step, _state(step))
                    acknowledged.append(step)
        except CloudCkptError:
            acknowledged.append(-1)
    return acknowledged


def _check(root: Path, acknowledged: list[int]) -> str:
    """Say what is lost, or wrong."""
    with CheckpointManager(root, options=OPTIONS, save_rng=False, progress="off") as manager:
        steps = manager.all_steps()
        for step in steps:
            state = _state(-1)
            manager.restore(state, step)
            if not torch.equal(state["w"], _state(step)["w"]):  # type: ignore[arg-type]
                return f"step {step} came back wrong"
    newest = max(acknowledged)
    return "" if steps and steps[-1] >= newest else f"step {newest} was acknowledged, and {steps} are there"


@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_save_whose_disk_fails_at_any_call_is_whole_or_not_there(tmp_path: Path, code: int) -> None:
    counting, base = FaultDisk(), tmp_path / "base"
    before = _life(base, 0)
    shutil.copytree(base, tmp_path / "count")
    _life(tmp_path / "count", 2, counting)
    counts = {name: counting.calls.count(name) for name in WRITES}
    with Trials(SECTION, "a call to the disk fails", error=errno.errorcode[code]) as trials:
        cases = [(name, skip, times) for name, count in counts.items() for skip in range(count) for times in (1, 10**6)]
        for number, (name, skip, times) in list(enumerate(cases))[CODES.index(code) % STRIDE :: STRIDE]:
            root = tmp_path / str(number)
            shutil.copytree(base, root)
            disk = FaultDisk()
            disk.fail(name, code, skip=skip, times=times)
            after = _life(root, 2, disk)
            if disk.calls.count(name) <= skip:
                continue  # what threads do at once takes a call more in one life than in another
            if wrong := _check(root, before + after):
                trials.lose(f"{name} after {skip}, {times} times {errno.errorcode[code]}: {wrong}")
            else:
                trials.count("the job went on" if -1 not in after else "the job was told, and the older ones stand")
