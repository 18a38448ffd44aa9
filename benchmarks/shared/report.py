"""Turn what every report has into text: the machine, versions and command; goals; sizes.

Pure values but for a look at the machine: nothing is measured here.
"""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.shared.units import format_bytes

__all__ = ["MIB", "STOCK", "Goal", "about_machine", "goal_lines", "header", "versions"]

STOCK = "dcp"
MIB = 1 << 20
_PACKAGES = (
    *("cloudckpt", "torch", "numpy", "fsspec", "s3fs", "gcsfs", "aiobotocore", "obstore", "xxhash"),
    *("safetensors", "s3torchconnector", "torchsnapshot", "tensorizer", "runai-model-streamer", "fastsafetensors"),
    *("torch_checkpointing", "lightning"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What was promised, and what was found; `digits` of it are shown."""

    what: str
    target: str
    wanted: float
    found: float | None
    is_upper_bound: bool = False
    unit: str = ""
    digits: int = 1

    @property
    def is_met(self) -> bool | None:
        """None: not measured in this run."""
        if self.found is None:
            return None
        return self.found <= self.wanted if self.is_upper_bound else self.found >= self.wanted


def header(*, command: Sequence[str], runs: int, directory: Path, state: str = "") -> str:
    """Say on what, with what and how it was measured; of which state, if it is one for all that follows."""
    told = f"state: {state}; " if state else ""
    told += f"fresh processes for each number; median of {runs} (min–max); GB = 10^9 bytes of the state; "
    lines = [
        f"machine: {about_machine()}; `local` on {_filesystem_of(directory)}",
        f"versions: {', '.join(f'{name} {number}' for name, number in versions().items())}",
        f"{told}time of several ranks from barrier to barrier",
        f"command: `{shlex.join(command)}`",
    ]
    return "\n".join(f"- {line}" for line in lines)


def about_machine() -> str:
    """Say which processor, how many cores, how much memory and which system this is."""
    return f"{_processor()}, {os.cpu_count()} cores, {format_bytes(_memory_bytes())} memory, {platform.platform()}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of all that is measured."""
    return {"Python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def goal_lines(goals: Iterable[Goal]) -> str:
    """Write goals as a markdown table."""
    lines = ["### Goals", "", "| goal | target | wanted | measured | met |", "|---|---|---|---|---|"]
    for goal in goals:
        sign = "≤" if goal.is_upper_bound else "≥"
        found = "–" if goal.found is None else f"{goal.found:.{goal.digits}f}{goal.unit}"
        verdict = {None: "not measured", True: "yes", False: "**no**"}[goal.is_met]
        lines.append(f"| {goal.what} | {goal.target} | {sign} {goal.wanted:g}{goal.unit} | {found} | {verdict} |")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(from the source tree)" if package == "cloudckpt" else "(not installed)"


def _processor() -> str:
    lines = _lines("/proc/cpuinfo")
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _filesystem_of(directory: Path) -> str:
    mounts = [line.split() for line in _lines("/proc/mounts")]
    path = directory.resolve()
    holding = [mount for mount in mounts if path.is_relative_to(mount[1])]
    return max(holding, key=lambda mount: len(mount[1]))[2] if holding else "an unknown file system"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
