"""The law of the tree: imports point down only, and each layer stays without what it must not know.

A new module is registered in `LAYERS` below, in the layer whose description fits it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "cloudckpt"

# From the bottom up. A module may import from its own layer (without a circle) and from those below it.
# A package (`store`, `integrations`) stands for all of its modules.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "options"}),
    # pure values
    frozenset(
        {"boxes", "builder", "codec", "cover", "dedup", "header", "index", "index_v1", "keys", "layout", "manifest"}
    )
    | {"advice", "passing", "record", "retention", "section", "shard", "tiling", "tree"},
    # object verbs
    frozenset({"store"}),
    # byte pumps
    frozenset({"download", "host_memory", "pool", "scratch", "staging", "upload"}),
    # what exists
    frozenset({"catalog", "sweep"}),
    # what ranks tell each other
    frozenset({"group", "link", "packet", "pulse", "vote"}),
    # the rooms that know DCP's types, and the record of the environment that they write
    frozenset({"environment", "input", "landing", "output", "reader", "snapshot", "source", "tally", "writer"}),
    # the caller's objects as named tensors and values
    frozenset({"accumulation", "entry", "optimizers", "per_rank", "restore", "resume", "sampler", "state"}),
    # what leads the ranks through a save or a restore
    frozenset({"loading", "saving"}),
    # policy, and the functions for a user without a manager
    frozenset({"background", "checkpoint", "manager", "meter", "pruning", "schedule", "preemption"})
    | {"notices", "notices_cloud", "notices_signals", "notices_slurm"},
    # the package itself: what it exports
    frozenset({"__init__"}),
    frozenset({"integrations"}),
    frozenset({"__main__", "cli"}),
)
ROOMS = frozenset().union(*LAYERS)
PURE = frozenset().union(*LAYERS[:2])
KNOWS_RANKS = {
    "accumulation",
    "checkpoint",
    "entry",
    "group",
    "input",
    "landing",
    "link",
    "loading",
    "manager",
    "optimizers",
    "output",
    "packet",
    "per_rank",
    "reader",
    "saving",
    "source",
    "state",
    "tally",
    "vote",
    "writer",
}
ENGINES = {"aiobotocore", "boto3", "botocore", "fsspec", "gcsfs", "google", "obstore", "s3fs"}
IO_THREADS_CLOCK = {"asyncio", "concurrent", "multiprocessing", "queue", "requests", "shutil", "socket"} | {
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "urllib.request",
}


def _modules() -> dict[str, Path]:
    """Module name below the package, `store.base` or `__init__`, → its source."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _layer_of(module: str) -> int | None:
    room = module.partition(".")[0]
    return next((number for number, rooms in enumerate(LAYERS) if room in rooms), None)


def _names_in(node: ast.AST) -> Iterator[str]:
    """Yield the absolute dotted names that one syntax node imports, or reaches into as `torch.…`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        yield f"torch.{node.attr}"


def imported_names(source: str) -> set[str]:
    """Return every dotted name that `source` imports anywhere, also inside functions and for types only."""
    return {name for node in ast.walk(ast.parse(source)) for name in _names_in(node)}


def own_modules(names: set[str], known: set[str]) -> set[str]:
    """Return which modules of the package stand behind imported names; `__init__` for what the package exports."""
    own = set()
    for name in names:
        root, _, rest = name.partition(".")
        if root != "cloudckpt":
            continue
        while rest and rest not in known:
            rest = rest.rpartition(".")[0]
        own.add(rest or "__init__")
    return own


def is_inside(name: str, package: str) -> bool:
    """Tell whether a dotted name is `package` or something in it."""
    return name == package or name.startswith(package + ".")


NAMES = {module: imported_names(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}
IMPORTS = {module: own_modules(names, set(MODULES) | ROOMS) - {module} for module, names in NAMES.items()}


def test_every_module_is_registered_in_a_layer() -> None:
    homeless = [str(MODULES[module].relative_to(PACKAGE.parent)) for module in MODULES if _layer_of(module) is None]
    assert homeless == [], f"in no layer: {homeless}; register each in LAYERS of tests/test_layers.py"


def test_imports_point_down_only() -> None:
    upward = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in sorted(targets)
        if (_layer_of(target) or 0) > (_layer_of(module) or 0)
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as exc:
        pytest.fail("a circle of imports: " + " → ".join(exc.args[1]))


def _offenders(allowed: set[str] | frozenset[str], forbidden: set[str]) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, names in NAMES.items()
        if module.split(".")[0] not in allowed
        for name in sorted(names)
        if any(is_inside(name, package) for package in forbidden)
    ]


def test_only_the_rooms_that_know_ranks_import_torch_distributed() -> None:
    assert _offenders(KNOWS_RANKS, {"torch.distributed"}) == []


def test_only_the_stores_import_a_storage_engine() -> None:
    assert _offenders({"store"}, ENGINES) == []


def test_the_stores_know_nothing_of_tensors() -> None:
    assert _offenders(set(MODULES) - {"store"}, {"torch"}) == [], "a store moves bytes"


def test_pure_values_import_no_io_no_threads_and_no_clock() -> None:
    rooms = {module.split(".")[0] for module in MODULES}
    assert _offenders(rooms - PURE, IO_THREADS_CLOCK) == []


def test_no_module_can_write_or_read_a_pickle_except_between_the_ranks_of_a_job() -> None:
    assert _offenders({"group"}, {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}) == []


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("from cloudckpt import codec", {"codec"}),
        ("from cloudckpt import CheckpointManager", {"__init__"}),
        ("import cloudckpt", {"__init__"}),
        ("import cloudckpt.store.base", {"store.base"}),
        ("from cloudckpt.store import open_store", {"store"}),
        ("from cloudckpt.store.base import Store", {"store.base"}),
        ("def late():\n    from cloudckpt.codec import encode", {"codec"}),
        ("import cloudckpter", set()),
    ],
)
def test_an_import_is_seen_in_every_form_and_place(source: str, modules: set[str]) -> None:
    assert own_modules(imported_names(source), {"__init__", "codec", "store", "store.base"}) == modules


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.checkpoint import Metadata",
        "import torch\ntorch.distributed.get_rank()",
    ],
)
def test_torch_distributed_is_seen_in_every_form(source: str) -> None:
    assert any(is_inside(name, "torch.distributed") for name in imported_names(source))
