"""What `import cloudckpt` costs: what the program then asks for, and each name is the object that `__all__` means."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import cloudckpt
from tests.programs import run_to_end

DCP = "torch.distributed.checkpoint"  # most of the time that an import takes
AT_ONCE = {"cloudckpt.errors", "cloudckpt.options"}  # all other rooms are imported for a name of theirs
ENGINES = ["aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "obstore", "s3fs"]
COMMAND_LINE = ["rich", "typer"]

SAVE_AND_RESTORE = """
import torch
from cloudckpt import CheckpointManager

state = {"weights": torch.arange(4.0), "step": 7}
with CheckpointManager(DIRECTORY) as manager:
    manager.save(7, state)
state["weights"].zero_()
with CheckpointManager(DIRECTORY) as manager:
    assert manager.restore(state).step == 7
assert state["weights"].tolist() == [0.0, 1.0, 2.0, 3.0]
"""


def modules_after(source: str) -> set[str]:
    """Run `source` in a process of its own; return the names of all modules that are loaded there."""
    program = f"{source}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = run_to_end([sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def late_imports() -> dict[str, tuple[str, ...]]:
    """Return what `__init__` imports for type checkers alone, as room → names."""
    tree = ast.parse(Path(cloudckpt.__file__).read_text(encoding="utf-8"))
    blocks = [node.body for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for body in blocks for node in body if isinstance(node, ast.ImportFrom)]
    return {str(node.module).removeprefix("cloudckpt."): tuple(alias.name for alias in node.names) for node in imports}


def test_importing_the_package_loads_no_engine_and_nothing_of_torch() -> None:
    loaded = modules_after("import cloudckpt")
    assert loaded & {*ENGINES, *COMMAND_LINE, DCP, "torch", "numpy"} == set()


def test_a_save_and_a_restore_on_a_directory_load_no_engine_and_nothing_of_opentelemetry(tmp_path: Path) -> None:
    loaded = modules_after(f"import cloudckpt.report\nDIRECTORY = {str(tmp_path / 'root')!r}\n{SAVE_AND_RESTORE}")
    assert loaded & {*ENGINES, *COMMAND_LINE} == set()
    assert [name for name in loaded if "opentelemetry" in name] == []
    assert "cloudckpt.saving.lead" in loaded, "the names above are looked for in a program that saved"


def test_a_save_and_a_restore_of_plain_tensors_load_nothing_of_dcp_nor_of_distributed_tensors(tmp_path: Path) -> None:
    loaded = modules_after(f"DIRECTORY = {str(tmp_path / 'root')!r}\n{SAVE_AND_RESTORE}")
    assert loaded & {DCP, "torch.distributed.tensor", "torch.distributed.fsdp", "sympy"} == set()


@pytest.mark.parametrize("name", ["Options", "OptionsError", "RetryPolicy", "store"])
def test_words_and_stores_are_had_without_torch(name: str) -> None:
    assert "torch" not in modules_after(f"from cloudckpt import {name}")


def test_a_program_gets_what_a_type_checker_sees() -> None:
    assert late_imports() == cloudckpt._LATE


@pytest.mark.parametrize(("room", "name"), [(room, name) for room, names in late_imports().items() for name in names])
def test_a_name_is_its_rooms_own_object(room: str, name: str) -> None:
    assert getattr(cloudckpt, name) is getattr(importlib.import_module(f"cloudckpt.{room}"), name)


def test_all_is_every_public_name_and_each_can_be_had() -> None:
    late = [name for names in late_imports().values() for name in names]
    at_once = [name for name, value in vars(cloudckpt).items() if getattr(value, "__module__", "") in AT_ONCE]
    assert sorted({*late, *at_once}) == sorted(cloudckpt.__all__)
    assert set(cloudckpt.__all__) | {"__version__"} <= set(dir(cloudckpt))


def test_a_star_import_brings_all_names() -> None:
    names: dict[str, object] = {}
    exec("from cloudckpt import *", names)
    assert names.keys() - {"__builtins__"} == set(cloudckpt.__all__)


def test_no_module_hides_a_public_name() -> None:
    # Python sets a submodule as an attribute of its package, whenever somebody imports it.
    modules = {module.name for module in pkgutil.iter_modules(cloudckpt.__path__)}
    assert modules & {*cloudckpt.__all__, "__version__"} == set()


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'cloudckpt' has no attribute 'CheckpointManger'"):
        cloudckpt.CheckpointManger  # noqa: B018 (it is the look-up that raises)
    assert not hasattr(cloudckpt, "__path_of_no_kind__")


def test_the_version_is_the_installed_distributions() -> None:
    assert cloudckpt.__version__ == importlib.metadata.version("cloudckpt")


def test_an_error_crosses_to_a_process_that_has_imported_nothing() -> None:
    program = "import pickle, sys; error = pickle.load(sys.stdin.buffer); print(type(error).__name__, error.key)"
    error = cloudckpt.ChecksumError("damaged", key="step-1/a.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(error), capture_output=True, timeout=100, check=True
    )
    assert done.stdout.decode().split() == ["ChecksumError", "step-1/a.safetensors"]
