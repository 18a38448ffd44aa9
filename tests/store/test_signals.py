"""The main thread hears signals while its request is under way, and the process ends whatever else is under way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from cloudckpt.options import RetryPolicy
from cloudckpt.store import probe
from cloudckpt.store.aside import begun
from cloudckpt.store.probe import _proven, probe_create
from cloudckpt.store.retrying import RetryingStore
from tests.programs import run_forked
from tests.store.engines import GCSFS, OBSTORE_GCS, OBSTORE_S3, S3FS, VERBS
from tests.store.fault_store import FaultStore, Op
from tests.store.http_dialects import Reply, Request
from tests.store.http_object_server import ObjectServer

ENGINES = {"s3fs": S3FS, "gcsfs": GCSFS, "obstore-s3": OBSTORE_S3, "obstore-gcs": OBSTORE_GCS}
# Only a main thread that is deaf waits so long.
DEAF_S = 10.0


class SignallingServer(ObjectServer):
    """Sends a signal in the middle of the first request, and waits with the answer until it was heard.

    Its own thread is given it, as the kernel may do with any that a process is sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heard = threading.Event()
        self.was_heard_meanwhile: list[bool] = []

    def handle(self, request: Request) -> Reply:
        if not self.was_heard_meanwhile:
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            self.was_heard_meanwhile.append(self.heard.wait(DEAF_S))
        return super().handle(request)


@pytest.fixture
def server() -> Iterator[SignallingServer]:
    with SignallingServer() as server:
        server.put_object("root/there", bytes(100))
        before = signal.signal(signal.SIGUSR1, lambda *_: server.heard.set())
        yield server
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_is_heard_while_a_request_of_the_main_thread_is_under_way(
    server: SignallingServer, engine: str, verb: str
) -> None:
    policy = RetryPolicy(request_timeout_s=4 * DEAF_S)
    with RetryingStore(ENGINES[engine].open(server, retry=policy), policy) as store:
        VERBS[verb](store)
    assert server.was_heard_meanwhile == [True]


def test_an_interrupt_ends_a_probe_whose_creates_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_LEAVING_S", 0.1)
    release, ended, interrupting = threading.Event(), [], threading.Lock()

    def stand_still(op: Op) -> None:
        if op.verb != "create":
            return
        if interrupting.acquire(blocking=False):
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        release.wait(DEAF_S)
        ended.append(1)

    store = FaultStore(hook=stand_still)
    _proven.clear()  # another test of this process may have proved a store of the same URL
    with pytest.raises(KeyboardInterrupt):
        probe_create(store)
    assert ended == []
    release.set()


@pytest.mark.parametrize("kind", ["obstore.ObstoreStore", "fsspec.FsspecStore"])
def test_a_resolver_that_hangs_does_not_keep_the_process_from_ending(kind: str) -> None:
    module, name = kind.split(".")
    program = f"""
import socket, time
from cloudckpt.options import RetryPolicy
from cloudckpt.store.aside import begun
from cloudckpt.store.{module} import {name}
from cloudckpt.errors import StorageError
socket.getaddrinfo = lambda *a, **k: time.sleep(600)
options = {{"key": "k", "secret": "s", "endpoint_url": "http://slow.test:9", "allow_http": True}}
store = {name}("s3://bucket/root", storage_options=options, retry=RetryPolicy(request_timeout_s=0.5))
try:
    store.head("k")
except StorageError:
    print("ended")
"""
    run = run_forked("-c", program)
    assert (run.returncode, run.stdout) == (0, "ended\n"), run.stderr


def test_what_nobody_waits_for_any_more_ends_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a look-up of a name does whose request was given up."""
    release, ended, complaints = threading.Event(), threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", complaints.append)

    def look_up() -> None:
        release.wait(DEAF_S)

    future = begun(look_up, name="test")
    future.cancel()
    future.add_done_callback(lambda _: ended.set())
    release.set()
    for thread in threading.enumerate():
        if thread.name == "cloudckpt-test":
            thread.join()
    assert ended.is_set()
    assert complaints == []


INTERRUPTED = """
import itertools, logging, os, signal, torch
import cloudckpt
from cloudckpt import CheckpointManager
from tests.store.http_object_server import Fault, FaultKind, ObjectServer

logging.disable(logging.CRITICAL)
state = {"w": torch.ones(1000)}


def interrupted(server, save, part):
    came = []

    def stalls(request):
        if request.method != "PUT" or part not in request.path or came:
            return False
        came.append(request)
        os.kill(os.getpid(), signal.SIGINT)
        return True

    server.inject(Fault(kind=FaultKind.STALL), when=stalls)
    try:
        save()
    except KeyboardInterrupt:
        return "interrupted"


with ObjectServer() as server:
    options = {"key": "k", "secret": "s", "endpoint_url": server.endpoint}
    for engine in ("obstore", "fsspec"):
        how = {"storage_options": options, "engine": engine, "progress": "off", "options": {"retry": {PATIENCE}}}
        with CheckpointManager(f"s3://bucket/{engine}", **how) as manager:
            manager.save(0, state)
            for number, part in enumerate(("safetensors", "manifest")):
                alone = f"s3://bucket/{engine}-{number}"
                by_manager = interrupted(server, lambda: manager.save(2 * number + 1, state), part)
                by_function = interrupted(server, lambda: cloudckpt.save(state, alone, **how), part)
                print(by_manager, by_function, manager.latest().step)
                manager.save(2 * number + 2, state)
                print("then", manager.latest().step, manager.restore(state).step)
"""


def test_the_first_interrupt_ends_a_save_whose_put_stands_still_and_the_manager_goes_on() -> None:
    """Far sooner than the store's patience ends, which the time limit here shows."""
    program = INTERRUPTED.replace("PATIENCE", '"request_timeout_s": 600.0, "deadline_s": 1200.0')
    run = run_forked("-c", program)
    expected = ["interrupted interrupted 0", "then 2 2", "interrupted interrupted 2", "then 4 4"]
    assert run.stdout.splitlines() == expected * 2, run.stderr
