"""New memory is nobody else's, and in pages that cost little."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from cloudckpt.store import HUGE_BYTES, new_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="as Linux tells it")


def test_a_forked_child_neither_writes_to_memory_nor_makes_its_parent_copy_it() -> None:
    memory = memoryview(new_memory(HUGE_BYTES))
    memory[:4] = b"sent"
    child = os.fork()
    if not child:
        was = bytes(memory[:4])
        memory[:4] = b"torn"
        os._exit(was == bytes(4))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert memory[:4] == b"sent"


def test_large_memory_asks_for_huge_pages_of_a_kind_that_the_kernel_has() -> None:
    memory = np.frombuffer(new_memory(2 * HUGE_BYTES), dtype=np.uint8)
    first, *about = next(lines for lines in mappings() if holds(lines[0], memory.ctypes.data))
    assert first.split()[1] == "rw-p"  # what may be shared has small ones
    flags = next(line for line in about if line.startswith("VmFlags:")).split()
    assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()


def holds(line: str, address: int) -> bool:
    first, _, last = line.split(maxsplit=1)[0].partition("-")
    return int(first, 16) <= address < int(last, 16)


def mappings() -> list[list[str]]:
    """Return the lines that the kernel has on each mapping of this process."""
    found: list[list[str]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            found.append([])
        found[-1].append(line)
    return found
