"""A request ends when it stands still too long, and by its deadline: on every engine, whatever it was built with."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from botocore.credentials import RefreshableCredentials

from cloudckpt.deadline import NEVER, Deadline
from cloudckpt.errors import CommitUnknownError, RetryExhaustedError, StorageError
from cloudckpt.options import MIB, RetryPolicy
from cloudckpt.store.credentials import AwsCredentials
from cloudckpt.store.limit import Errand, limit_now, limited
from cloudckpt.store.retrying import RetryingStore
from cloudckpt.store.wire import OnLoop
from tests.effort import diagonal
from tests.store.engines import GCSFS, OBSTORE_GCS, OBSTORE_S3, S3FS, VERBS, Engine
from tests.store.http_object_server import Fault, FaultKind, ObjectServer

ENGINES = [
    *(pytest.param(S3FS, id="s3fs"), pytest.param(GCSFS, id="gcsfs")),
    *(pytest.param(OBSTORE_S3, id="obstore-s3"), pytest.param(OBSTORE_GCS, id="obstore-gcs")),
]
# Far more than any test here waits, and the time limit that the engines are built with.
LONG_S = 120.0


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    engine: Engine = request.param
    return engine


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        server.put_object("root/there", bytes(100))
        yield server


def retrying(engine: Engine, server: ObjectServer, policy: RetryPolicy) -> RetryingStore:
    return RetryingStore(engine.open(server, retry=policy), policy)


@diagonal("engine, verb, kind", ENGINES, VERBS, [FaultKind.STALL, FaultKind.STALL_IN_REQUEST])
def test_a_deadline_ends_what_stands_still_on_an_engine_built_with_more_patience(
    server: ObjectServer, engine: Engine, verb: str, kind: FaultKind
) -> None:
    with retrying(engine, server, RetryPolicy(deadline_s=3 * LONG_S, request_timeout_s=LONG_S)) as store:
        store.list()
        server.inject(Fault(kind=kind), times=-1)
        # Where no processor is free, a short time may be over with the first request.
        for seconds in (0.8, 4.0, 20.0):
            with pytest.raises(StorageError, match="preemption") as caught:
                VERBS[verb](store.within(Deadline.after(seconds, "preemption")))
            if caught.value.attempts >= 2:
                break
    assert type(caught.value) is (CommitUnknownError if verb == "create" else RetryExhaustedError)
    assert caught.value.attempts >= 2
    assert caught.value.elapsed_s < LONG_S / 4


class _Announced:
    """An end that is announced as soon as one request more has come to the server."""

    def __init__(self, server: ObjectServer, seconds: float) -> None:
        self._server = server
        self._before = server.count()
        self._seconds = seconds
        self._end = NEVER

    def __call__(self) -> Deadline:
        if self._end is NEVER and self._server.count() > self._before:
            self._end = Deadline.after(self._seconds, "preemption")
        return self._end


@pytest.mark.parametrize("engine", [S3FS, GCSFS], ids=["s3fs", "gcsfs"])
def test_a_put_that_stands_still_when_an_end_is_announced_is_sent_again_within_it(
    server: ObjectServer, engine: Engine
) -> None:
    with retrying(engine, server, RetryPolicy(deadline_s=3 * LONG_S, request_timeout_s=LONG_S)) as store:
        store.list()
        server.inject(Fault(kind=FaultKind.STALL))
        store.within(_Announced(server, 6.0)).put("k", [memoryview(b"x")])
    assert server.data("root/k") == b"x"


@pytest.mark.parametrize("engine", [OBSTORE_S3, OBSTORE_GCS], ids=["obstore-s3", "obstore-gcs"])
def test_a_put_that_blocks_when_an_end_is_announced_is_left_behind(server: ObjectServer, engine: Engine) -> None:
    with retrying(engine, server, RetryPolicy(deadline_s=3 * LONG_S, request_timeout_s=LONG_S)) as store:
        store.list()
        server.inject(Fault(kind=FaultKind.STALL))
        with pytest.raises(RetryExhaustedError, match=r"preemption.*left behind") as caught:
            store.within(_Announced(server, 2.0)).put("k", [memoryview(b"x")])
    assert caught.value.attempts == 1
    assert caught.value.elapsed_s < LONG_S / 4


def test_a_put_that_stood_still_is_sent_again_within_the_deadline(server: ObjectServer, engine: Engine) -> None:
    with retrying(engine, server, RetryPolicy(deadline_s=3 * LONG_S, request_timeout_s=LONG_S)) as store:
        store.list()
        server.inject(Fault(kind=FaultKind.STALL))
        store.within(Deadline.after(3.0, "preemption")).put("k", [memoryview(b"x")])
    assert server.data("root/k") == b"x"


def test_a_save_over_a_slow_link_succeeds_though_no_put_ends_within_the_limit_of_one_request(engine: Engine) -> None:
    """512 MiB over 5 MB/s with 15 s for a request, at a thirtieth of the time and a 128th of the bytes."""
    # A busy machine, on which bytes stand still for a while, must not pass for a link on which they do.
    policy = RetryPolicy(deadline_s=30.0, request_timeout_s=1.5)
    shards = [bytes([number]) * (MIB // 2) for number in range(8)]
    with ObjectServer(link_bytes_per_s=1.2 * MIB) as server, retrying(engine, server, policy) as store:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: store.put(f"r{n}", [memoryview(shards[n])]), range(8)))
        assert [server.data(f"root/r{number}") for number in range(8)] == shards
        if engine in (S3FS, GCSFS):
            assert server.count() == 8, "bytes that move are no reason to send them again"


def test_a_link_that_was_too_slow_for_obstore_is_left_to_the_engine_that_shows_its_bytes() -> None:
    """However often a busy machine has bytes stand still and be sent again."""
    policy = RetryPolicy(deadline_s=60.0, request_timeout_s=1.0)
    by_obstore: list[bool] = []
    with ObjectServer(link_bytes_per_s=MIB / 3) as server, retrying(OBSTORE_S3, server, policy) as store:
        # It breaks none: `when` is asked for each request as soon as its head has come.
        server.inject(Fault(), when=lambda request: by_obstore.append("object_store" in request.headers["user-agent"]))
        while not any(by_obstore):  # what a client first imports may take longer than a request
            store.put("fast", [memoryview(b"x")])
        sent = store.stats()["put"].requests
        store.put("slow", [memoryview(bytes(MIB // 2))])
        assert store.stats()["put"].requests >= sent + 2, "obstore's own time limit ended the first"
        by_obstore.clear()
        store.put("slow too", [memoryview(bytes(MIB // 2))])
    assert by_obstore
    assert not any(by_obstore)


@pytest.mark.parametrize("engine", [S3FS, OBSTORE_S3], ids=["s3fs", "obstore-s3"])
def test_a_put_that_takes_longer_than_its_deadline_succeeds_because_its_bytes_move(engine: Engine) -> None:
    # Between the two lies the time in which a busy machine begins anew by the engine that shows its bytes.
    policy = RetryPolicy(deadline_s=3.0, request_timeout_s=1.0)
    with ObjectServer(link_bytes_per_s=0.14 * MIB) as server, retrying(engine, server, policy) as store:
        store.put("k", [memoryview(bytes(MIB // 2))])
        assert len(server.data("root/k")) == MIB // 2
    assert store.stats()["put"].seconds > policy.deadline_s


def test_a_loop_that_something_else_keeps_busy_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudckpt.store.wire._GRACE_S", 0.1)
    free, on_loop = threading.Event(), OnLoop()

    async def held() -> None:
        free.wait(LONG_S)

    with limited(still_s=0.1, total_s=math.inf), pytest.raises(TimeoutError):
        on_loop.run(held())
    free.set()


# ---- errands


def test_an_errand_is_waited_for_no_longer_than_the_request_may_take() -> None:
    release = threading.Event()
    with limited(still_s=0.2, total_s=LONG_S), pytest.raises(TimeoutError):
        Errand[bool]().run(release.wait)
    release.set()


def test_all_who_need_an_errand_share_one() -> None:
    release, begun, errand = threading.Event(), [], Errand[int]()

    def call() -> int:
        begun.append(1)
        release.wait(LONG_S)
        return 7

    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(errand.run, call) for _ in range(4)]
        time.sleep(0.2)
        release.set()
        assert [each.result() for each in found] == [7] * 4
    assert len(begun) == 1
    assert errand.run(lambda: 8) == 8


def test_what_an_errand_raises_is_raised_by_who_waits() -> None:
    with pytest.raises(ZeroDivisionError):
        Errand[float]().run(lambda: 1 / 0)


def test_an_errand_knows_the_limit_of_the_request_it_is_for() -> None:
    with limited(still_s=7.0, total_s=LONG_S):
        assert Errand[float]().run(lambda: limit_now().still_s) == 7.0


def _keys(lifetime_s: float, renew: Callable[[], None]) -> RefreshableCredentials:
    def metadata() -> dict[str, str]:
        expiry = datetime.now(UTC) + timedelta(seconds=lifetime_s)
        return {"access_key": "K", "secret_key": "S", "token": "T", "expiry_time": expiry.isoformat()}

    def again() -> dict[str, str]:
        renew()
        return metadata()

    return RefreshableCredentials.create_from_metadata(metadata(), again, method="test")


def test_keys_that_still_hold_are_used_while_the_service_does_not_answer() -> None:
    release = threading.Event()
    hangs: list[bool] = []
    keys = _keys(800, lambda: release.wait(LONG_S) if hangs else None)  # type: ignore[arg-type, return-value]
    credentials = AwsCredentials(lambda: keys)
    assert credentials()["access_key_id"] == "K"
    hangs.append(True)
    with limited(still_s=0.2, total_s=LONG_S):
        assert credentials()["access_key_id"] == "K"
    release.set()


class _Silent:
    """Credentials of google-auth whose service does not answer."""

    valid = False
    expiry = token = None

    def __init__(self) -> None:
        self.release = threading.Event()

    def refresh(self, request: object) -> None:
        self.release.wait(LONG_S)


def test_a_token_service_that_does_not_answer_ends_with_the_request(server: ObjectServer) -> None:
    silent = _Silent()
    with retrying(GCSFS, server, RetryPolicy(deadline_s=3 * LONG_S, request_timeout_s=LONG_S)) as store:
        store.put("k", [memoryview(b"x")])
        credentials = store.inner._lease.wire._credentials  # type: ignore[attr-defined]
        credentials._credentials.credentials = silent
        with pytest.raises(RetryExhaustedError, match="TimeoutError") as caught:
            store.within(Deadline.after(1.0, "preemption")).put("k", [memoryview(b"x")])
        with limited(still_s=0.2, total_s=LONG_S), pytest.raises(TimeoutError):
            credentials.ensure()  # as obstore's wire does
    silent.release.set()
    assert caught.value.elapsed_s < LONG_S / 4


def test_keys_that_nobody_hands_out_end_with_the_request() -> None:
    release = threading.Event()
    with limited(still_s=0.2, total_s=LONG_S), pytest.raises(TimeoutError):
        AwsCredentials(lambda: release.wait(LONG_S) and None).ensure()
    release.set()


@pytest.mark.parametrize("engine", [S3FS, OBSTORE_S3], ids=["s3fs", "obstore-s3"])
def test_a_credential_process_that_hangs_ends_with_the_request(
    server: ObjectServer, engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = tmp_path_factory.mktemp("aws") / "config"
    config.write_text("[profile slow]\ncredential_process = sleep 20\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    policy = RetryPolicy(deadline_s=3 * LONG_S, request_timeout_s=LONG_S)
    options = {"profile": "slow", "endpoint_url": server.endpoint}
    store = RetryingStore(engine.kind("s3://bucket/root", storage_options=options, retry=policy), policy)
    with store, pytest.raises(RetryExhaustedError, match="TimeoutError") as caught:
        store.within(Deadline.after(2.0, "preemption")).put("k", [memoryview(b"x")])
    assert caught.value.elapsed_s < 15.0
