"""What some ranks saved in one layout, other ranks restore in another, every tensor bit for bit.

A cell of the table is named by both ends: `fsdp2x4-to-ddpx2`. `single` is a process without any process group.
The default run takes one target of a source or two of each layout; `pytest -m slow` takes the rest of a diagonal, and
every source for each target.
"""

from __future__ import annotations

import json
import re
import struct
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cloudckpt
from cloudckpt import CheckpointManager
from tests.effort import first
from tests.ranks import models as rank_models
from tests.ranks.models import Reference, Replica, blank, build, differences, is_same, reference
from tests.ranks.processes import Crew

State = dict[str, Any]
Corner = tuple[str, int]  # a layout and how many ranks have it

SAVED_SEED, OTHER_SEED = 1, 2
VALUES: State = {
    "epoch": 7,
    "config": {"lr": 0.25, "betas": (0.5, 0.75), 3: None},
    "history": torch.arange(5, dtype=torch.float64) / 3,
}
OTHER_VALUES: State = {"epoch": 0, "config": {}, "history": torch.zeros(5, dtype=torch.float64)}

EVEN_ONLY = ("2d", "hsdp")
CORNERS: list[Corner] = [
    ("single", 1),
    *[
        (layout, size)
        for layout in rank_models.LAYOUTS
        if layout != "single"
        for size in ((2, 4) if layout in EVEN_ONLY else (1, 2, 3, 4))
    ],
]
# Each layout to itself over other numbers of ranks, then each layout as an end of another one. All but the first of a
# row are slow.
DIAGONAL = {
    "single": "fsdp2x4 single ddpx2 fsdp1x3 tpx2",
    "ddpx1": "ddpx3 fsdp1x2",
    "ddpx4": "single ddpx2 fsdp2x3",
    "fsdp1x1": "fsdp1x2",
    "fsdp1x2": "ddpx3 fsdp1x3",
    "fsdp1x4": "fsdp2x2 single fsdp1x2",
    "fsdp1flatx3": "fsdp1flatx2 tpx2",
    "fsdp1meshx3": "fsdp1meshx2 single",
    "fsdp2x1": "fsdp2x3",
    "fsdp2x2": "fsdp1x3 fsdp2x4",
    "fsdp2x3": "tpx2 fsdp2x1 fsdp2x4",
    "fsdp2x4": "ddpx2 single fsdp2x2",
    "hsdpx2": "hsdpx4",
    "hsdpx4": "fsdp2x3 single hsdpx2",
    "tpx1": "tpx4",
    "tpx2": "tpx3",
    "tpx4": "2dx4 single tpx2",
    "2dx2": "2dx4",
    "2dx4": "single 2dx2 ddpx3",
}


# Rows whose layout has another one on another number of ranks: all of them are slow.
TWINS = ("fsdp2x1", "fsdp2x2", "hsdpx4", "tpx1", "tpx2", "2dx2")


def _corner(name: str) -> Corner:
    layout, _, size = name.rpartition("x")
    return (layout, int(size)) if layout else (name, 1)


def _name(corner: Corner) -> str:
    return corner[0] if corner[0] == "single" else f"{corner[0]}x{corner[1]}"


def cells(*names: str, slow: Collection[str] = ()) -> pytest.MarkDecorator:
    """Parametrize by source and target, named `source-to-target`."""
    found = []
    for name in [*names, *slow]:
        source, target = name.split("-to-")
        marks = [pytest.mark.slow] if name in slow else []
        found.append(pytest.param(_corner(source), _corner(target), id=name, marks=marks))
    return pytest.mark.parametrize(("source", "target"), found)


CELLS = [f"{source}-to-{target}" for source, targets in DIAGONAL.items() for target in targets.split()]
FIRST = [f"{source}-to-{targets.split()[0]}" for source, targets in DIAGONAL.items() if source not in TWINS]
sources = pytest.mark.parametrize(
    "source",
    [pytest.param(_corner(name), id=name, marks=[pytest.mark.slow] if name in TWINS else []) for name in DIAGONAL],
)


# -- what the ranks do -------------------------------------------------------------------------------------------


_CREWS: dict[int, Crew] = {}


