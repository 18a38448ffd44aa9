"""Install the packages of other ways to save, each by itself: one that cannot be installed keeps none from the others.

    python benchmarks/peers/install.py        the extra `peers` of pyproject.toml, into the environment of this Python

Which were refused, and with what error, is written beside that environment, for the tables that name them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["NOT_INSTALLED", "install", "main"]

# What could not be installed, and why.
NOT_INSTALLED = Path(sys.prefix) / "peers-not-installed.json"
_PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def install(requirements: Sequence[str], run: Callable[[str], tuple[int, str]]) -> dict[str, str]:
    """Install each by `run`, which returns status and output; return the last word on each that was refused."""
    refused: dict[str, str] = {}
    for requirement in requirements:
        status, output = run(requirement)
        if status:
            name = re.split(r"[<>=\[;]", requirement)[0].strip().replace("_", "-")
            errors = [line for line in output.splitlines() if line.strip().lower().startswith("error")]
            refused[name] = (errors or output.strip().splitlines() or ["no message"])[-1].strip()
    return refused


def _run_pip(requirement: str) -> tuple[int, str]:
    # PIP_CONSTRAINT, which the Makefile sets, keeps torch and all else at what is measured with.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    """Install, tell what was refused, and return 0: what is not there is no fault of the benchmark."""
    extras = tomllib.loads(_PROJECT.read_text())["project"]["optional-dependencies"]
    refused = install(extras["peers"], _run_pip)
    NOT_INSTALLED.write_text(json.dumps(refused, indent=1))
    for name, why in refused.items():
        print(f"not installed: {name}: {why}; the other peers are measured without it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
