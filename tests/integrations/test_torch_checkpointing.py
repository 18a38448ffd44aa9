from __future__ import annotations

import signal

import pytest

pytest.importorskip("torch_checkpointing", reason="make integrations installs the frameworks")

from raw_access import FreshPrefix
from tests.integrations.interrupted import Run, assert_same_losses, run_program

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_that_is_killed_and_told_to_end_has_the_losses_of_one_left_alone(
    s3_url: FreshPrefix, ranks: int
) -> None:
    def run(name: str, **how: object) -> Run:
        root = FreshPrefix(url=f"{s3_url.url}/{name}", server=s3_url.server)
        return run_program("torch_checkpointing_loop.py", root, "--width", "4000", ranks=ranks, **how)  # type: ignore[arg-type]

    alone = run("a")
    between = run("b", strike=signal.SIGKILL, after=6)
    during = run("b", strike=signal.SIGKILL, when="during a save", after=7)
    told = run("b", strike=signal.SIGTERM, after=17)
    last = run("b")

    assert (alone.code, between.code, during.code, told.code, last.code) == (0, -9, -9, 143, 0)
    # What it was told in a save that is under way, that save answers.
    assert told.newest_step is not None
    assert max(told.losses) - told.newest_step < 4
    assert min(last.losses) == told.newest_step + 1
    assert told.took_to_end_s < 30
    assert_same_losses([between, during, told, last], alone)