@pytest.fixture(scope="module", autouse=True)
def _end_crews() -> Iterator[None]:
    yield
    for crew in _CREWS.values():
        crew.end()


def on(corner: Corner, function: Callable[..., Any], *args: Any, timeout_s: float = 90.0) -> list[Any]:
    """Call `function(layout, *args)` on every rank; the error raised is of the rank that failed first."""
    layout, size = corner
    if layout == "single":
        return [function(layout, *args)]
    if size not in _CREWS or _CREWS[size].is_over:
        _CREWS[size] = Crew(size)
        _CREWS[size].run(_be_quiet)
    return _CREWS[size].run(function, layout, *args, timeout_s=timeout_s)


def _be_quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"torch\.")  # of FSDP1 as a whole, and of what it calls


def state_of(replica: Replica, values: State) -> State:
    return {"model": replica.module, "optimizer": replica.optimizer, **values}


def save(layout: str, kind: str, url: Path) -> int:
    return cloudckpt.save(state_of(build(layout, kind, SAVED_SEED), VALUES), url).total_bytes


def restore(layout: str, url: Path) -> list[str]:
    """Restore into a replica of other values and a fresh optimizer; return what differs from what was saved."""
    return _restore_into(blank(layout, "uneven", OTHER_SEED), url)


def restore_over(layout: str, url: Path) -> list[str]:
    """Restore into a replica that has been trained otherwise."""
    return _restore_into(build(layout, "uneven", OTHER_SEED), url)


def _restore_into(replica: Replica, url: Path) -> list[str]:
    state = state_of(replica, _copy(OTHER_VALUES))
    cloudckpt.load(state, url)
    return differences(replica.full(), reference("uneven", SAVED_SEED)) + _differing_values(state)


def _copy(values: State) -> State:
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in values.items()}


def _differing_values(state: State) -> list[str]:
    return [f"value {name}" for name in VALUES if not is_same(state.get(name), VALUES[name])]


