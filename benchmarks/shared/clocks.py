"""Turn `/proc` into the numbers of a measurement: wall time, processor time, resident memory. Linux only."""

from __future__ import annotations

import os
import re
import resource
import time
from pathlib import Path

__all__ = ["peak_bytes", "read_clocks", "reset_peak"]

_HIGH_WATER = re.compile(r"^(VmHWM|VmRSS):\s+(\d+) kB", re.MULTILINE)


def read_clocks() -> tuple[float, float, float]:
    """Wall time, this process's processor time (with its ended children), and the whole machine's, in seconds."""
    return time.perf_counter(), _cpu_s(), _machine_cpu_s()


def reset_peak() -> int:
    """Make the kernel forget the peak so far; return what is resident now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_bytes()  # without it, only growth above the old peak shows
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Return the most that was resident since the last reset, in bytes."""
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status_bytes(name: str) -> int:
    try:
        fields = dict(_HIGH_WATER.findall(Path("/proc/self/status").read_text()))
    except OSError:
        return 0
    return int(fields.get(name, 0)) * 1024


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _machine_cpu_s() -> float:
    """Processor seconds that the whole machine has worked; 0 where it does not tell."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return 0.0
    return (sum(ticks[:8]) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
