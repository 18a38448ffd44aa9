"""A training with FSDP2 goes on from its bucket on another number of ranks, and the demo of it says the truth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bucket import Attempt
from fsdp_demo import FIRST_LOSS_TOLERANCE, LOSS_TOLERANCE, Part, checks, torchrun
from fsdp_record import Event, Left, Restored, Saved, Step, read_record

from raw_access import FreshPrefix

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"

# Only a hang takes so long: a busy machine makes many processes that import PyTorch slow.
HANG_S = 900
pytestmark = pytest.mark.timeout(HANG_S + 60)

SEARCH_PATH = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
# Saved once, after step 5: what comes after it is trained again by the second start.
TINY = ("--steps", "10", "--save-every", "6", "--layers", "1", "--width", "32")


def trained(ranks: int, directory: Path) -> list[Event]:
    """Start the training on the directory's checkpoints, wait for its end, and return its record."""
    record, log = directory / f"{ranks}.jsonl", directory / f"{ranks}.log"
    arguments = [str(EXAMPLES / "train_fsdp.py"), "--url", str(directory / "root"), "--record", str(record), *TINY]
    with torchrun(ranks, arguments, log=log, PYTHONPATH=SEARCH_PATH) as process:
        code = process.wait(HANG_S)
    assert code == 0, log.read_text(errors="replace")[-3000:]
    return read_record(record)


def losses(events: Sequence[Event]) -> dict[int, float]:
    return {event.step: event.loss_value for event in events if isinstance(event, Step)}


@pytest.mark.slow
def test_one_rank_goes_on_where_two_have_saved(tmp_path: Path) -> None:
    before, after = trained(2, tmp_path), trained(1, tmp_path)
    (saved,) = [event for event in before if isinstance(event, Saved)]
    restored = after[0]

    assert isinstance(restored, Restored)
    assert (saved.step, saved.world_size, restored.step, restored.world_size) == (6, 2, 6, 1)
    assert set(saved.digests) == {"model", "optimizer", "scheduler", "sampler"}
    assert restored.digests == saved.digests
    assert list(losses(before)) == list(range(10))
    assert list(losses(after)) == [7, 8, 9]
    assert losses(after)[7] == pytest.approx(losses(before)[7], rel=FIRST_LOSS_TOLERANCE)
    for step, loss in losses(after).items():
        assert loss == pytest.approx(losses(before)[step], rel=LOSS_TOLERANCE)


@pytest.mark.slow
def test_the_demo_holds_on_s3_with_kills_on_four_ranks_and_an_end_on_two(s3_url: FreshPrefix, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "fsdp_demo.py"), "--url", s3_url.url, "--out", str(tmp_path)]
    options = json.dumps(s3_url.server.storage_options)
    environment = {**os.environ, "PYTHONPATH": SEARCH_PATH, "CLOUDCKPT_STORAGE_OPTIONS": options}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            output, _ = process.communicate(timeout=HANG_S)
        finally:
            # An interrupt, unlike a kill, lets it end its ranks.
            process.send_signal(signal.SIGINT)
    assert process.returncode == 0, output.decode(errors="replace")
    record = json.loads((tmp_path / "fsdp-record.json").read_text())

    assert record["target"] == "the given s3:// URL"
    assert set(record["checks"].values()) == {True}
    assert {row["step"] for row in record["losses"]} == set(range(record["size"]["steps"]))
    assert {row["ranks"] for row in record["losses"]} == {4, 2}
    assert [row["b"] for row in record["losses"] if row["is_like_a"]] == [
        row["a"] for row in record["losses"] if row["is_like_a"]
    ]


# -- the verdict, on runs made up here: A trains steps 0 to 3 on 4 ranks; B is killed in its save of step 1, goes on
# from step 0 on 4 ranks, is killed in its save of step 3, and ends on 2 ranks.

HALF_WRITTEN = [
    Attempt(step=1, epoch=1, object_count=3, is_committed=False),
    Attempt(step=3, epoch=2, object_count=3, is_committed=False),
]
STATES = [{"model": f"model-{step}", "optimizer": f"optimizer-{step}"} for step in range(4)]


def steps(first: int, last: int, ranks: int = 4) -> list[Event]:
    return [Step(step=step, world_size=ranks, loss=(4.0 - step).hex()) for step in range(first, last + 1)]


def saved(step: int, ranks: int = 4) -> Saved:
    return Saved(step=step, world_size=ranks, digests=STATES[step])


def restored(step: int, ranks: int = 4) -> Restored:
    return Restored(step=step, world_size=ranks, url="u", digests=STATES[step])


RUN_A = Part(ranks=4, events=[event for step in range(4) for event in (*steps(step, step), saved(step))])
RUN_B = [
    Part(ranks=4, events=[*steps(0, 0), saved(0), *steps(1, 1)], half_written=HALF_WRITTEN[0], newest_step=0),
    Part(
        ranks=4,
        events=[restored(0), *steps(1, 1), saved(1), *steps(2, 3)],
        half_written=HALF_WRITTEN[1],
        newest_step=1,
    ),
    Part(ranks=2, events=[restored(1, 2), *steps(2, 3, 2), saved(3, 2)], newest_step=3),
]

