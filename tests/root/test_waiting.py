"""Who waits for a checkpoint gets the next one, soon after it was committed, and asks ever more seldom until then."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.root import Catalog, wait_for_next
from tests.root.test_known import attempt, commit
from tests.store.fault_store import Bucket, FaultStore


class Clock:
    """Time that passes in pauses alone; something may happen at a second."""

    def __init__(self, at_s: float = 0.0, event: Callable[[], object] = lambda: None) -> None:
        self.now_s = 0.0
        self.pauses: list[float] = []
        self._at_s = at_s
        self._event: Callable[[], object] | None = event

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now_s += seconds
        if self._event and self.now_s >= self._at_s:
            self._event()
            self._event = None


@pytest.fixture
def bucket() -> Bucket:
    bucket = Bucket()
    commit(bucket, 5, attempt(5))
    return bucket


def wait(bucket: Bucket, clock: Clock, **arguments: object) -> int:
    catalog = Catalog(FaultStore(bucket))
    return wait_for_next(catalog, clock=clock, sleep=clock.sleep, **arguments).step  # type: ignore[arg-type]


def test_what_is_above_the_step_already_is_not_waited_for(bucket: Bucket) -> None:
    clock = Clock()
    assert wait(bucket, clock, after=4) == 5
    assert clock.pauses == []


@pytest.mark.parametrize("after", [None, 5])
def test_the_next_one_is_waited_for_in_growing_pauses(bucket: Bucket, after: int | None) -> None:
    clock = Clock(300.0, lambda: commit(bucket, 6, attempt(6)))
    assert wait(bucket, clock, after=after) == 6
    assert clock.pauses == sorted(clock.pauses)
    assert clock.pauses[-1] == 30.0
    assert clock.now_s < 331


def test_the_first_one_of_a_root_is_waited_for() -> None:
    bucket = Bucket()
    assert wait(bucket, Clock(10.0, lambda: commit(bucket, 0, attempt(1)))) == 0


def test_waiting_ends_in_time_and_says_what_is_there(bucket: Bucket) -> None:
    clock = Clock(1e9)
    with pytest.raises(CheckpointNotFoundError, match=r"above step 5 .* in 100 s; the newest is of step 5"):
        wait(bucket, clock, after=5, timeout_s=100.0)
    assert clock.now_s == pytest.approx(100.0)
