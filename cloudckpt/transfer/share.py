"""Tell what of this machine is a rank's share: the memory that it may still take, the cores that may copy for it.

Memory is the least of what the machine and its control group leave.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["copying_threads", "free_bytes", "ranks_here"]

_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
_MEMINFO = Path("/proc/meminfo")


def free_bytes() -> int | None:
    """Return the bytes that could be taken without swapping, or None where the system does not say.

    `MemAvailable` of Linux's /proc/meminfo, and limit less use of the control group (versions 1 and 2), as
    proc(5) and the kernel's cgroup documents describe them.
    """
    found = [free for limit, use in _GROUPS if (free := _left(limit, use)) is not None]
    machine = _available()
    return min([*found, machine] if machine is not None else found, default=None)


def _left(limit: Path, use: Path) -> int | None:
    try:
        return max(0, int(limit.read_text()) - int(use.read_text()))
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return None


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def ranks_here() -> int:
    """Return how many ranks run on this machine, as torchrun says; 1 where nobody says."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(said)) if said.isdigit() else 1


def copying_threads() -> int:
    """Return how many threads of this rank may copy at once: its share of the cores that it may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks_here())
