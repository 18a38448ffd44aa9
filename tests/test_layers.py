"""The law of the tree: imports point down only, and each layer stays without what it must not know.

A folder of the package is a room, and hands out by its `__init__` what others may use. A new room is registered in
`LAYERS` below.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "cloudckpt"

# From the bottom up. A room is a folder, or a module beside the folders; it may import from rooms of lower layers only.
LAYERS: tuple[frozenset[str], ...] = tuple(
    map(
        frozenset,
        (
            {"errors"},
            {"options", "deadline", "keys"},
            {"format"},
            {"threads", "late"},
            {"store"},
            {"ahead", "qualifying", "transfer"},
            {"ranks", "root"},
            {"preemption", "report", "state"},
            {"loading", "saving"},
            {"dcp"},
            {"checkpoint", "manager", "page"},
            {"convert", "copying"},
            {"__init__"},
            {"cli", "integrations"},
            {"__main__"},
        ),
    )
)
ROOMS = frozenset().union(*LAYERS)
PURE = frozenset().union(*LAYERS[:3])
FOLDERS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
KNOWS_RANKS = {"convert", "dcp", "integrations", "late", "loading", "ranks", "saving", "state"}
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


@cache
def _names() -> dict[str, set[str]]:
    """Return the dotted names that each module imports."""
    return {module: imported_names(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}


def _imports() -> dict[str, set[str]]:
    """Return the modules of the package that each module imports."""
    return {module: own_modules(names, set(MODULES) | ROOMS) - {module} for module, names in _names().items()}


def _rooms_of(module: str) -> Iterator[tuple[str, str]]:
    """Yield each room of another name that a module imports from, and the dotted name that it asks for."""
    room = module.partition(".")[0]
    for name in _names()[module]:
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if root == "cloudckpt" and target != room:
            yield target if target in ROOMS else "__init__", name


def test_every_room_is_registered_in_a_layer() -> None:
    homeless = [str(MODULES[module].relative_to(PACKAGE.parent)) for module in MODULES if _layer_of(module) is None]
    assert homeless == [], f"in no layer: {homeless}; register each room in LAYERS of tests/test_layers.py"


def test_imports_between_rooms_point_down_only() -> None:
    upward = [
        f"{module} asks {target} for {name}"
        for module in MODULES
        for target, name in _rooms_of(module)
        if (_layer_of(target) or 0) >= (_layer_of(module) or 0)
    ]
    assert upward == []


def test_a_folder_is_asked_only_for_what_its_face_hands_out() -> None:
    inside = [
        f"{module} reaches for {name}"
        for module in MODULES
        for target, name in _rooms_of(module)
        if target in FOLDERS and name.split(".")[2:] not in [[handed] for handed in _faces()[target]]
    ]
    assert inside == []


def test_a_face_says_what_its_folder_is_for_and_defines_nothing() -> None:
    for folder in sorted(FOLDERS):
        tree = ast.parse((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), folder
        kinds = {type(node) for node in tree.body[1:]}
        assert kinds <= {ast.ImportFrom, ast.Assign}, f"the face of {folder} does more than hand out names"


def test_what_a_face_hands_out_is_asked_for_by_another_room() -> None:
    asked = {name for module in MODULES for _, name in _rooms_of(module)}
    idle = [
        f"{folder}.{name}"
        for folder, names in _faces().items()
        for name in names
        if f"cloudckpt.{folder}.{name}" not in asked
    ]
    assert idle == []


@cache
def _faces() -> dict[str, tuple[str, ...]]:
    return {folder: tuple(importlib.import_module(f"cloudckpt.{folder}").__all__) for folder in sorted(FOLDERS)}


def test_no_modules_import_each_other_in_a_circle() -> None:
    # A face imports its own modules, and nobody imports a face from inside of its folder.
    try:
        TopologicalSorter(_imports()).prepare()
    except CycleError as exc:
        pytest.fail("a circle of imports: " + " → ".join(exc.args[1]))


def _offenders(allowed: set[str] | frozenset[str], forbidden: set[str]) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, names in _names().items()
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
    # A deadline may be asked for from now on; what is done with it is told the time.
    assert _offenders(rooms - PURE, IO_THREADS_CLOCK) == ["deadline imports time"]


def test_no_module_can_write_or_read_a_pickle_except_between_the_ranks_of_a_job_and_in_files_of_others() -> None:
    assert [module for module in _names() if module.startswith("convert.") and "pickle" in _names()[module]] == [
        "convert.dcp_metadata"
    ]
    assert _offenders({"convert", "ranks"}, {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}) == []


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
