"""Tell what of this machine is a rank's share: the memory that it may still take, the cores that may copy for it.

Memory is the least of what the machine, the process's control group and every group around that leave. Reads what the
kernel and the launcher say, each time anew; keeps nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

__all__ = ["copying_threads", "free_bytes", "ranks_here"]

# In the words of the two versions of control groups: where the groups' directories are, the files of a limit, that of
# the use, and what of memory.stat the kernel gives up before it lets anybody run short. Other caches are not counted.
_VERSIONS = (
    (("", "unified"), ("memory.max", "memory.high"), "memory.current", "inactive_file"),
    (("memory",), ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)
# How launchers tell a process how many they have started beside it: torchrun, Open MPI, MPICH and Intel MPI, MVAPICH,
# PALS (Cray), JSM (IBM); Slurm for a step, and for the whole job.
_COUNTS = (
    *("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"),
    *("PALS_LOCAL_SIZE", "JSM_NAMESPACE_LOCAL_SIZE"),
)
_SLURM_COUNTS = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")


def free_bytes(*, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that could be taken without swapping, or None where the system does not say.

    `MemAvailable` of Linux's /proc/meminfo, and for each control group of this process from its own up to the root:
    limit less use (versions 1 and 2), where file pages that the kernel can drop at once are not in use.
    """
    machine = _available(proc / "meminfo")
    found = [] if machine is None else [machine]
    for version, group in _groups(proc / "self/cgroup"):
        mounts, limits, use, reclaimable = _VERSIONS[version]
        for place in (groups / mount / level for mount in mounts for level in (group, *group.parents)):
            limit_bytes = min((read for name in limits if (read := _number(place / name)) is not None), default=None)
            use_bytes = _number(place / use)
            if limit_bytes is not None and use_bytes is not None:
                found.append(max(0, limit_bytes - use_bytes + _stat(place / "memory.stat", reclaimable)))
    return min(found, default=None)


def _groups(cgroup: Path) -> Iterator[tuple[int, PurePosixPath]]:
    """Yield the groups that limit this process's memory, as places in `_VERSIONS` and paths below a mount.

    In a container without a namespace of its own these are the host's paths, which do not exist below its mount; the
    walk up from there ends at the mount, and that is the container's group.
    """
    for line in _lines(cgroup):
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            yield int(bool(controllers)), PurePosixPath(path.lstrip("/"))


def _available(meminfo: Path) -> int | None:
    found = (line.split() for line in _lines(meminfo) if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in found), None)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return None


def _stat(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _lines(path) if line.startswith(f"{name} ")), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def ranks_here(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many ranks run on this machine, as their launcher says; 1 where nobody says.

    Launchers stand inside each other, and some repeat what another one said: the largest number counts.
    """
    # A step may have fewer tasks than its job; of several machines ("8(x2),4") the one with the most counts.
    slurm = next((environ[name] for name in _SLURM_COUNTS if environ.get(name)), "")
    said = [*(environ.get(name, "") for name in _COUNTS), *re.sub(r"\(x\d+\)", "", slurm).split(",")]
    return max(1, 1, *(int(count) for count in said if count.strip().isdecimal()))


def copying_threads() -> int:
    """Return how many threads of this rank may copy at once: its share of the cores that it may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks_here())
