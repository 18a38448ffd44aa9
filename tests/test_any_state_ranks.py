"""Whatever two ranks hold together comes back bit for bit in any other layout, or is refused by name and unchanged."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, event, given, settings

import cloudckpt
from tests.any_state.looking import lost
from tests.any_state.sharded import SIZE, RankRecipe, build, look, make_differ, rank_recipes, train
from tests.effort import examples
from tests.ranks.processes import Crew

# The long profile takes minutes where the machine is busy.
pytestmark = pytest.mark.timeout(850)

_SAVED, _TWIN = 1, 2
_numbers = itertools.count()


@dataclass
class Found:
    """What one rank saw: what was saved and what came back, now and a step later; or what was raised where."""

    wanted: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    stepped: dict[str, Any]
    wanted_stepped: dict[str, Any]
    is_different: bool = False
    save_error: str | None = None
    load_error: str | None = None
    is_ours: bool = True


def _tried(call: Any) -> tuple[str | None, bool]:
    try:
        call()
    except cloudckpt.CloudCkptError as exc:
        return str(exc), True
    except Exception:  # noqa: BLE001 (told, and judged by the test)
        return traceback.format_exc(), False
    return None, True


def run(recipe: RankRecipe, url: str) -> Found:
    """Save and restore on this rank, and compare with what one process has of the same."""
    part, alone = build(recipe, _SAVED), build(recipe.plain(), _SAVED)
    is_different = make_differ(part, recipe)
    is_turned = recipe.differs == "order" and dist.get_rank() == 1
    save_error, is_ours = _tried(lambda: cloudckpt.save(part.state(is_turned=is_turned), url, progress="off"))
    if recipe.differs == "ddp buffers" and dist.get_rank() == 1:
        part = build(recipe, _SAVED)  # rank 0's buffers are what is saved
    wanted = look(alone)
    if save_error is not None:
        return Found(wanted, {}, {}, {}, {}, is_different, save_error, is_ours=is_ours)
    twin = build(recipe, _TWIN, is_twin=True)
    before = look(twin)
    state = twin.state(is_turned=is_turned)
    load_error, is_ours = _tried(lambda: cloudckpt.load(state, url, progress="off"))
    twin.values = [state["values"][f"v{place}"] for place in range(len(twin.values))]
    after = look(twin)
    train(twin, 777)
    train(alone, 777)
    stepped, wanted_stepped = look(twin), look(alone)
    if recipe.is_tied:  # what the object was handed is its own, and does not follow the module
        del stepped["count"], wanted_stepped["count"]
    return Found(wanted, before, after, stepped, wanted_stepped, is_different, None, load_error, is_ours)


@pytest.fixture(scope="module")
def pair() -> Iterator[Crew]:
    """Two ranks for all examples."""
    crew = Crew(SIZE)
    crew.run(torch.set_num_threads, 1)
    yield crew
    crew.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def check(recipe: RankRecipe, folder: Path, pair: Crew) -> None:
    """Save, restore and compare on two ranks."""
    found = pair.run(run, recipe, str(folder / str(next(_numbers))))
    refusals = [each.save_error for each in found]
    is_refused = recipe.is_refused and any(each.is_different for each in found)
    assert all(each.is_ours for each in found), [each.save_error or each.load_error for each in found]
    if any(refusals):
        event("not saved")
        assert is_refused, refusals
        assert all(refusals), "one rank does not know"
        named = "count" if recipe.differs == "state" else "m"
        assert all(named in str(refusal) and "rank" in str(refusal) for refusal in refusals), refusals
        return
    assert not is_refused, "what differs between ranks was saved without a word"
    for each in found:
        if each.load_error is not None:
            assert not (changed := list(lost(each.after, each.before))), (each.load_error, changed)
            raise AssertionError(each.load_error)
        assert not (gone := list(lost(each.after, each.wanted))), gone
        assert not (gone := list(lost(each.stepped, each.wanted_stepped))), ("another step", gone)
    event("restored")


@settings(
    max_examples=examples(100, short=10),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
@given(recipe=rank_recipes())
def test_any_state_of_two_ranks_is_restored_bit_for_bit_in_any_layout(
    recipe: RankRecipe, folder: Path, pair: Crew
) -> None:
    check(recipe, folder, pair)
