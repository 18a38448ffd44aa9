from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="make integrations installs the frameworks")

from bucket import Bucket
from ray.train import Checkpoint, CheckpointConfig

from cloudckpt import CheckpointManager, IntegrityError, KeepBest, KeepLast, OptionsError
from cloudckpt.integrations.ray import RayCheckpoints, rules_of, url_of
from raw_access import FreshPrefix
from tests.integrations.interrupted import REPOSITORY

pytestmark = pytest.mark.timeout(600)

_LINE = re.compile(r"rank (\d+) (\d+) step (\d+) (\S+)")
_STRUCK = "import sys; from tests.integrations.striking import run_struck; run_struck(*sys.argv[1:])"


def _run(root: FreshPrefix, workers: int, notes: Path | None = None) -> dict[tuple[int, int], set[tuple[int, str]]]:
    """Return rank and step → the processes that have trained that step, and the bits of their losses.

    Args:
        root: where to save.
        workers: how many.
        notes: an empty folder, if workers are to be killed, for what has been done.
    """
    struck = ["-c", _STRUCK, str(notes)] if notes else []
    program = [*struck, str(REPOSITORY / "examples/integrations/ray_train.py"), "--url", root.url]
    with subprocess.Popen(
        [sys.executable, *program, "--workers", str(workers), "--steps", "24"],
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "CLOUDCKPT_STORAGE_OPTIONS": json.dumps(dict(root.storage_options)),
            "RAY_DEDUP_LOGS": "0",
            "PYTHONUNBUFFERED": "",  # Ray passes on what it finds, be it half a line
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        start_new_session=True,
    ) as job:
        assert job.stdout is not None
        losses: dict[tuple[int, int], set[tuple[int, str]]] = {}
        try:
            for rank, pid, step, loss in itertools.chain.from_iterable(map(_LINE.findall, job.stdout)):
                losses.setdefault((int(rank), int(step)), set()).add((int(pid), loss))
            assert job.wait() == 0
        finally:
            job.terminate()  # so that Ray ends what it has started, which is in sessions of its own
            with suppress(subprocess.TimeoutExpired):
                job.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    return losses


def test_what_ray_keeps_the_root_keeps() -> None:
    assert rules_of(None) == rules_of(CheckpointConfig()) == []
    assert rules_of(CheckpointConfig(num_to_keep=3)) == [KeepLast(3)]
    assert rules_of(
        CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="loss", checkpoint_score_order="min")
    ) == [KeepBest("loss", 2, "min"), KeepLast(1)]


def test_a_pointer_of_somebody_else_is_refused(tmp_path: Path) -> None:
    theirs = Checkpoint.from_directory(tmp_path)
    with pytest.raises(OptionsError, match=r"cloudckpt\.json"):
        url_of(theirs)
    (tmp_path / "cloudckpt.json").write_text("[]")
    with pytest.raises(IntegrityError, match="no pointer"):
        url_of(theirs)


def test_rules_for_ray_and_a_manager_with_its_own_are_refused(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager, pytest.raises(OptionsError, match="retention"):
        RayCheckpoints(manager, keep=CheckpointConfig(num_to_keep=3))


def test_a_path_that_each_worker_would_take_for_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionsError, match=r"runs/7 is relative.*absolute path, or a URL"):
        RayCheckpoints("runs/7")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_are_killed_are_replaced_and_have_the_losses_of_a_run_left_alone(
    s3_url: FreshPrefix, workers: int, tmp_path: Path
) -> None:
    alone = _run(FreshPrefix(url=f"{s3_url.url}/a", server=s3_url.server), workers)
    struck = FreshPrefix(url=f"{s3_url.url}/b", server=s3_url.server)

    found = _run(struck, workers, tmp_path)

    assert {path.name for path in tmp_path.glob("in *")} == {"in a step", "in a save"}
    assert {place: {loss for _, loss in trained} for place, trained in found.items()} == {
        place: {loss for _, loss in trained} for place, trained in alone.items()
    }
    assert len(found[0, 6]) == 2, "a step after the newest checkpoint is trained again, by another process"
    kept = [attempt for attempt in Bucket(struck.url, struck.storage_options).attempts() if attempt.is_committed]
    assert [attempt.step for attempt in kept] == [16, 20, 24]
