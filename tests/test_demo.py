"""The demo says the truth: it passes when nothing was lost, and fails when one thing was."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from bucket import Attempt, Bucket, attempts_in
from corpus import Loader
from events import End, Event, Saved, Saving, Start, Step, read_event
from record import Outcome
from runs import DemoError, Job, Kill, Segment, run_segment
from trajectory import compare

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"

# Only a hang takes so long: a busy machine makes many processes that import PyTorch slow.
HANG_S = 900
pytestmark = pytest.mark.timeout(2 * HANG_S + 60)

TINY = (
    *("--steps", "60", "--save-every", "5", "--layers", "1", "--width", "32", "--batch-size", "32"),
    *("--shard-mib", "0.01"),
)

# Restores all but the state of the random generator, as a checkpoint of parameters and optimizer alone would.
FORGETFUL = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import torch
import train_gpt
from cloudckpt import CheckpointManager

class ForgetfulManager(CheckpointManager):
    def restore(self, *arguments, **options):
        before = torch.get_rng_state()
        restored = super().restore(*arguments, **options)
        torch.set_rng_state(before)
        return restored

train_gpt.CheckpointManager = ForgetfulManager
train_gpt.main()
"""


class Ran(NamedTuple):
    """One demo that has ended."""

    code: int
    output: str
    record: dict[str, Any]
    out: Path
    store: Path


@contextmanager
def started_demo(directory: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--out", str(directory / "out"), *options]
    search_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": search_path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def end_of(process: subprocess.Popen[str], directory: Path) -> Ran:
    output, _ = process.communicate(timeout=HANG_S)
    record_path = directory / "out" / "record.json"
    assert record_path.exists(), output
    record = json.loads(record_path.read_text())
    return Ran(process.returncode, output, record, directory / "out", directory / "store")


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Ran]:
    """Run the demo as it is, and with a training script that forgets something; both at once, to save time."""
    honest, forgetful = tmp_path_factory.mktemp("honest"), tmp_path_factory.mktemp("forgetful")
    script = forgetful / "train_forgetful.py"
    script.write_text(FORGETFUL)
    with (
        started_demo(honest, "--url", "store", *TINY) as first,
        started_demo(forgetful, "--url", "store", "--script", str(script), *TINY) as second,
    ):
        return end_of(first, honest), end_of(second, forgetful)


@pytest.fixture
def honest(demos: tuple[Ran, Ran]) -> Ran:
    return demos[0]


@pytest.fixture
def forgetful(demos: tuple[Ran, Ran]) -> Ran:
    return demos[1]


def test_a_killed_run_repeats_the_uninterrupted_run_bit_for_bit(honest: Ran) -> None:
    observed = honest.record["observed"]

    assert honest.code == 0, honest.output
    assert [row["b"] for row in observed["losses"]] == [row["a"] for row in observed["losses"]]
    assert {row["step"] for row in observed["losses"]} == set(range(60))
    assert observed["digests_a"] == observed["digests_b"]
    assert set(honest.record["checks"].values()) == {True}


def test_one_kill_hits_between_saves_and_one_during_a_save(honest: Ran) -> None:
    first, second, third = honest.record["observed"]["run_b"]
    (root,) = honest.store.glob("demo-*/b")
    half_written = root / second["half_written"]

    assert [one["ended_by"] for one in (first, second, third)] == [
        "SIGKILL between saves",
        "SIGKILL during a save",
        "itself",
    ]
    assert list(half_written.rglob("*.safetensors"))
    assert not (half_written / "manifest.json").exists()


def test_every_process_goes_on_after_the_newest_committed_save(honest: Ran) -> None:
    first, second, third = honest.record["observed"]["run_b"]

    assert (first["restored"], first["first_step"]) == (None, 0)
    assert second["first_step"] == first["saved_steps"][-1] + 1
    assert third["first_step"] == second["saved_steps"][-1] + 1
    assert second["first_step"] <= first["last_step"]


def test_the_listing_shows_the_newest_checkpoints_and_not_the_half_written_one(honest: Ran) -> None:
    listing = "\n".join(honest.record["cloudckpt_ls"])
    _, second, third = honest.record["observed"]["run_b"]
    listed = [(int(step), int(epoch)) for step, epoch in re.findall(r"^│ +(\d+) │ +(\d+) │", listing, re.MULTILINE)]
    half_written = tuple(map(int, re.findall(r"\d+", second["half_written"])))

    assert listed[-1] == (third["saved_steps"][-1], 3)
    assert half_written not in listed
    assert listing in honest.output


def test_the_record_names_versions_platform_and_data_path(honest: Ran) -> None:
    environment = honest.record["environment"]

    assert environment["package.torch"] == torch.__version__
    assert environment["python"] == f"{platform.python_implementation()} {platform.python_version()}"
    assert environment["data_path"] == "local"
    assert honest.record["target"] == "local disk"


