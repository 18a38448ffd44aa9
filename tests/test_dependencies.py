"""What a user may install is what is tested: the lowest of each range, and nothing that the package does not name."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of a few packages the name that one imports is another; those of Google's come with gcsfs.
IMPORTED_AS = {"google-crc32c": "google_crc32c", "megatron-core": "megatron"}
COME_ALONG = {"botocore": "aiobotocore", "yarl": "aiohttp", "google": "gcsfs", "click": "typer"}
# For type checkers alone; and what is asked for by name where it is wanted and missing.
NOT_NEEDED = {"_typeshed", "typing_extensions", "awscrt", "opentelemetry"}


def bounds() -> dict[str, str]:
    """Return the lowest version of each dependency that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {text.split(">=")[0]: re.split(r"[,;]", text.split(">=")[1])[0] for text in project["dependencies"]}


def lowest() -> dict[str, str]:
    """Return what `make test-lowest` installs."""
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def imported(*, by_adapters: bool = False) -> set[str]:
    """Return the packages that the library imports, now or when they are needed; or those that its adapters do."""
    found: set[str] = set()
    for path in (ROOT / "cloudckpt").rglob("*.py"):
        if (path.parent.name == "integrations") != by_adapters:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"cloudckpt", *NOT_NEEDED}


def padded(version: str) -> list[int]:
    return ([int(part) for part in version.split(".")] + [0, 0])[:3]


def test_what_is_tested_as_the_lowest_is_what_is_promised() -> None:
    assert lowest().keys() == bounds().keys()
    # Of torch one release alone is tested: each is gigabytes.
    assert {name: padded(lowest()[name]) for name in bounds() if name != "torch"} == {
        name: padded(bound) for name, bound in bounds().items() if name != "torch"
    }


def test_what_is_imported_is_depended_on() -> None:
    owners = {IMPORTED_AS.get(one, one): one for one in bounds()} | COME_ALONG
    assert {name for name in imported() if owners.get(name) not in bounds()} == set()


def test_what_an_adapter_imports_an_extra_brings() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {re.split(r"[\[>]", text)[0] for texts in project["optional-dependencies"].values() for text in texts}
    extras = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in named}
    known = {IMPORTED_AS.get(one, one) for one in bounds()}
    assert imported(by_adapters=True) - known <= extras
