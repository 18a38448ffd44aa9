"""Turn the wheel and the sdist in `dist/` into a verdict: is all in them, and nothing else, and does the wheel work?

The wheel is installed alone into an empty environment outside of the tree, and used there as a user would.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IN_BOTH = {"cloudckpt/__init__.py", "cloudckpt/py.typed", "cloudckpt/format/FORMAT.md"}
IN_SDIST = IN_BOTH | {"LICENSE", "README.md", "pyproject.toml", "constraints.txt", "Makefile"}
IN_SDIST |= {"constraints-lowest.txt", "tests/conftest.py"}
PROGRAM = """
import sys
from pathlib import Path

import torch

import cloudckpt

assert Path(cloudckpt.__file__).is_relative_to(sys.prefix), cloudckpt.__file__
state = {"model": torch.nn.Linear(3, 2), "config": {"lr": 3e-4}}
saved = {name: value.clone() for name, value in state["model"].state_dict().items()}
with cloudckpt.CheckpointManager("run") as manager:
    manager.save(70707, state)
torch.nn.init.zeros_(state["model"].weight)
state["config"]["lr"] = 0.0
with cloudckpt.CheckpointManager("run") as manager:
    assert manager.restore(state).step == 70707
assert all(torch.equal(value, saved[name]) for name, value in state["model"].state_dict().items())
assert state["config"] == {"lr": 3e-4}
print(cloudckpt.__version__)
"""


def main() -> None:
    """Check what `python -m build` left; end with a message at the first fault."""
    (wheel,), (sdist,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    tracked = set(output_of(["git", "ls-files"], directory=ROOT).splitlines())
    check_wheel(wheel, tracked)
    check_sdist(sdist, tracked)
    with tempfile.TemporaryDirectory(prefix="cloudckpt-package-") as directory:
        use(wheel, Path(directory))
    print(f"{wheel.name} and {sdist.name} hold what they should, and the wheel serves a user")


def check_wheel(wheel: Path, tracked: set[str]) -> None:
    """Refuse a wheel that is not the package as it is tracked, and its own description."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    described = {name for name in names if name.startswith(f"{info}/")}
    refuse("the wheel lacks", (IN_BOTH | {f"{info}/licenses/LICENSE"}) - names)
    refuse(
        "the wheel differs from the package", (names - described) ^ {n for n in tracked if n.startswith("cloudckpt/")}
    )


def check_sdist(sdist: Path, tracked: set[str]) -> None:
    """Refuse an sdist that lacks what builds and tests the package, or holds what nobody tracks."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if not member.isdir()}
    refuse("the sdist lacks", IN_SDIST - names)
    refuse("the sdist holds what git does not", names - tracked - {"PKG-INFO"})


def refuse(what: str, names: set[str]) -> None:
    """End if there are names."""
    if names:
        raise SystemExit(f"{what}: {', '.join(sorted(names))}")


def use(wheel: Path, directory: Path) -> None:
    """Install the wheel where nothing else is; save, restore, and ask the command line about it."""
    output_of([sys.executable, "-m", "venv", "environment"], directory=directory)
    programs = directory / "environment" / "bin"
    python, command = str(programs / "python"), str(programs / "cloudckpt")
    pins = str(ROOT / "constraints.txt")
    output_of([python, "-m", "pip", "install", "--quiet", "-c", pins, str(wheel)], directory=directory)
    version = output_of([python, "-c", PROGRAM], directory=directory).strip()
    for start in ([command], [python, "-m", "cloudckpt"]):
        for arguments, wanted in (
            (["--version"], version),
            (["ls", "run"], "70707"),
            (["show", "run"], "model.weight"),
        ):
            found = output_of([*start, *arguments], directory=directory)
            if wanted not in found:
                raise SystemExit(f"{[*start, *arguments]} says nothing of {wanted}:\n{found}")


def output_of(command: Sequence[str], *, directory: Path) -> str:
    """Run a command in a directory; return what it prints, or end with what it complains of."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