RESTORED = "restored on 4, 2 ranks, every tensor has the bits that were saved"
LIKE_A = "and, as long as only 4 ranks had trained, the bits of A where A saved that step"
SAME_RANKS = "on 4 ranks, every loss of B has the bits of A's"
FIRST = "on other ranks, the first loss is within 1e-06 of A's"
LATER = "and every later loss within 1e-05"
COMPLETE = "B trained every step that A trained"
NEWEST = "every group of ranks went on from the newest committed save"
TOGETHER = "a SIGTERM to one rank ended all with 143 after the same step, within 20 s"
NO_STEP_LOST = "and cost no step: the next group trained the very next one"
COMMITTED = "no half-written attempt became a checkpoint"


def failed(run_b: Sequence[Part], attempts: Sequence[Attempt] = HALF_WRITTEN, run_a: Part = RUN_A) -> list[str]:
    return [claim for claim, is_true in checks(run_a, run_b, attempts).items() if not is_true]


def with_event(part: int, place: int, **changes: object) -> list[Part]:
    """Return B with one of its events changed."""
    events = list(RUN_B[part].events)
    events[place] = msgspec.structs.replace(events[place], **changes)
    return [replace(one, events=events) if number == part else one for number, one in enumerate(RUN_B)]


def test_all_claims_hold_for_a_run_that_lost_nothing() -> None:
    assert failed(RUN_B) == []
    assert list(checks(RUN_A, RUN_B, HALF_WRITTEN)) == [
        RESTORED,
        LIKE_A,
        SAME_RANKS,
        FIRST,
        LATER,
        COMPLETE,
        NEWEST,
        TOGETHER,
        NO_STEP_LOST,
        COMMITTED,
    ]


def test_a_restored_bit_that_differs_is_caught() -> None:
    assert failed(with_event(2, 0, digests={**STATES[1], "optimizer": "other"})) == [RESTORED, LIKE_A]


def test_a_saved_state_that_is_not_that_of_a_is_caught_even_if_it_is_restored_exactly() -> None:
    other = msgspec.structs.replace(saved(1), digests={**STATES[1], "model": "other"})
    run_a = replace(RUN_A, events=[other if event == saved(1) else event for event in RUN_A.events])

    assert failed(RUN_B, run_a=run_a) == [LIKE_A]


@pytest.mark.parametrize(
    ("part", "place", "loss", "broken"),
    [
        pytest.param(1, 1, 3.0 + 4e-16, [SAME_RANKS], id="the last bit on as many ranks"),
        pytest.param(2, 1, 2.0 * (1 + 9e-7), [], id="within the first tolerance"),
        pytest.param(2, 1, 2.0 * (1 + 2e-6), [FIRST], id="beyond the first tolerance"),
        pytest.param(2, 2, 1.0 * (1 + 9e-6), [], id="within the later tolerance"),
        pytest.param(2, 2, 1.0 * (1 - 2e-5), [LATER], id="beyond the later tolerance"),
        pytest.param(2, 2, float("nan"), [LATER], id="not a number"),
    ],
)
def test_a_loss_is_held_to_the_bits_or_to_the_tolerance(part: int, place: int, loss: float, broken: list[str]) -> None:
    assert failed(with_event(part, place, loss=loss.hex())) == broken


def test_a_step_that_was_left_out_is_caught() -> None:
    assert failed([*RUN_B[:2], replace(RUN_B[2], events=RUN_B[2].events[:2])]) == [COMPLETE]


def test_a_group_that_ignores_the_newest_save_is_caught() -> None:
    stale = Part(ranks=2, events=[restored(0, 2), *steps(1, 3, 2)])

    assert failed([*RUN_B[:2], stale]) == [NEWEST]


def told_run(*, lost: int = 0, in_time: bool = True, code: int = 143, step: int = 1) -> list[Part]:
    """Rank 3 is told to end after step 1."""
    ends = [Left(step=1, world_size=4, rank=rank, code=143) for rank in range(3)]
    ends.append(Left(step=step, world_size=4, rank=3, code=code))
    first = [*steps(0, 0), saved(0), *steps(1, 1), saved(1), *ends]
    rest = [restored(1 - lost), *steps(2 - lost, 3), saved(3)]
    return [
        Part(ranks=4, events=first, told=3, ended_in_time=in_time, newest_step=1 - lost),
        Part(ranks=4, events=rest, newest_step=3),
    ]


def failed_of_told(run_b: Sequence[Part]) -> list[str]:
    return [claim for claim in failed(run_b) if claim in (TOGETHER, NO_STEP_LOST, COMPLETE, NEWEST)]


def test_a_notice_that_all_ranks_heeded_holds() -> None:
    assert failed_of_told(told_run()) == []


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param({"in_time": False}, id="too late"),
        pytest.param({"code": 1}, id="another status"),
        pytest.param({"step": 0}, id="another step"),
    ],
)
def test_a_rank_that_ends_otherwise_than_the_rest_is_caught(facts: dict[str, Any]) -> None:
    assert failed_of_told(told_run(**facts)) == [TOGETHER]


def test_a_step_that_a_notice_cost_is_caught() -> None:
    assert failed_of_told(told_run(lost=1)) == [NO_STEP_LOST]


def test_a_half_written_attempt_that_is_committed_later_is_caught() -> None:
    assert failed(RUN_B, [HALF_WRITTEN[0], replace(HALF_WRITTEN[1], is_committed=True)]) == [COMMITTED]


def test_a_line_of_the_record_that_is_not_complete_yet_is_left_out(tmp_path: Path) -> None:
    record = tmp_path / "record"
    lines = [msgspec.json.encode(event) for event in steps(0, 1)]
    record.write_bytes(lines[0] + b"\n" + lines[1][:10])

    assert read_record(record) == steps(0, 0)
