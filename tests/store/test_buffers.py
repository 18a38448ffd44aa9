"""New memory is nobody else's."""

from __future__ import annotations

import os
import sys

import pytest

from cloudckpt.store import new_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child has a copy")


def test_a_forked_child_neither_writes_to_memory_nor_makes_its_parent_copy_it() -> None:
    memory = memoryview(new_memory(1 << 16))
    memory[:4] = b"sent"
    child = os.fork()
    if not child:
        was = bytes(memory[:4])
        memory[:4] = b"torn"
        os._exit(was == bytes(4))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert memory[:4] == b"sent"
