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
from cloudckpt.integrations.ray import KeepReported, RayCheckpoints, rules_of, url_of
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
    assert rules_of(CheckpointConfig(num_to_keep=3)) == [KeepLast(3), KeepReported()]
    assert rules_of(
        CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="loss", checkpoint_score_order="min")
    ) == [KeepBest("loss", 2, "min"), KeepLast(1), KeepReported()]


def test_all_stays_where_ray_cannot_be_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointManager(tmp_path, retention=rules_of(CheckpointConfig(num_to_keep=1)), progress="off") as manager:
        for step in (1, 2):
            manager.save(step, {"step": step})
        assert manager.all_steps() == [1, 2]
    assert "Ray does not say" in caplog.text


_DIES_BEFORE_IT_REPORTS = """
import os, signal, sys, tempfile
import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
import cloudckpt
from cloudckpt.integrations.ray import RayCheckpoints, url_of

KEEP = CheckpointConfig(num_to_keep=1)

def train(config):
    with RayCheckpoints(config["root"], keep=KEEP) as checkpoints:
        restored = checkpoints.restore({"step": None})
        if restored is None:
            for step in (1, 2):
                checkpoints.report(step, {"step": step}, {})
            checkpoints.manager.save(3, {"step": 3})
            os.kill(os.getpid(), signal.SIGKILL)
        told = cloudckpt.read(url_of(ray.train.get_checkpoint()), progress="off")
        print("restored", restored.step, "told", told["step"], flush=True)
        for step in (4, 5):
            checkpoints.report(step, {"step": step}, {})

ray.init(num_cpus=2, include_dashboard=False)
how = RunConfig(storage_path=tempfile.mkdtemp(), checkpoint_config=KEEP, failure_config=FailureConfig(max_failures=1))
trainer = TorchTrainer(
    train, train_loop_config={"root": sys.argv[1]}, scaling_config=ScalingConfig(num_workers=1), run_config=how
)
print("result", cloudckpt.read(url_of(trainer.fit().checkpoint), progress="off")["step"], flush=True)
"""


def test_what_ray_names_can_be_read_after_a_worker_died_between_a_commit_and_its_report(tmp_path: Path) -> None:
    program = [sys.executable, "-c", _DIES_BEFORE_IT_REPORTS, str(tmp_path / "root")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}

    ended = subprocess.run(program, check=False, capture_output=True, text=True, env=environment, timeout=300)

    assert "restored 3 told 2" in ended.stdout, ended.stderr
    assert "result 5" in ended.stdout
    with CheckpointManager(tmp_path / "root", progress="off") as manager:
        assert manager.all_steps() == [4, 5]


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
    steps = [attempt.step for attempt in kept]
    assert steps[-3:] == [16, 20, 24]
    # Beside them, the oldest of the three that Ray named when the last one was committed. Of the twelfth it never hears
    # where its worker is killed between that commit and its report.
    assert steps[:-3] in ([], [8], [12])
