"""The demo says the truth: it passes when nothing was lost, and fails when one thing was."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import demo
import fsdp_demo
import pytest
import runs
import torch
from bucket import Attempt, Bucket, attempts_in
from corpus import Windows, endless
from events import End, Event, Saved, Saving, Start, Step, read_event
from record import Outcome
from runs import DemoError, Interruption, Job, Segment, run_segment
from torch.utils.data import DataLoader
from trajectory import compare

from cloudckpt import ResumableSampler

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"

# Only a hang takes so long: a busy machine makes many processes that import PyTorch slow.
HANG_S = 900
pytestmark = pytest.mark.timeout(2 * HANG_S + 60)

TINY = (
    *("--steps", "80", "--save-every", "10", "--layers", "1", "--width", "32", "--batch-size", "32"),
    *("--shard-mib", "0.02"),
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
def honest(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The demo as it is."""
    directory = tmp_path_factory.mktemp("honest")
    with started_demo(directory, "--url", "store", *TINY) as process:
        return end_of(process, directory)


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The demo with a training script that forgets something."""
    directory = tmp_path_factory.mktemp("forgetful")
    script = directory / "train_forgetful.py"
    script.write_text(FORGETFUL)
    with started_demo(directory, "--url", "store", "--script", str(script), *TINY) as process:
        return end_of(process, directory)


@pytest.mark.slow
def test_an_interrupted_run_repeats_the_uninterrupted_run_bit_for_bit(honest: Ran) -> None:
    observed = honest.record["observed"]

    assert honest.code == 0, honest.output
    assert [row["b"] for row in observed["losses"]] == [row["a"] for row in observed["losses"]]
    assert {row["step"] for row in observed["losses"]} == set(range(80))
    assert observed["digests_a"] == observed["digests_b"]
    assert set(honest.record["checks"].values()) == {True}


@pytest.mark.slow
def test_kills_hit_between_saves_and_during_a_save_and_a_notice_comes_between_saves(honest: Ran) -> None:
    run_b = honest.record["observed"]["run_b"]
    (root,) = honest.store.glob("demo-*/b")
    half_written = root / run_b[1]["half_written"]

    assert [one["interrupted_by"] for one in run_b] == [
        "SIGKILL between saves",
        "SIGKILL during a save",
        "SIGTERM between saves",
        None,
    ]
    assert [one["code"] for one in run_b] == [-9, -9, 143, 0]
    assert list(half_written.rglob("*.safetensors"))
    assert not (half_written / "manifest.json").exists()


@pytest.mark.slow
def test_every_process_goes_on_after_the_newest_committed_save(honest: Ran) -> None:
    run_b = honest.record["observed"]["run_b"]

    assert (run_b[0]["restored"], run_b[0]["first_step"]) == (None, 0)
    assert [later["first_step"] for later in run_b[1:]] == [one["newest_step"] + 1 for one in run_b[:3]]
    assert all(later["first_step"] <= killed["last_step"] for killed, later in pairwise(run_b[:3]))


@pytest.mark.slow
def test_a_notice_in_the_middle_of_a_data_epoch_costs_no_step_and_says_what_time_is_left(honest: Ran) -> None:
    told, last = honest.record["observed"]["run_b"][2:]

    assert told["last_data_epoch"] > 1
    assert 0 < told["last_sample"] < told["samples_per_data_epoch"]
    assert last["first_step"] == told["last_step"] + 1
    assert told["saved_steps"][-1] == told["last_step"]
    assert 0 < told["took_to_end_s"] < 20
    assert [line for line in told["warnings"] if f"step {told['last_step']} is safe" in line]


@pytest.mark.slow
def test_the_listing_shows_the_newest_checkpoints_and_not_the_half_written_one(honest: Ran) -> None:
    listing = "\n".join(honest.record["cloudckpt_ls"])
    _, second, _, last = honest.record["observed"]["run_b"]
    listed = [(int(step), int(epoch)) for step, epoch in re.findall(r"^ *(\d+)  +(\d+)  ", listing, re.MULTILINE)]
    half_written = tuple(map(int, re.findall(r"\d+", second["half_written"])))

    assert listed[-1] == (last["saved_steps"][-1], 4)
    assert half_written not in listed
    assert listing in honest.output


@pytest.mark.slow
def test_the_record_names_versions_platform_and_data_path(honest: Ran) -> None:
    environment = honest.record["environment"]

    assert environment["package.torch"] == torch.__version__
    assert environment["python"] == f"{platform.python_implementation()} {platform.python_version()}"
    assert environment["data_path"] == "local"
    assert honest.record["target"] == "local disk"


@pytest.mark.slow
def test_the_picture_is_written(honest: Ran) -> None:
    pytest.importorskip("matplotlib")

    assert (honest.out / "trajectories.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_that_does_not_restore_the_random_state_is_caught(forgetful: Ran) -> None:
    observed = forgetful.record["observed"]
    first_after_kill = observed["run_b"][1]["first_step"]

    assert forgetful.code == 1
    assert observed["differing_steps"][0] == first_after_kill
    assert {"model", "optimizer"} <= set(observed["differing_parts"])


def segment(events: Sequence[Event], **facts: Any) -> Segment:
    return Segment(events=events, **facts)


def steps(losses: Sequence[float], *, first: int = 0) -> list[Event]:
    return [Step(step=first + n, loss=loss.hex(), data_epoch=0, position=n + 1) for n, loss in enumerate(losses)]


def whole_run(losses: Sequence[float], digest: str = "d") -> list[Segment]:
    start = Start(first=0, restored=None, samples=9)
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
    killed = segment([Start(first=0, restored=None, samples=9), *steps([1.0, 2.0])])
    again = segment([*steps([2.5], first=1), End(parameters=1, digests={"model": "d"})])

    assert compare(whole_run([1.0, 2.0]), [killed, again]).differing_steps == [1]


def outcome(run_b: Sequence[Segment], attempts: Sequence[Attempt] = ()) -> Outcome:
    run_a = whole_run([1.0, 2.0])
    return Outcome(run_a=run_a, run_b=run_b, comparison=compare(run_a, run_b), attempts=attempts)


def failed(checked: Outcome) -> list[str]:
    return [claim for claim, is_true in checked.checks().items() if not is_true]


def resumed_run(first: int, half_written: Attempt | None = None, **facts: Any) -> list[Segment]:
    """Step 0 is trained, saved and, if `first` is not 1, trained again or left out; step 1 goes the same way."""
    kill = Interruption(when="during a save", step=1)
    events = [Start(first=0, restored=None, samples=9), *steps([1.0]), Saving(step=0), Saved(step=0, bytes=1, url="u")]
    killed = segment(
        events, **{"interruption": kill, "code": -9, "newest_step": 0, "half_written": half_written, **facts}
    )
    rest = steps([1.0, 2.0][first:], first=first)
    end = End(parameters=1, digests={"model": "d"})
    return [killed, segment([Start(first=first, restored="u", samples=9), *rest, end])]


SAFE = ["2026-01-01 00:00:00,000 WARNING cloudckpt.manager rank 0: step 0 is safe, 19.5 s before the end"]
TOLD = {
    "interruption": Interruption(signal=signal.SIGTERM, when="between saves", step=0),
    "code": 143,
    "took_to_end_s": 1.5,
    "warnings": SAFE,
}
ENDED = "after SIGTERM the process ended by itself with 143, within its 20 s"
LOGGED = "and logged which step is safe, and how many seconds were left"
NO_STEP_LOST = "the SIGTERM cost no step: the next process trained the very next one"


def test_all_claims_hold_for_a_run_that_resumed_where_it_should() -> None:
    assert failed(outcome(resumed_run(first=1))) == []


def test_a_process_that_ignores_the_newest_save_is_caught() -> None:
    assert failed(outcome(resumed_run(first=0))) == ["every new process went on from the newest committed save"]


def test_all_claims_hold_for_a_run_that_heeded_its_notice() -> None:
    assert failed(outcome(resumed_run(1, **TOLD))) == []


@pytest.mark.parametrize(
    ("facts", "broken"),
    [
        pytest.param({"code": -9}, [ENDED], id="killed when its time was over"),
        pytest.param({"code": 0}, [ENDED], id="an end like any other"),
        pytest.param({"warnings": []}, [LOGGED], id="no word of the time left"),
        pytest.param({"warnings": [SAFE[0].replace("step 0", "step 1")]}, [LOGGED], id="another step"),
        pytest.param({"warnings": [SAFE[0].replace("19.5", "-0.5")]}, [LOGGED], id="no time left"),
    ],
)
def test_a_notice_that_was_not_heeded_as_it_should_be_is_caught(facts: dict[str, Any], broken: list[str]) -> None:
    assert failed(outcome(resumed_run(1, **{**TOLD, **facts}))) == broken


def test_a_step_that_a_notice_cost_is_caught() -> None:
    (told, last), (start, *events) = resumed_run(1, **TOLD), resumed_run(0)[1].events

    assert isinstance(start, Start)
    assert failed(outcome([replace(told, newest_step=None), replace(last, events=[start, *events])])) == [NO_STEP_LOST]


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

def start():
    return dict(event="start", first=0, restored=None, samples=9)

def step(n, position=1):
    return dict(event="step", step=n, loss="0x1p+0", data_epoch=0, position=position)

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


KILL_DURING = Interruption(when="during a save", step=1)
KILL_BETWEEN = Interruption(when="between saves", step=1)
NOTICE = Interruption(signal=signal.SIGTERM, when="between saves", step=1)


def run_child(body: str, interruption: Interruption | None, directory: Path) -> Segment:
    """Follow a process that only pretends to train."""
    root = directory / "root"
    root.mkdir()
    command = [sys.executable, "-c", f"{CHILD}say(start())\n{body}", str(root)]
    job = Job(command=command, environment={}, bucket=Bucket(str(root), {}), log=directory / "log")
    return run_segment(job, interruption)


def test_a_kill_during_a_save_spares_a_save_that_is_already_committed(tmp_path: Path) -> None:
    first_save = "say(step(1)); shard(1); manifest(1); say(saving(1)); time.sleep(0.2); say(saved(1)); "
    body = first_save + "say(step(2), saving(2)); shard(2); time.sleep(60)"

    killed = run_child(body, KILL_DURING, tmp_path)

    assert killed.half_written == Attempt(step=2, epoch=1, object_count=1, is_committed=False)
    assert killed.events[-1] == Saving(step=2)
    assert (killed.code, killed.newest_step) == (-9, 1)


def test_a_kill_during_a_save_hits_one_that_goes_on_behind_the_training(tmp_path: Path) -> None:
    body = "say(step(1), saving(1), step(2), step(3)); shard(1); time.sleep(60)"

    killed = run_child(body, KILL_DURING, tmp_path)

    assert (killed.last_step.step, killed.newest_step) == (3, None)
    assert killed.half_written == Attempt(step=1, epoch=1, object_count=1, is_committed=False)


def test_a_kill_between_saves_waits_for_the_end_of_a_save(tmp_path: Path) -> None:
    body = (
        "say(step(1), saving(1)); shard(1); say(step(2)); time.sleep(0.3); manifest(1); "
        "say(saved(1), step(3)); time.sleep(60)"
    )

    killed = run_child(body, KILL_BETWEEN, tmp_path)

    assert killed.last_step.step == 3
    assert killed.half_written is None


def test_a_kill_waits_for_the_middle_of_a_data_epoch(tmp_path: Path) -> None:
    killed = run_child("say(step(1, 9)); time.sleep(0.3); say(step(2, 3)); time.sleep(60)", KILL_BETWEEN, tmp_path)

    assert killed.last_step.step == 2


def test_a_notice_comes_when_the_newest_save_is_too_old_to_do(tmp_path: Path) -> None:
    body = """