def test_the_picture_is_written(honest: Ran) -> None:
    pytest.importorskip("matplotlib")

    assert (honest.out / "trajectories.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_does_not_restore_the_random_state_is_caught(forgetful: Ran) -> None:
    observed = forgetful.record["observed"]
    first_after_kill = observed["run_b"][1]["first_step"]

    assert forgetful.code == 1
    assert observed["differing_steps"][0] == first_after_kill
    assert {"model", "optimizer"} <= set(observed["differing_parts"])


def segment(events: Sequence[Event], *, kill: Kill | None = None) -> Segment:
    return Segment(events=events, kill=kill, half_written=None, left_behind=(), wall_s=1.0)


def steps(losses: Sequence[float], *, first: int = 0) -> list[Event]:
    return [Step(step=first + n, loss=loss.hex(), data_epoch=0, position=n + 1) for n, loss in enumerate(losses)]


def whole_run(losses: Sequence[float], digest: str = "d") -> list[Segment]:
    start = Start(first=0, restored=None, batches=9)
    return [segment([start, *steps(losses), End(parameters=1, digests={"model": digest})])]


@pytest.mark.parametrize("changed", [0.1 + 2**-56, -0.1, 0.1000001])
def test_a_loss_that_differs_in_any_bit_is_found(changed: float) -> None:
    verdict = compare(whole_run([1.0, 0.1]), whole_run([1.0, changed]))

    assert verdict.differing_steps == [1]
    assert not verdict.is_identical


def test_negative_zero_is_not_zero() -> None:
    assert compare(whole_run([0.0]), whole_run([-0.0])).differing_steps == [0]


def test_a_final_state_that_differs_is_found_though_all_losses_agree() -> None:
    verdict = compare(whole_run([1.0], "d"), whole_run([1.0], "e"))

    assert verdict.differing_parts == ["model"]
    assert not verdict.is_identical


def test_a_step_that_was_never_trained_is_found() -> None:
    verdict = compare(whole_run([1.0, 2.0, 3.0]), whole_run([1.0, 2.0]))

    assert verdict.missing == [2]
    assert not verdict.is_identical


def test_a_step_that_comes_out_differently_the_second_time_is_found() -> None:
    killed = segment([Start(first=0, restored=None, batches=9), *steps([1.0, 2.0])])
    again = segment([*steps([2.5], first=1), End(parameters=1, digests={"model": "d"})])

    assert compare(whole_run([1.0, 2.0]), [killed, again]).differing_steps == [1]


def outcome(run_b: Sequence[Segment], attempts: Sequence[Attempt] = ()) -> Outcome:
    run_a = whole_run([1.0, 2.0])
    return Outcome(run_a=run_a, run_b=run_b, comparison=compare(run_a, run_b), attempts=attempts)


def failed(checked: Outcome) -> list[str]:
    return [claim for claim, is_true in checked.checks().items() if not is_true]


def resumed_run(first: int, half_written: Attempt | None = None) -> list[Segment]:
    kill = Kill(when="during a save", step=1)
    events = [Start(first=0, restored=None, batches=9), *steps([1.0]), Saving(step=0), Saved(step=0, bytes=1, url="u")]
    killed = Segment(events=events, kill=kill, half_written=half_written, left_behind=(), wall_s=1.0)
    rest = steps([1.0, 2.0][first:], first=first)
    end = End(parameters=1, digests={"model": "d"})
    return [killed, segment([Start(first=first, restored="u", batches=9), *rest, end])]


def test_all_claims_hold_for_a_run_that_resumed_where_it_should() -> None:
    assert failed(outcome(resumed_run(first=1))) == []


def test_a_process_that_ignores_the_newest_save_is_caught() -> None:
    assert failed(outcome(resumed_run(first=0))) == ["every new process went on from the newest committed save"]


def test_a_half_written_attempt_that_is_committed_later_is_caught() -> None:
    half_written = Attempt(step=1, epoch=1, object_count=3, is_committed=False)
    committed = Attempt(step=1, epoch=1, object_count=9, is_committed=True)

    assert failed(outcome(resumed_run(1, half_written), [half_written])) == []
    assert failed(outcome(resumed_run(1, half_written), [committed])) == [
        "no half-written attempt became a checkpoint later"
    ]


def test_attempts_are_told_apart_by_their_manifest() -> None:
    keys = [
        "bucket/run/epochs/0000000001.json",
        "bucket/run/step-0000000009-e0001/0123456789abcdef/index.bin",
        "bucket/run/step-0000000009-e0001/0123456789abcdef/r00000-0000.safetensors",
        "bucket/run/step-0000000009-e0001/manifest.json",
        "bucket/run/step-0000000019-e0001/0123456789abcdef/r00000-0000.safetensors",
        "bucket/run/step-0000000019-e0001/.manifest.json.temporary",
    ]

    assert attempts_in(keys) == [
        Attempt(step=9, epoch=1, object_count=2, is_committed=True),
        Attempt(step=19, epoch=1, object_count=1, is_committed=False),
    ]


CHILD = """
import json, os, pathlib, sys, time
root = pathlib.Path(sys.argv[1])

def say(*events):
    os.write(1, "".join(json.dumps(event) + "\\n" for event in events).encode())

def step(n):
    return dict(event="step", step=n, loss="0x1p+0", data_epoch=0, position=n + 1)

def saving(n):
    return dict(event="saving", step=n)

def saved(n):
    return dict(event="saved", step=n, bytes=1, url="u")

def shard(n):
    path = root / f"step-{n:010d}-e0001/0123456789abcdef/r00000-0000.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")

def manifest(n):
    (root / f"step-{n:010d}-e0001/manifest.json").write_bytes(b"")

"""


def run_child(body: str, kill: Kill | None, directory: Path) -> Segment:
    """Follow a process that only pretends to train."""
    root = directory / "root"
    root.mkdir()
    command = [sys.executable, "-c", CHILD + body, str(root)]
    return run_segment(Job(command=command, environment={}, bucket=Bucket(str(root), {}), log=directory / "log"), kill)


def test_a_kill_during_a_save_spares_a_save_that_is_already_committed(tmp_path: Path) -> None:
    first_save = "shard(1); manifest(1); say(saving(1)); time.sleep(0.2); say(saved(1)); "
    body = first_save + "say(step(2), saving(2)); shard(2); time.sleep(60)"

    killed = run_child(body, Kill(when="during a save", step=1), tmp_path)

    assert killed.half_written == Attempt(step=2, epoch=1, object_count=1, is_committed=False)
    assert killed.events[-1] == Saving(step=2)


def test_a_kill_between_saves_waits_for_the_end_of_a_save(tmp_path: Path) -> None:
    body = (
        "say(step(1), saving(1)); shard(1); time.sleep(0.3); manifest(1); say(saved(1)); say(step(2)); time.sleep(60)"
    )

    killed = run_child(body, Kill(when="between saves", step=1), tmp_path)

    assert killed.last_step.step == 2
    assert killed.half_written is None


def test_a_kill_that_finds_no_moment_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="ended before it could be killed during a save"):
        run_child("say(step(1))", Kill(when="during a save", step=1), tmp_path)


