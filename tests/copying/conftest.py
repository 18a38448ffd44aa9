"""A root of three steps, made once; who changes it gets a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.copying.roots import save_steps


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1, 2 and 3 of epoch 1. Nobody changes it."""
    root = tmp_path_factory.mktemp("copying") / "root"
    save_steps(root, [1, 2, 3])
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "root"))
