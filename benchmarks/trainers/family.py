"""Name and end a process with all that it has begun: by parent, and by the session that it leads."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

__all__ = ["end_family", "is_alive"]

# Processors may be busy when the last one is to end.
_LIMIT_S = 30.0


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that nobody has waited for yet does not."""
    words = _words(pid)
    return bool(words) and words[0] != "Z"


def end_family(pid: int, *, spare_first: bool = False) -> None:
    """Kill a process that runs and its family until none is left: one may begin another meanwhile.

    Args:
        pid: of a process of ours that runs, or that nobody has waited for, so that the number is still its own.
        spare_first: kill all but the process itself.
    """
    end_s = time.monotonic() + _LIMIT_S
    found = _family(pid)
    while time.monotonic() < end_s:
        alive = [one for one in found if is_alive(one) and not (spare_first and one == pid)]
        if not alive:
            return
        for one in alive:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        time.sleep(0.01)
        found = list(dict.fromkeys([*alive, *_family(pid)]))


def _family(pid: int) -> list[int]:
    children, found = defaultdict[int, list[int]](list), [pid]
    for entry in Path("/proc").iterdir():
        words = _words(int(entry.name)) if entry.name.isdigit() else []
        if words:
            children[int(words[1])].append(int(entry.name))
            if int(words[3]) == pid != int(entry.name):
                found.append(int(entry.name))
    for one in found:
        found += [child for child in children[one] if child not in found]
    return found


def _words(pid: int) -> list[str]:
    """Return what `/proc/PID/stat` has behind the name: state, parent, group, session, …"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