def test_a_process_that_fails_by_itself_is_an_error_that_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="no such luck"):
        run_child("raise SystemExit('no such luck')", None, tmp_path)


def test_a_file_left_in_the_working_directory_is_seen(tmp_path: Path) -> None:
    body = "pathlib.Path('state.pt').write_bytes(b''); say(step(1))"

    assert run_child(body, None, tmp_path).left_behind == ["state.pt"]


def loader() -> Loader:
    return Loader(torch.arange(9 * 40), context=8, batch_size=4, seed=3)


def test_a_data_epoch_holds_every_window_once_and_the_next_one_is_in_another_order() -> None:
    batches = loader()
    first, second = ([next(batches)[0] for _ in range(len(batches))] for _ in range(2))

    assert torch.cat(first)[:, 0].sort().values.tolist() == list(range(0, 9 * 40, 9))
    assert torch.cat(second)[:, 0].sort().values.tolist() == list(range(0, 9 * 40, 9))
    assert not torch.equal(torch.cat(first), torch.cat(second))


@pytest.mark.parametrize("used", [0, 3, 10, 13])
def test_a_loader_continues_from_its_state_with_the_same_batches(used: int) -> None:
    original, restored = loader(), loader()
    for _ in range(used):
        next(original)
    restored.load_state_dict(original.state_dict())

    for _ in range(25):
        for ours, theirs in zip(next(restored), next(original), strict=True):
            assert torch.equal(ours, theirs)
    assert (restored.data_epoch, restored.position) == (original.data_epoch, original.position)


def test_a_line_that_is_no_event_is_refused() -> None:
    with pytest.raises(ValueError, match="event"):
        read_event(b'{"event": "boom"}')


@pytest.mark.slow
def test_the_demo_as_it_comes_holds_on_seaweedfs(tmp_path: Path) -> None:
    with started_demo(tmp_path) as process:
        ran = end_of(process, tmp_path)

    assert ran.code == 0, ran.output
    assert "SeaweedFS" in ran.record["target"]
    assert set(ran.record["checks"].values()) == {True}
    assert ran.record["observed"]["parameters"] > 2_000_000
