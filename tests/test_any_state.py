"""Whatever stands in a state comes back bit for bit, or one error names what does not, and nothing was changed."""

from __future__ import annotations

import concurrent.futures
import io
import itertools
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

import cloudckpt
from tests.any_state import shared
from tests.any_state.building import Built, build, train
from tests.any_state.looking import look, lost
from tests.any_state.modules import DTYPES, FLOAT32_ALONE, MODULES
from tests.any_state.objects import MAY_REFUSE
from tests.any_state.recipes import Change, ModuleRecipe, Recipe, changes, recipes
from tests.effort import examples
from tests.ranks.processes import PRELOADED

# The long profile takes minutes; a restore that hangs in the other process would take for ever.
pytestmark = pytest.mark.timeout(850)

_SAVED, _TWIN = 1, 2
_numbers = itertools.count()


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[concurrent.futures.Executor]:
    """Another process, for all examples."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "tests.any_state.looking"])
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        yield pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@dataclass
class Restored:
    """What became of a twin: how it looked before, after and one step later; or what was raised."""

    before: dict[str, Any]
    after: dict[str, Any]
    stepped: dict[str, Any]
    error: Exception | None = None


def restored_by_us(recipe: Recipe, change: Change, url: str) -> Restored:
    twin = build(recipe, _TWIN, change, is_twin=True)
    before = look(twin)
    try:
        cloudckpt.load(twin.state, url, progress="off")
    except Exception as exc:  # noqa: BLE001 (judged by the test, of whatever process)
        return Restored(before, look(twin), {}, exc.with_traceback(None))
    return Restored(before, look(twin), _stepped(twin))


def restored_by_torch(recipe: Recipe, data: bytes) -> Restored:
    """Do what a training program does that has `torch.save` alone; the twin is wrapped as what was saved."""
    twin = build(recipe, _TWIN, is_twin=True)
    before = look(twin)
    try:
        saved = torch.load(io.BytesIO(data), weights_only=False)
        for name, each in twin.objects().items():
            each.load_state_dict(saved[name])
    except Exception as exc:  # noqa: BLE001 (then we may refuse, too)
        return Restored(before, look(twin), {}, exc)
    twin.state.update({name: saved[name] for name in twin.values})
    return Restored(before, look(twin), _stepped(twin))


def saved_by_torch(built: Built) -> bytes:
    data = io.BytesIO()
    held = {name: each.state_dict() for name, each in built.objects().items()}
    torch.save({**held, **{name: built.value(name) for name in built.values}}, data)
    return data.getvalue()


def _stepped(built: Built) -> dict[str, Any]:
    train(built, 777)
    return look(built)


def _refused_by_the_save(built: Built, url: str) -> Exception | None:
    try:
        cloudckpt.save(built.state, url, progress="off")
    except cloudckpt.UnsupportedValueError as exc:
        return exc
    return None


def check(recipe: Recipe, change: Change, folder: Path, pool: concurrent.futures.Executor) -> None:
    """Save, restore into a twin, and compare with what was saved, and with what torch does."""
    url = str(folder / str(next(_numbers)))
    built = build(recipe, _SAVED)
    wanted = look(built)
    data = saved_by_torch(built)
    refused = _refused_by_the_save(built, url)
    assert not list(lost(look(built), wanted)), "saving changed the state"
    if refused is not None:
        event("not saved")
        assert recipe.may_not_be_saved, f"refused by the save: {refused}"
        assert any(name in str(refused) for name in built.values), f"no name in: {refused}"
        with pytest.raises(cloudckpt.CheckpointNotFoundError):
            cloudckpt.read(url)
        return
    arguments = (recipe, change, url)
    ours = pool.submit(restored_by_us, *arguments).result() if change.is_elsewhere else restored_by_us(*arguments)
    theirs = restored_by_torch(recipe, data)
    if ours.error is not None:
        event("refused")
        assert isinstance(ours.error, cloudckpt.CloudCkptError), f"{type(ours.error).__name__}: {ours.error}"
        assert not list(lost(ours.after, ours.before)), f"changed, though it was refused: {ours.error}"
        assert any(name in str(ours.error) for name in [*wanted, "all"]), f"no name in: {ours.error}"
        is_torch_right = theirs.error is None and theirs.after == wanted
        assert recipe.may_be_refused or not is_torch_right, f"torch restores it, and we refuse: {ours.error}"
        return
    event("restored")
    assert not recipe.may_be_refused or theirs.error is None, "torch refuses it, and we are silent"
    assert not (found := list(lost(ours.after, wanted))), found
    stepped = _stepped(built)
    # In another order the arithmetic may be another: of groups that share a rate the last one sets it, and a sum over
    # many parameters rounds otherwise. What was restored was compared above, whatever the order.
    if ours.stepped != theirs.stepped and not change.is_reordered:
        assert not list(lost(ours.stepped, stepped)), "another step"


# 2,000 in the long profile, in parts that none of the limits of a busy machine meets.
@pytest.mark.parametrize("part", range(8))
@settings(
    max_examples=examples(250, short=8),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
@given(recipe=recipes(), change=changes())
def test_any_state_is_restored_bit_for_bit_or_refused_by_name_and_unchanged(
    recipe: Recipe, change: Change, folder: Path, elsewhere: concurrent.futures.Executor, part: int
) -> None:
    check(recipe, change, folder, elsewhere)


# 2,000 in the long profile.
@settings(max_examples=examples(2000, short=60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=shared.shared_recipes())
def test_memory_that_parts_of_a_state_share_comes_back_in_each_of_them_or_is_refused_by_name_and_unchanged(
    recipe: shared.SharedRecipe, folder: Path
) -> None:
    url = str(folder / str(next(_numbers)))
    state, twin = shared.build(recipe, _SAVED), shared.build(recipe, _TWIN, is_twin=True)
    wanted, before = shared.look(state), shared.look(twin)
    cloudckpt.save(state, url, progress="off")
    assert not list(lost(shared.look(state), wanted)), "saving changed the state"
    error = None
    try:
        cloudckpt.load(twin, url, progress="off")
    except cloudckpt.StateMismatchError as exc:
        error = str(exc)
    if error is not None:
        event("refused")
        assert not recipe.is_alike, error
        assert "share memory" in error
        assert not list(lost(shared.look(twin), before)), f"changed, though it was refused: {error}"
        return
    event("restored")
    assert not (gone := list(lost(shared.look(twin), wanted))), gone


@settings(max_examples=examples(400, short=15), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=recipes(), data=st.data())
def test_without_strict_what_both_have_is_restored_and_the_rest_stays_and_is_named(
    recipe: Recipe, data: st.DataObject, folder: Path
) -> None:
    recipe = replace(recipe, statefuls=tuple(kind for kind in recipe.statefuls if kind not in MAY_REFUSE), copies=())
    assume(not recipe.may_not_be_saved)
    url = str(folder / str(next(_numbers)))
    built, twin = build(recipe, _SAVED), build(recipe, _TWIN, is_twin=True)
    used = {f"m{place}" for made in recipe.optimizers for place in made.modules}
    names = [name for name in [*built.objects(), *built.values] if name not in used]
    absent, extra = (set(data.draw(st.lists(st.sampled_from(names), max_size=2))) if names else set() for _ in range(2))
    absent -= extra
    common = [name for name in [*built.objects(), *built.values] if name not in absent | extra]
    assume(any(name in used or name[0] != "m" for name in common))
    built.hold("flat")
    twin.hold("flat")
    wanted, before = look(built), look(twin)
    cloudckpt.save({name: each for name, each in built.state.items() if name not in extra}, url, progress="off")
    given_state = {name: each for name, each in twin.state.items() if name not in absent}
    fit = cloudckpt.load(given_state, url, strict=False, progress="off").fit
    twin.state |= given_state
    assert not (gone := list(lost(look(twin), {**before, **{name: wanted[name] for name in common}}))), gone
    assert fit is not None
    assert {name.partition(".")[0] for name in fit.missing} == extra
    assert {name.partition(".")[0] for name in fit.unexpected} == absent


_FLOATS = st.sampled_from(["float64", "float32", "bfloat16"])
# The one that grows takes the saved dtype with the saved shape.
_ANY_FLOAT = [kind for kind in MODULES if kind not in FLOAT32_ALONE | {"growing buffer"}]


@settings(max_examples=examples(200, short=15), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(_ANY_FLOAT), saved=_FLOATS, live=_FLOATS, cast=st.booleans())
def test_a_module_of_another_dtype_is_filled_without_loss_or_as_torch_casts_where_that_is_asked_for(
    kind: str, saved: str, live: str, cast: bool, folder: Path
) -> None:
    url = str(folder / str(next(_numbers)))
    built = build(Recipe((ModuleRecipe(kind, saved),)), _SAVED)
    twins = [build(Recipe((ModuleRecipe(kind, live),)), _TWIN) for _ in range(2)]
    before = look(twins[0])
    twins[1].modules["m0"].load_state_dict(built.modules["m0"].state_dict())
    cloudckpt.save(built.state, url, progress="off")
    has_floats = any(
        each.is_floating_point() for each in built.modules["m0"].state_dict().values() if isinstance(each, torch.Tensor)
    )
    is_lossless = torch.promote_types(DTYPES[saved], DTYPES[live]) == DTYPES[live]
    if is_lossless or cast or not has_floats:
        cloudckpt.load(twins[0].state, url, cast=cast, progress="off")
        assert not (gone := list(lost(look(twins[0]), look(twins[1])))), gone
        return
    with pytest.raises(cloudckpt.StateMismatchError, match=r"m0.*cast=True") as raised:
        cloudckpt.load(twins[0].state, url, progress="off")
    assert saved in str(raised.value)
    assert live in str(raised.value)
    assert not list(lost(look(twins[0]), before))