import signal
def end(number, frame):
    print(f"0 WARNING heard {time.monotonic() - saved_s:.1f} s after the save", file=sys.stderr)
    say(step(3))
    sys.exit(143)

signal.signal(signal.SIGTERM, end)
say(step(1), saving(1)); shard(1); manifest(1)
saved_s = time.monotonic()
say(saved(1))
say(step(2)); time.sleep(60)
"""
    told = run_child(body, NOTICE, tmp_path)
    heard = re.search(r"heard (\d+\.\d) s after", "\n".join(told.warnings))

    assert heard is not None
    assert float(heard[1]) > 5.0
    assert (told.code, told.last_step.step, told.newest_step) == (143, 3, 1)


def test_a_process_that_does_not_end_in_time_after_a_notice_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "NOTICE_S", 0.5)
    body = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); say(step(1)); time.sleep(60)"

    assert run_child(body, NOTICE, tmp_path).code == -signal.SIGKILL


def test_a_kill_that_finds_no_moment_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="ended before SIGKILL during a save"):
        run_child("say(step(1))", KILL_DURING, tmp_path)


def test_a_process_that_fails_by_itself_is_an_error_that_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="no such luck"):
        run_child("raise SystemExit('no such luck')", None, tmp_path)


def test_a_file_left_in_the_working_directory_is_seen(tmp_path: Path) -> None:
    body = "pathlib.Path('state.pt').write_bytes(b''); say(step(1))"

    assert run_child(body, None, tmp_path).left_behind == ["state.pt"]


def batches(
    data: Windows, state: dict[str, object] | None = None
) -> tuple[ResumableSampler, Iterator[list[list[int]]]]:
    sampler = ResumableSampler(data, seed=3)
    if state:
        sampler.load_state_dict(state)
    pairs = endless(sampler, DataLoader(data, batch_size=4, sampler=sampler))
    return sampler, (inputs.tolist() for inputs, _ in pairs)


def test_the_targets_are_one_token_ahead_of_the_inputs() -> None:
    data = Windows(torch.arange(9 * 40 + 5), context=8)

    assert len(data) == 40
    assert [part.tolist() for part in data[1]] == [list(range(9, 17)), list(range(10, 18))]


def test_a_data_epoch_holds_every_window_once_and_the_next_one_is_in_another_order() -> None:
    _, endlessly = batches(Windows(torch.arange(9 * 40), context=8))
    first, second = ([window for batch in islice(endlessly, 10) for window in batch] for _ in range(2))

    assert sorted(window[0] for window in first) == list(range(0, 9 * 40, 9))
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("used", [0, 3, 10, 13])
def test_batches_go_on_from_the_state_of_their_sampler(used: int) -> None:
    data = Windows(torch.arange(9 * 40), context=8)
    sampler, original = batches(data)
    list(islice(original, used))
    other, resumed = batches(data, sampler.state_dict())

    assert list(islice(resumed, 25)) == list(islice(original, 25))
    assert (other.data_epoch, other.consumed) == (sampler.data_epoch, sampler.consumed)


def test_a_line_that_is_no_event_is_refused() -> None:
    with pytest.raises(ValueError, match="event"):
        read_event(b'{"event": "boom"}')


@pytest.mark.parametrize("demo", [demo, fsdp_demo], ids=["demo", "fsdp_demo"])
def test_ctrl_c_ends_a_demo_with_a_line_and_no_traceback(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "show", interrupted)

    assert demo.main(["--url", str(tmp_path), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "The demo was interrupted.\n"


@pytest.mark.slow
def test_the_demo_as_it_comes_holds_on_seaweedfs(tmp_path: Path) -> None:
    with started_demo(tmp_path) as process:
        ran = end_of(process, tmp_path)

    assert ran.code == 0, ran.output
    assert "SeaweedFS" in ran.record["target"]
    assert set(ran.record["checks"].values()) == {True}
    assert ran.record["observed"]["parameters"] > 2_000_000