def restore_each(layout: str, urls: dict[str, Path]) -> dict[str, Any]:
    """Restore from each source in turn; return what differs, or the error, where something does."""
    found: dict[str, Any] = {}
    for name, url in urls.items():
        try:
            found[name] = restore(layout, url)
        except Exception:  # noqa: BLE001 (it is the cell's outcome)
            found[name] = traceback.format_exc()
    return {name: outcome for name, outcome in found.items() if outcome}


Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return a function that saves in a layout on some ranks, once, and returns where."""
    root = tmp_path_factory.mktemp("reshard")
    totals: dict[str, list[int]] = {}

    def at(corner: Corner, kind: str = "uneven") -> Path:
        name = f"{kind}-{_name(corner)}"
        if name not in totals:
            totals[name] = []
            totals[name] = on(corner, save, kind, root / name)
        assert len(set(totals[name])) == 1, "every rank was told the same checkpoint, or its save failed before"
        return root / name

    return at


# -- the table ---------------------------------------------------------------------------------------------------


def test_the_reference_has_state_that_a_mistake_would_change() -> None:
    wanted = reference("uneven", SAVED_SEED)
    other = reference("uneven", OTHER_SEED)
    names = {f"model {name}" for name in wanted.tensors} | {f"state {name}" for name in wanted.state}
    assert names <= set(differences(other, wanted))
    assert {float(state["step"]) for state in wanted.state.values()} == {2.0, 3.0}
    assert all(bool(state[key].any()) for state in wanted.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert {tuple(tensor.shape)[:1] for tensor in wanted.tensors.values()} == {(5,), (7,), (1,), (3,), (6,), ()}


@cells(*FIRST, slow=[cell for cell in CELLS if cell not in FIRST])
def test_a_state_is_restored_bit_for_bit(saved: Saved, source: Corner, target: Corner) -> None:
    assert on(target, restore, saved(source)) == [[]] * target[1]


@pytest.mark.slow
@pytest.mark.timeout(800)
@pytest.mark.parametrize("target", CORNERS, ids=map(_name, CORNERS))
def test_a_state_is_restored_bit_for_bit_from_every_source(saved: Saved, target: Corner) -> None:
    urls = {_name(source): saved(source) for source in CORNERS}
    assert on(target, restore_each, urls, timeout_s=600) == [{}] * target[1]


@sources
def test_read_gives_the_full_state_without_a_process_group(saved: Saved, source: Corner) -> None:
    found: State = cloudckpt.read(saved(source))
    state = {name.removeprefix("model."): part for name, part in found["optimizer"]["state"].items()}
    groups = [
        {**group, "params": [name.removeprefix("model.") for name in group["params"]]}
        for group in found["optimizer"]["param_groups"]
    ]
    read = Reference(tensors=found["model"], state=state, groups=groups)
    assert differences(read, reference("uneven", SAVED_SEED)) == []
    assert _differing_values(found) == []


@cells("fsdp2x4-to-ddpx2", "ddpx4-to-tpx2", "hsdpx4-to-fsdp2x3", "single-to-fsdp1x2")
def test_what_was_trained_otherwise_is_overwritten(saved: Saved, source: Corner, target: Corner) -> None:
    assert on(target, restore_over, saved(source)) == [[]] * target[1]


def go_on(layout: str, url: Path) -> list[str]:
    """Take a step in a restored replica and in one that never left; return what differs after it."""
    restored, stayed = blank(layout, "uneven", OTHER_SEED), build(layout, "uneven", SAVED_SEED)
    cloudckpt.load(state_of(restored, _copy(OTHER_VALUES)), url)
    for replica in (restored, stayed):
        for parameter in replica.module.parameters():
            parameter.grad = parameter.detach() / 2
        replica.optimizer.step()
    return differences(restored.full(), stayed.full())


@pytest.mark.parametrize("layout", first(["ddp", "fsdp2", "tp", "2d", "hsdp", "fsdp1"], ["fsdp2", "tp"]))
def test_a_restored_optimizer_steps_as_one_that_never_left(saved: Saved, layout: str) -> None:
    assert on((layout, 2), go_on, saved(("fsdp2", 4))) == [[], []]


# -- what is written, and by whom --------------------------------------------------------------------------------


def chunks_of(shard: Path) -> dict[str, int]:
    """Return the chunks in a shard by name, `tensor[slices]`, with their bytes."""
    with shard.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}


def chunks_by_rank(url: Path) -> dict[int, list[tuple[str, int]]]:
    """Return what each rank wrote, from the shards alone, whose names say who wrote them."""
    found: dict[int, list[tuple[str, int]]] = {}
    for shard in url.rglob("*.safetensors"):
        named = re.fullmatch(r"r(\d+)-\d+\.safetensors", shard.name)
        assert named
        found.setdefault(int(named[1]), []).extend(chunks_of(shard).items())
    return found


def bytes_of(wanted: Reference, values: State) -> int:
    tensors = [*wanted.tensors.values(), *(part for state in wanted.state.values() for part in state.values())]
    tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


@sources
def test_every_chunk_is_written_once_by_one_rank(saved: Saved, source: Corner) -> None:
    chunks = [chunk for of_rank in chunks_by_rank(saved(source)).values() for chunk in of_rank]
    # An empty part of a tensor may be there on many ranks.
    times = Counter(name for name, size in chunks if size)
    assert [name for name, count in times.items() if count > 1] == []
    assert sum(size for _, size in chunks) == bytes_of(reference("uneven", SAVED_SEED), VALUES)


@pytest.mark.parametrize("layout", first(["ddp", "hsdp", "fsdp2", "tp", "2d", "fsdp1"], ["hsdp", "fsdp1"]))
def test_bytes_are_balanced_over_ranks(saved: Saved, layout: str) -> None:
    written = chunks_by_rank(saved((layout, 4), "tall"))
    sizes = [sum(size for _, size in written.get(rank, [])) for rank in range(4)]
    assert sum(sizes) == bytes_of(reference("tall", SAVED_SEED), VALUES)
    assert max(sizes) <= 1.5 * sum(sizes) / 4


# -- parts, several models, fresh optimizers ---------------------------------------------------------------------


def restore_model_alone(layout: str, url: Path) -> list[str]:
    """Restore all but the optimizer; it must stay as it is."""
    replica = build(layout, "uneven", OTHER_SEED)
    cloudckpt.load({"model": replica.module}, url, strict=False)
    found, kept = replica.full(), reference("uneven", OTHER_SEED)
    wanted = Reference(tensors=reference("uneven", SAVED_SEED).tensors, state=kept.state, groups=kept.groups)
    return differences(found, wanted)


@pytest.mark.parametrize("target", [("fsdp2", 2), ("ddp", 2), ("fsdp1", 2), ("single", 1)], ids=_name)
def test_a_model_alone_is_restored_from_a_whole_state(saved: Saved, target: Corner) -> None:
    assert on(target, restore_model_alone, saved(("fsdp2", 4))) == [[]] * target[1]


def _pair(replicas: list[Replica]) -> State:
    generator, critic = replicas
    optimizers = {"g": generator.optimizer, "c": critic.optimizer}
    return {"generator": generator.module, "critic": critic.module, "optimizers": optimizers, **_copy(VALUES)}


def save_pair(layout: str, url: Path) -> None:
    cloudckpt.save(_pair([build(layout, "uneven", seed) for seed in (3, 4)]), url)


def restore_pair(layout: str, url: Path) -> list[list[str]]:
    replicas = [blank(layout, "uneven", OTHER_SEED) for _ in range(2)]
    cloudckpt.load(_pair(replicas), url)
    return [
        differences(replica.full(), reference("uneven", seed)) for replica, seed in zip(replicas, (3, 4), strict=True)
    ]


@cells("fsdp2x3-to-ddpx2", "ddpx2-to-fsdp2x3", "fsdp1x2-to-fsdp1x3", "fsdp1x2-to-single")
def test_two_models_with_an_optimizer_each_are_restored(tmp_path: Path, source: Corner, target: Corner) -> None:
    on(source, save_pair, tmp_path / "c")
    assert on(target, restore_pair, tmp_path / "c") == [[[], []]] * target[1]


def save_unstepped(layout: str, url: Path) -> int:
    replica = blank(layout, "uneven", SAVED_SEED)
    cloudckpt.save(state_of(replica, VALUES), url)
    return len(replica.optimizer.state)


def restore_unstepped(layout: str, url: Path) -> int:
    replica = build(layout, "uneven", OTHER_SEED)
    cloudckpt.load(state_of(replica, _copy(OTHER_VALUES)), url)
    return len(replica.optimizer.state)


@pytest.mark.parametrize("layout", first(["ddp", "fsdp2", "tp", "fsdp1"], ["fsdp2", "fsdp1"]))
def test_an_optimizer_that_has_not_stepped_stays_so(tmp_path: Path, layout: str) -> None:
    assert on((layout, 3), save_unstepped, tmp_path / "c") == [0] * 3
    assert on((layout, 2), restore_unstepped, tmp_path / "c") == [0] * 2


@cells("fsdp1x3-to-fsdp2x2", "fsdp2x3-to-fsdp1x2", "ddpx2-to-fsdp1flatx2")
def test_an_optimizer_that_has_not_stepped_says_so_in_any_layout(
    tmp_path: Path, source: Corner, target: Corner
) -> None:
    assert on(source, save_unstepped, tmp_path / "c") == [0] * source[1]
    assert on(target, restore_unstepped, tmp_path / "c") == [0] * target[1]


def restore_refused(layout: str, url: Path) -> tuple[int, list[str]]:
    """Restore what does not fit, into a fresh and a trained replica; return what was changed in them."""
    fresh, trained = blank(layout, "uneven", OTHER_SEED), build(layout, "uneven", OTHER_SEED)
    for replica in (fresh, trained):
        with pytest.raises(cloudckpt.StateMismatchError, match="lost"):
            cloudckpt.load(state_of(replica, {**_copy(OTHER_VALUES), "lost": 1}), url)
    return len(fresh.optimizer.state), differences(trained.full(), reference("uneven", OTHER_SEED))


@pytest.mark.parametrize("layout", ["fsdp1", "fsdp1flat"])
def test_a_refused_restore_changes_no_optimizer(saved: Saved, layout: str) -> None:
    assert on((layout, 2), restore_refused, saved(("fsdp2", 4))) == [(0, []), (0, [])]


def save_one_optimizer_for_two(layout: str, url: Path) -> None:
    replica, other = blank(layout, "uneven", SAVED_SEED), nn.Linear(2, 2)
    both = torch.optim.SGD([*replica.module.parameters(), *other.parameters()])
    with pytest.raises(cloudckpt.OptionsError, match="of the FSDP module 'model' and others besides"):
        cloudckpt.save({"other": other, "model": replica.module, "both": both}, url)


def test_an_optimizer_over_an_fsdp1_module_and_more_is_refused(tmp_path: Path) -> None:
    on(("fsdp1", 2), save_one_optimizer_for_two, tmp_path / "c")
    assert not list(tmp_path.rglob("*.safetensors"))


UNUSED = "seven"


def _stepped_in_part(layout: str, seed: int) -> Replica:
    """Return a replica in which one unit never had a gradient."""
    replica = blank(layout, "uneven", seed)
    for name, parameter in replica.module.named_parameters():
        parameter.grad = None if UNUSED in name else parameter.detach() / 2
    replica.optimizer.step()
    return replica


def save_stepped_in_part(layout: str, url: Path) -> None:
    cloudckpt.save(state_of(_stepped_in_part(layout, SAVED_SEED), VALUES), url)


def restore_stepped_in_part(layout: str, url: Path) -> list[str]:
    """Return which parameters have state after a restore and should not, or lack it.

    A rank has no state for what FSDP1 keeps wholly on other ranks.
    """
    replica = blank(layout, "uneven", OTHER_SEED)
    cloudckpt.load(state_of(replica, _copy(OTHER_VALUES)), url)
    names = {parameter: rank_models.clean(name) for name, parameter in replica.module.named_parameters()}
    wanted = {parameter for parameter, name in names.items() if parameter.numel() and UNUSED not in name}
    return sorted(names[parameter] for parameter in wanted ^ replica.optimizer.state.keys())


@pytest.mark.parametrize("layout", first(["ddp", "fsdp2", "tp", "fsdp1"], ["fsdp2", "fsdp1"]))
def test_a_parameter_that_never_had_a_gradient_has_no_state_after_a_restore(tmp_path: Path, layout: str) -> None:
    on((layout, 3), save_stepped_in_part, tmp_path / "c")
    assert on((layout, 2), restore_stepped_in_part, tmp_path / "c") == [[], []]


# -- the manager -------------------------------------------------------------------------------------------------


def save_steps(layout: str, root: Path) -> list[tuple[int, int]]:
    replicas = [build(layout, "uneven", seed) for seed in (OTHER_SEED, SAVED_SEED)]
    with CheckpointManager(root) as manager:
        checkpoints = [manager.save(step, state_of(replica, VALUES)) for step, replica in enumerate(replicas)]
    return [(checkpoint.step, checkpoint.epoch) for checkpoint in checkpoints]


def restore_newest(layout: str, root: Path) -> tuple[int, list[str]]:
    replica = blank(layout, "uneven", OTHER_SEED)
    state = state_of(replica, _copy(OTHER_VALUES))
    with CheckpointManager(root) as manager:
        checkpoint = manager.restore(state)
    assert checkpoint is not None
    found = differences(replica.full(), reference("uneven", SAVED_SEED)) + _differing_values(state)
    return checkpoint.step, found


@cells("fsdp2x4-to-ddpx2", "ddpx2-to-fsdp2x4", "tpx2-to-single", "single-to-hsdpx2")
def test_a_manager_restores_the_newest_step_on_other_ranks(tmp_path: Path, source: Corner, target: Corner) -> None:
    assert on(source, save_steps, tmp_path / "root") == [[(0, 1), (1, 1)]] * source[1]
    assert on(target, restore_newest, tmp_path / "root") == [(1, [])] * target[1]


# -- devices -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_state_on_a_gpu_is_restored_on_the_hosts_of_other_ranks(tmp_path: Path) -> None:
    replica = build("single", "uneven", SAVED_SEED)
    replica.module.cuda()
    for state in replica.optimizer.state.values():
        state.update({key: state[key].cuda() for key in ("exp_avg", "exp_avg_sq")})
    cloudckpt.save(state_of(replica, VALUES), tmp_path / "c")
    assert on(("fsdp2", 2), restore, tmp_path / "c") == [[], []]
