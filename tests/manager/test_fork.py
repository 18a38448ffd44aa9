"""A forked child may read by the manager that it has inherited, and end; to save it opens one of its own."""

from __future__ import annotations

from pathlib import Path

from tests.programs import run_forked

REPOSITORY = Path(__file__).resolve().parents[2]
_SCRIPT = """
import os, signal, sys, threading
import torch
from cloudckpt import CheckpointManager, OptionsError
from cloudckpt import threads

def hold_locks():
    held = threading.Event()
    def hold():
        taken = [threads._registering, *filter(None, (one() for one in threads._LOCKS))]
        for one in taken:
            one.acquire()
        held.set()
        threading.Event().wait(1)
        for one in taken:
            one.release()
    threading.Thread(target=hold, daemon=True).start()
    held.wait()

def refusals(manager, state):
    deleting, preparing = lambda step, _: manager.delete(1), lambda _, state: manager.prepare(state)
    for call in (manager.save, manager.async_save, deleting, preparing):
        try:
            call(2, state)
        except OptionsError as exc:
            yield "open a manager of its own in this process" in str(exc)

def live_as_child(manager, root):
    signal.alarm(20)
    state = {"w": torch.zeros(3)}
    found = [*refusals(manager, state), manager.restore(state).step, manager.latest_step(), manager.should_save(2)]
    manager.wait()
    manager.close()
    with CheckpointManager(root, progress="off") as own:
        found.append(own.restore(state).step)
        found.append(own.save(2, state).order)
    print(found, flush=True)
    os._exit(7)

signal.alarm(60)
root = sys.argv[1]
manager = CheckpointManager(root, progress="off", retention=1)
manager.save(1, {"w": torch.ones(3)})
hold_locks()
child = os.fork()
if not child:
    live_as_child(manager, root)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
manager.close()
"""


def test_a_forked_child_reads_and_ends_by_the_manager_of_its_parent_and_saves_by_its_own(tmp_path: Path) -> None:
    done = run_forked("-c", _SCRIPT, tmp_path, cwd=REPOSITORY)
    found = [True] * 4 + [1, 1, False, 1, (2, 2)]
    assert done.stdout.splitlines() == [str(found), "7"], done.stderr
