from __future__ import annotations

import signal

import pytest

pytest.importorskip("accelerate", minversion="1.15", reason="make integrations installs the frameworks")

from raw_access import FreshPrefix
from tests.integrations.interrupted import Run, assert_same_losses, run_program

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [(1, ()), (1, ("--stateful",)), (2, ()), (2, ("--fsdp",)), (2, ("--stateful",))],
    ids=["alone", "stateful", "ddp", "fsdp2", "stateful-ddp"],
)
def test_a_loop_that_is_killed_and_told_to_end_has_the_losses_of_one_left_alone(
    s3_url: FreshPrefix, ranks: int, arguments: tuple[str, ...]
) -> None:
    def run(name: str, **how: object) -> Run:
        root = FreshPrefix(url=f"{s3_url.url}/{name}", server=s3_url.server)
        return run_program("accelerate_loop.py", root, *arguments, "--width", "300", ranks=ranks, **how)  # type: ignore[arg-type]

    alone = run("a")
    between = run("b", strike=signal.SIGKILL, after=5)
    told = run("b", strike=signal.SIGTERM, after=8)
    during = run("b", strike=signal.SIGKILL, when="during a save", after=1)
    last = run("b")

    assert (alone.code, between.code, told.code, during.code, last.code) == (0, -9, 143, -9, 0)
    assert max(told.losses) == told.newest_step, "the step of the notice is saved"
    assert min(during.losses) == max(told.losses) + 1
    assert told.took_to_end_s < 30
    assert_same_losses([between, told, during, last], alone)
