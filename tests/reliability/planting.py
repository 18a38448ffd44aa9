"""Plant one bug after the other in a copy of the package, and run the tests that must notice it there.

python planting.py BUGS   in the copy: a JSON list of bugs → a line of JSON for each: by which tests it was caught

This process imports only what is not ours, and forks for each bug, so that one costs what its tests cost.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

__all__ = ["Bug", "copy_tree", "planted"]

_TREES = ("cloudckpt", "tests", "localstack", "benchmarks", "examples")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """A mistake that somebody could make.

    Attributes:
        what: it is.
        file: below the package.
        old: the text that it takes the place of, which stands there once.
        new: the mistake.
        caught_by: a file of tests or one of them, below `tests/`, which fails with it.
    """

    what: str
    file: str
    old: str
    new: str
    caught_by: str


def copy_tree(source: Path, target: Path) -> None:
    """Copy what is needed to run tests, without what was compiled of it."""
    for tree in _TREES:
        shutil.copytree(source / tree, target / tree, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "pyproject.toml", target)


def planted(source: str, bug: Bug) -> str:
    """Return the source with the bug in it.

    Raises:
        AssertionError: there is no one place for it any more.
    """
    assert source.count(bug.old) == 1, f"{bug.what}: {bug.old!r} stands {source.count(bug.old)} times in {bug.file}"
    return source.replace(bug.old, bug.new)


def _failing(tests: str) -> list[str]:
    """Run tests in a child; return the names of those that failed, or that something else went wrong."""
    with tempfile.NamedTemporaryFile("r") as report:
        if not (child := os.fork()):
            try:
                _run(tests, report.name)
            finally:
                os._exit(int(pytest.ExitCode.INTERNAL_ERROR))
        _, status = os.waitpid(child, 0)
        told = report.read()
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return []
    return json.loads(told) if told else [f"pytest ended with {code}"]


def _run(tests: str, report: str) -> None:
    class Noting:
        """Notes which tests fail by themselves; one that cannot be set up shows nothing."""

        failed: list[str] = []  # noqa: RUF012 (of this process alone)

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                self.failed.append(report.nodeid if report.when == "call" else f"{report.nodeid} in {report.when}")

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{tests}"], [Noting()])
    Path(report).write_text(json.dumps(Noting.failed) if status == pytest.ExitCode.TESTS_FAILED else "")
    os._exit(int(status))


def main(bugs: Sequence[Bug]) -> None:
    import fsspec  # noqa: F401 (once for all)
    import numpy as np  # noqa: F401
    import torch.distributed.tensor  # noqa: F401

    for bug in bugs:
        path = Path("cloudckpt", bug.file)
        right = path.read_text(encoding="utf-8")
        path.write_text(planted(right, bug), encoding="utf-8")
        failing = _failing(bug.caught_by)
        path.write_text(right, encoding="utf-8")
        sys.stdout.write(json.dumps({"bug": asdict(bug), "failing": failing}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main([Bug(**one) for one in json.loads(sys.argv[1])])
