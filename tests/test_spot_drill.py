"""A job on a machine that goes: whatever the store does, the newest step that could be saved is saved, and in time.

Lives drawn from seeds, on a clock that nobody waits for (`spot_drill/drill.py` says what is real and what is played).
To look at one: `live(draw(seed)).story`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.effort import diagonal, examples
from tests.spot_drill import sleepers
from tests.spot_drill.clockwork import Clockwork, Killed
from tests.spot_drill.drill import Word, draw, live
from tests.spot_drill.weather import Outage, Skies

_SEEDS = [pytest.param(seed, marks=() if seed < 20 else pytest.mark.slow) for seed in range(200)]


@pytest.mark.parametrize("seed", _SEEDS)
def test_the_newest_step_is_safe_when_the_machine_goes_and_nobody_waits_longer(seed: int) -> None:
    plan = draw(seed)
    life = live(plan)
    assert life.broken == [], "\n".join([f"seed {seed}: {plan}", *life.story])


@diagonal(
    "is_silent, is_blocking, is_async",
    [
        pytest.param(True, False, id="silent"),
        pytest.param(False, False, id="heard"),
        pytest.param(False, True, id="held"),
    ],
    [pytest.param(True, id="async"), pytest.param(False, id="sync")],
)
def test_a_save_under_way_has_its_patience_back_when_the_end_has_passed_and_was_false(
    is_silent: bool, is_blocking: bool, is_async: bool
) -> None:
    outage = Outage(start_s=5.0, stop_s=40.0, is_silent=is_silent)
    plan = replace(
        draw(0),
        step_s=1.0,
        every_steps=5,
        window_steps=1,
        is_async=is_async,
        leaves=False,
        skies=Skies(latency_s=0.05, shard_s=0.05, outages=[outage], clear_s=outage.stop_s),
        rumours=(Word(at_s=10.0, stop_s=20.0),),
        end=Word(at_s=200.0, stop_s=230.0),
        is_blocking=is_blocking,
    )
    life = live(plan)
    story = "\n".join(life.story)
    assert life.broken == [], story
    assert life.committed_s.get(5, 0.0) > 40.0, story


def test_a_life_is_the_same_each_time() -> None:
    for seed in range(examples(5, short=2)):
        first, second = live(draw(seed)), live(draw(seed))
        assert (first.called, first.asked_s, first.committed_s) == (second.called, second.asked_s, second.committed_s)


class TestClockwork:
    def test_time_goes_by_where_all_wait_and_nowhere_else(self) -> None:
        clock = Clockwork(0)
        seen: list[tuple[str, float]] = []
        with clock.wound_up("tests.spot_drill.sleepers"):
            thread = sleepers.begin(lambda: [sleepers.nap(3.0), seen.append(("thread", clock.now_s))])
            sleepers.nap(1.0)
            seen.append(("main", clock.now_s))
            thread.join()
        assert seen == [("main", 1.0), ("thread", 3.0)]
        assert clock.failure == ""

    def test_who_is_killed_never_comes_back_and_leaves_no_thread(self) -> None:
        clock = Clockwork(0)
        with clock.wound_up("tests.spot_drill.sleepers"):
            thread = sleepers.begin(lambda: sleepers.nap(1000.0))
            clock.at(5.0, clock.kill)
            with pytest.raises(Killed):
                sleepers.nap(10.0)
            with pytest.raises(Killed):
                sleepers.nap(0.0)
        assert clock.now_s == 5.0
        assert not thread.is_alive()

    def test_waiting_for_what_never_comes_is_told(self) -> None:
        clock = Clockwork(0)
        with clock.wound_up("tests.spot_drill.sleepers"), pytest.raises(Killed):
            sleepers.wait_for_ever()
        assert "all wait for ever: main" in clock.failure
