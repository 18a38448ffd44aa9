"""A forked child may use a store, its parent's or its own, whatever the parent was doing at that moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.effort import first
from tests.programs import run_forked

REPOSITORY = Path(__file__).resolve().parents[2]
_SCRIPT = """
import os, signal, sys, threading
import fsspec.asyn
from tests.store.engines import GCSFS, OBSTORE_GCS, OBSTORE_S3, S3FS
from tests.store.http_object_server import ObjectServer

def use(store, name):
    store.put(name, [memoryview(name.encode() * 1000)])
    assert bytes(store.get(name, start=0, stop=len(name))) == name.encode()
    assert name in [info.key for info in store.list().objects]
    store.delete([name])

def hold_locks(store):
    held = threading.Event()
    def hold():
        with fsspec.asyn.get_lock(), store._lock:
            held.set()
            threading.Event().wait(1)
    threading.Thread(target=hold, daemon=True).start()
    held.wait()

def live_as_child(engine, server, inherited):
    signal.alarm(40)
    own = engine.open(server)
    use(own, "own")
    use(inherited, "inherited")
    inherited.refresh()
    use(inherited, "refreshed")
    own.close()
    inherited.close()
    os._exit(7)

def family(engine, server):
    inherited = engine.open(server)
    use(inherited, "parent")
    if sys.argv[1] == "locks held":
        hold_locks(inherited)
    child = os.fork()
    if not child:
        live_as_child(engine, server, inherited)
    _, status = os.waitpid(child, 0)
    use(inherited, "parent again")
    inherited.close()
    return os.waitstatus_to_exitcode(status)

signal.alarm(100)
with ObjectServer() as server:
    print([family(engine, server) for engine in (S3FS, GCSFS, OBSTORE_S3, OBSTORE_GCS)])
"""


@pytest.mark.parametrize("moment", first(["idle", "locks held"], ["locks held"]))
def test_a_forked_child_uses_stores_as_its_parent_does(moment: str) -> None:
    done = run_forked("-c", _SCRIPT, moment, cwd=REPOSITORY)
    assert done.stdout.strip() == "[7, 7, 7, 7]", done.stderr
