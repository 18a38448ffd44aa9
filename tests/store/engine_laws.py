"""The laws that every remote engine keeps, whatever the store or the network does; each engine's module runs them."""

from __future__ import annotations

import logging
import pickle
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import quote

import pytest

from cloudckpt.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    CloudCkptError,
    CredentialsExpiredError,
    ObjectExistsError,
    ObjectNotFoundError,
    OptionsError,
    StorageError,
    TransientError,
)
from cloudckpt.options import MIB, RetryPolicy
from cloudckpt.store.base import Listing, ObjectInfo, Store
from cloudckpt.store.facts import AbsentError, HttpStatusError
from cloudckpt.store.retrying import RetryingStore
from tests.store.engines import CANARY, VERBS, Engine
from tests.store.handling import while_handling
from tests.store.http_dialects import Request
from tests.store.http_object_server import Fault, FaultKind, ObjectServer

THERE = bytes(range(100))
# A whole read whose reply is short and says so cannot be told from one of a shorter object.
_CUTS = [
    *((verb, kind) for verb in ("get", "read", "list") for kind in (FaultKind.RESET_IN_REPLY, FaultKind.SHORT_HONEST)),
    *((verb, FaultKind.SHORT_MATCHING) for verb in ("get", "list")),
]
# What stands at an address where an object store was expected, or between it and us.
PAGES = {
    "empty": b"",
    "html": b"<!DOCTYPE html><html><body>Please log in</body></html>",
    "xhtml": b"<?xml version='1.0'?><!DOCTYPE html><html xmlns='http://www.w3.org/1999/xhtml'><head/><body/></html>",
    "xml": b"<?xml version='1.0'?><!-- down --><maintenance><IsTruncated>false</IsTruncated></maintenance>",
    "buckets": b"<ListAllMyBucketsResult><Buckets/><IsTruncated>false</IsTruncated></ListAllMyBucketsResult>",
    "json": b'{"kind": "status", "ok": true}',
    "list": b"[]",
}
WEB_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "ETag": '"65a1f3c2-5f3c"',
    "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
}
_IMPATIENT = RetryPolicy(request_timeout_s=1.0, connect_timeout_s=1.0)


def _views(*parts: bytes) -> list[memoryview]:
    return [memoryview(part) for part in parts]


def _refusal(store: Store, verb: str) -> CloudCkptError:
    """Run a verb that must fail, and return its error."""
    with pytest.raises(CloudCkptError) as caught:
        VERBS[verb](store)
    return caught.value


def _listing(store: Store, prefix: str = "", *, delimiter: str = "") -> Listing:
    """List all pages, one request each."""
    pages = [store.list(prefix, delimiter=delimiter)]
    while mark := pages[-1].mark:
        pages.append(store.list(prefix, delimiter=delimiter, mark=mark))
    return Listing.of_pages(pages)


def _warm(store: Store) -> Iterator[Store]:
    """Let the store make its connections, then lend it."""
    for _ in range(10):
        with suppress(TransientError):
            store.list()
            with suppress(ObjectNotFoundError):
                store.head("absent")
            break
    yield store
    store.close()


class EngineLaws:
    """Subclass it with an engine."""

    engine: ClassVar[Engine]

    # A client of S3 takes a third of a second to make, so the tests of a class share servers and stores.

    @pytest.fixture(scope="class")
    @classmethod
    def shared_server(cls) -> Iterator[ObjectServer]:
        with ObjectServer(page_size=5) as server:
            yield server

    @pytest.fixture(scope="class")
    @classmethod
    def shared_store(cls, shared_server: ObjectServer) -> Iterator[Store]:
        yield from _warm(cls.engine.open(shared_server))

    @pytest.fixture(scope="class")
    @classmethod
    def shared_impatient(cls, shared_server: ObjectServer) -> Iterator[Store]:
        yield from _warm(cls.engine.open(shared_server, retry=_IMPATIENT))

    @pytest.fixture
    def server(self, shared_server: ObjectServer) -> ObjectServer:
        """A server with one object, `root/there`, that has not been asked anything."""
        shared_server.reset()
        shared_server.put_object("root/there", THERE)
        return shared_server

    @pytest.fixture
    def store(self, shared_store: Store, server: ObjectServer) -> Store:
        return shared_store

    @pytest.fixture
    def impatient(self, shared_impatient: Store, server: ObjectServer) -> Store:
        """A store whose requests may take a second."""
        return shared_impatient

    @pytest.fixture
    def own_store(self, server: ObjectServer) -> Iterator[Store]:
        """A store that a test may close."""
        store = self.engine.open(server)
        yield store
        store.close()

    # ---- what goes over the wire

    @pytest.mark.parametrize("verb", VERBS)
    def test_a_verb_is_one_request(self, server: ObjectServer, store: Store, verb: str) -> None:
        VERBS[verb](store)
        assert server.count() == 1

    def test_a_put_is_the_concatenation_of_its_buffers(self, server: ObjectServer, store: Store) -> None:
        large = bytes(range(256)) * (9 * MIB // 256)
        store.put("k", _views(b"head", large, b"", b"tail", large[:70_000], b"end"))
        assert server.data("root/k") == b"head" + large + b"tail" + large[:70_000] + b"end"

    def test_a_put_of_thousands_of_tiny_buffers_is_whole(self, server: ObjectServer, store: Store) -> None:
        parts = [bytes([number % 256]) * (number % 700) for number in range(5000)]
        store.put("k", _views(*parts))
        assert server.data("root/k") == b"".join(parts)

    def test_a_put_of_nothing_is_an_empty_object(self, server: ObjectServer, store: Store) -> None:
        store.put("none", [])
        store.put("empty", _views(b""))
        assert (server.data("root/none"), server.data("root/empty")) == (b"", b"")

    def test_a_put_takes_buffers_of_other_formats(self, server: ObjectServer, store: Store) -> None:
        numbers = memoryview(bytes(range(64))).cast("d").cast("B").cast("I")
        store.put("k", [numbers])
        assert server.data("root/k") == bytes(range(64))

    def test_a_body_has_a_length_and_no_framing_of_its_own(self, server: ObjectServer, store: Store) -> None:
        store.put("k", _views(bytes(MIB), b"x"))
        headers = server.requests[-1].headers
        assert headers["content-length"] == str(MIB + 1)
        assert "transfer-encoding" not in headers
        assert "expect" not in headers
        assert "aws-chunked" not in headers.get("content-encoding", "")

    @pytest.mark.parametrize("bounds", [(0, 100), (0, 1), (99, 100), (37, 61)])
    def test_a_get_brings_exactly_the_range(self, store: Store, bounds: tuple[int, int]) -> None:
        start, stop = bounds
        assert bytes(store.get("there", start=start, stop=stop)) == THERE[start:stop]

    def test_a_get_of_no_bytes_sends_nothing(self, server: ObjectServer, store: Store) -> None:
        assert bytes(store.get("there", start=7, stop=7)) == b""
        assert server.count() == 0

    @pytest.mark.parametrize("size_bytes", [64, 20 * MIB])
    def test_a_get_fills_the_memory_that_it_is_given(self, server: ObjectServer, store: Store, size_bytes: int) -> None:
        data = bytes(range(251)) * (size_bytes // 251 + 1)
        server.put_object("root/k", data)
        into = memoryview(bytearray(size_bytes))
        returned = store.get("k", start=3, stop=3 + size_bytes, into=into)
        assert into == data[3 : 3 + size_bytes]
        assert returned == into

    def test_memory_that_does_not_fit_the_range_is_refused(self, server: ObjectServer, store: Store) -> None:
        for into in (memoryview(bytearray(9)), memoryview(bytes(10))):
            with pytest.raises(OptionsError, match="10"):
                store.get("there", start=0, stop=10, into=into)
        assert server.count() == 0

    def test_odd_names_arrive_as_they_are(self, server: ObjectServer, store: Store) -> None:
        names = ["a b", "a+b", "a%20b", "a%b", "ü/ä", "x=1/y~z", "q?r#s&t", "it's,(f)*!", "[0]{1}", "<x>", "e" * 300]
        for name in names:
            store.put(name, _views(name.encode()))
        assert server.keys() == sorted([f"root/{name}" for name in names] + ["root/there"])
        assert [store.read(name, limit_bytes=900) for name in names] == [name.encode() for name in names]
        assert [info.key for info in _listing(store).objects] == sorted([*names, "there"])

    # ---- create

    def test_a_create_takes_a_free_key(self, server: ObjectServer, store: Store) -> None:
        store.create("fresh", b"one")
        assert server.data("root/fresh") == b"one"

    def test_a_create_leaves_a_taken_key_as_it_is(self, server: ObjectServer, store: Store) -> None:
        with pytest.raises(ObjectExistsError):
            store.create("there", b"two")
        assert server.data("root/there") == THERE

    def test_of_racing_creates_one_wins(self, server: ObjectServer, store: Store) -> None:
        def attempt(number: int) -> bytes | None:
            data = b"%d" % number
            try:
                store.create("prize", data)
            except ObjectExistsError:
                return None
            return data

        with ThreadPoolExecutor(8) as pool:
            won = [data for data in pool.map(attempt, range(8)) if data is not None]
        assert won == [server.data("root/prize")]

    def test_a_create_whose_acknowledgement_is_lost_is_transient_and_landed(
        self, server: ObjectServer, store: Store
    ) -> None:
        server.inject(Fault(kind=FaultKind.LOST_ACK))
        assert isinstance(_refusal(store, "create"), TransientError)
        assert (server.data("root/fresh"), server.count()) == (b"abc", 1)

    def test_a_conflicting_create_in_flight_is_transient(self, server: ObjectServer, store: Store) -> None:
        server.inject(Fault(status=409, code="ConditionalRequestConflict"))
        assert isinstance(_refusal(store, "create"), TransientError)

    def test_a_failed_precondition_of_a_put_is_no_taken_key(self, server: ObjectServer, store: Store) -> None:
        server.inject(Fault(status=412, code="PreconditionFailed"))
        error = _refusal(store, "put")
        assert isinstance(error, StorageError)
        assert not isinstance(error, ObjectExistsError | TransientError)

    # ---- faults

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
    def test_a_status_that_may_pass_is_transient_after_one_request(
        self, server: ObjectServer, store: Store, verb: str, status: int
    ) -> None:
        server.inject(Fault(status=status, code="", body=b"<html>no XML, no JSON</html>"), times=-1)
        assert isinstance(_refusal(store, verb), TransientError)
        assert server.count() == 1

    @pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "head"])
    @pytest.mark.parametrize("code", ["SlowDown", "RequestTimeout", "InternalError", "ThrottlingException"])
    def test_a_code_that_may_pass_is_transient_whatever_its_status(
        self, server: ObjectServer, store: Store, verb: str, code: str
    ) -> None:
        server.inject(Fault(status=400, code=code), times=-1)
        assert isinstance(_refusal(store, verb), TransientError)
        assert server.count() == 1

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("kind", [FaultKind.RESET_IN_REQUEST, FaultKind.RESET_BEFORE_REPLY])
    def test_a_reset_is_transient_after_one_request(
        self, server: ObjectServer, store: Store, verb: str, kind: FaultKind
    ) -> None:
        server.inject(Fault(kind=kind), times=-1)
        assert isinstance(_refusal(store, verb), TransientError)
        assert server.count() == 1

    def test_a_reset_in_the_middle_of_a_large_put_is_transient(self, server: ObjectServer, store: Store) -> None:
        server.inject(Fault(kind=FaultKind.RESET_IN_REQUEST))
        with pytest.raises(TransientError):
            store.put("k", _views(bytes(8 * MIB)))
        assert server.keys() == ["root/there"]

    @pytest.mark.parametrize(("verb", "kind"), _CUTS)
    def test_a_reply_that_is_cut_short_is_transient_after_one_request(
        self, server: ObjectServer, store: Store, verb: str, kind: FaultKind
    ) -> None:
        server.inject(Fault(kind=kind), times=-1)
        assert isinstance(_refusal(store, verb), TransientError)
        assert server.count() == 1

    def test_a_reply_that_is_too_long_is_transient(self, server: ObjectServer, store: Store) -> None:
        server.inject(Fault(kind=FaultKind.LONG_MATCHING))
        assert isinstance(_refusal(store, "get"), TransientError)

    def test_a_spoilt_listing_is_transient(self, server: ObjectServer, store: Store) -> None:
        server.inject(Fault(kind=FaultKind.FLIPPED_BYTE))
        assert isinstance(_refusal(store, "list"), TransientError)

    @pytest.mark.parametrize("lost", [("prefix",), ("delimiter",), ("prefix", "delimiter")], ids="-".join)
    @pytest.mark.parametrize("echoes", [True, False], ids=["echoed", "not echoed"])
    def test_a_listing_of_what_was_not_asked_for_is_transient_after_one_request(
        self, server: ObjectServer, store: Store, lost: tuple[str, ...], echoes: bool
    ) -> None:
        for name in ("root/a/b", "root/a/c/d", "elsewhere/e", "f"):
            server.put_object(name, b"")
        server.unheard, server.echoes = frozenset(lost), echoes
        with pytest.raises(TransientError, match="no object store answered"):
            store.list("a/", delimiter="/")
        assert server.count() == 1

    def test_a_page_that_says_that_there_is_more_leads_on(self, server: ObjectServer, store: Store) -> None:
        for number in range(12):
            server.put_object(f"root/k{number:02d}", b"")
        server.unheard = frozenset({"continuation-token", "pageToken"})
        first = store.list("k")
        assert (len(first.objects), first.mark != "") == (5, True)
        with suppress(TransientError):  # a store that echoes the mark is found out at once
            assert store.list("k", mark=first.mark).mark == first.mark  # the others by their marks

    @pytest.mark.parametrize("prefix", ["", "a/", "a", "a b+c%20/", "none/"])
    @pytest.mark.parametrize("delimiter", ["", "/"])
    @pytest.mark.parametrize("echoes", [True, False], ids=["echoed", "not echoed"])
    def test_a_listing_of_what_was_asked_for_is_believed(
        self, server: ObjectServer, store: Store, prefix: str, delimiter: str, echoes: bool
    ) -> None:
        names = ["a/b", "a/c/d", "a b+c%20/e", "ab", "f"]
        for name in names:
            server.put_object(f"root/{name}", b"")
        server.put_object("root/a/", b"")  # as other tools mark a directory
        server.put_object("root2/a/x", b"")
        server.echoes = echoes
        found = _listing(store, prefix, delimiter=delimiter)
        below = [name for name in sorted([*names, "there"]) if name.startswith(prefix)]
        ends = [name.find("/", len(prefix)) if delimiter else -1 for name in below]
        assert [info.key for info in found.objects] == [name for name, end in zip(below, ends, strict=True) if end < 0]
        assert set(found.prefixes) == {name[: end + 1] for name, end in zip(below, ends, strict=True) if end >= 0}

    @pytest.mark.parametrize("verb", VERBS)
    def test_silence_ends_at_the_time_limit(self, server: ObjectServer, impatient: Store, verb: str) -> None:
        server.inject(Fault(kind=FaultKind.STALL), times=-1)
        assert isinstance(_refusal(impatient, verb), TransientError)
        assert server.count() == 1

    @pytest.mark.parametrize("verb", ["get", "read"])
    def test_silence_in_the_middle_of_a_reply_ends_at_the_time_limit(
        self, server: ObjectServer, impatient: Store, verb: str
    ) -> None:
        server.inject(Fault(kind=FaultKind.STALL_IN_REPLY), times=-1)
        assert isinstance(_refusal(impatient, verb), TransientError)

    def test_a_peer_that_stops_reading_ends_at_the_time_limit(
        self, server: ObjectServer, impatient: Store, caplog: pytest.LogCaptureFixture
    ) -> None:
        server.inject(Fault(kind=FaultKind.STALL_IN_REQUEST))
        with pytest.raises(TransientError):
            impatient.put("k", _views(bytes(64 * MIB)))
        assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
        assert server.keys() == ["root/there"]

    def test_a_store_works_again_after_a_time_limit(self, server: ObjectServer, impatient: Store) -> None:
        server.inject(Fault(kind=FaultKind.STALL))
        _refusal(impatient, "get")
        assert bytes(impatient.get("there", start=0, stop=4)) == THERE[:4]

    def test_memory_is_left_alone_once_a_get_has_failed(self, server: ObjectServer, impatient: Store) -> None:
        size_bytes = 4 * MIB
        server.put_object("root/large", b"\x01" * size_bytes)
        server.inject(Fault(kind=FaultKind.STALL_IN_REPLY))
        memory = bytearray(size_bytes)
        with pytest.raises(TransientError):
            impatient.get("large", start=0, stop=size_bytes, into=memoryview(memory))
        memory[:] = b"\x02" * size_bytes
        time.sleep(0.2)
        assert memory == b"\x02" * size_bytes

    def test_a_closed_port_is_transient(self) -> None:
        with ObjectServer() as server:
            store = self.engine.open(server, retry=_IMPATIENT)
        for verb in ("put", "get", "list"):
            assert isinstance(_refusal(store, verb), TransientError)
        store.close()

    # ---- refusals

    @pytest.mark.parametrize("verb", VERBS)
    def test_a_forbidden_verb_is_denied_after_one_request(self, server: ObjectServer, store: Store, verb: str) -> None:
        server.inject(Fault(status=403, code="AccessDenied"), times=-1)
        error = _refusal(store, verb)
        assert isinstance(error, AccessDeniedError)
        assert not isinstance(error, CredentialsExpiredError)
        assert server.count() == 1

    @pytest.mark.parametrize("verb", VERBS)
    def test_a_401_means_expired_credentials(self, server: ObjectServer, store: Store, verb: str) -> None:
        server.inject(Fault(status=401, code="Unauthorized"), times=-1)
        assert isinstance(_refusal(store, verb), CredentialsExpiredError)
        assert server.count() == 1

    @pytest.mark.parametrize("status", [400, 403])
    @pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "head"])
    def test_an_expired_token_is_told_from_a_denial(
        self, server: ObjectServer, store: Store, verb: str, status: int
    ) -> None:
        server.inject(Fault(status=status, code="ExpiredToken"), times=-1)
        assert isinstance(_refusal(store, verb), CredentialsExpiredError)

    def test_a_refusal_that_comes_before_the_body_was_sent_is_heard(self, server: ObjectServer, store: Store) -> None:
        server.inject(Fault(kind=FaultKind.EARLY_STATUS, status=403, code="AccessDenied"))
        with pytest.raises(AccessDeniedError):
            store.put("k", _views(bytes(32 * MIB)))

    def test_a_wrong_clock_is_named(self, server: ObjectServer, store: Store) -> None:
        server.inject(Fault(status=403, code="RequestTimeTooSkewed"))
        error = _refusal(store, "put")
        assert isinstance(error, AccessDeniedError)
        assert "clock" in str(error)

    @pytest.mark.parametrize(("status", "code"), [(400, "InvalidRequest"), (501, "NotImplemented"), (507, "Full")])
    def test_a_refusal_is_not_tried_again(self, server: ObjectServer, store: Store, status: int, code: str) -> None:
        server.inject(Fault(status=status, code=code), times=-1)
        error = _refusal(store, "put")
        assert isinstance(error, StorageError)
        assert not isinstance(error, TransientError)
        assert code in str(error)

    @pytest.mark.parametrize("verb", ["get", "read", "head"])
    def test_a_missing_object_is_named(self, server: ObjectServer, store: Store, verb: str) -> None:
        del server.objects["bucket", "root/there"]
        error = _refusal(store, verb)
        assert isinstance(error, ObjectNotFoundError)
        assert (error.op, error.key) == (verb, "there")
        assert "'there'" in str(error)

    @pytest.mark.parametrize("verb", ["put", "create", "list"])
    def test_a_missing_bucket_is_named_and_not_made(self, server: ObjectServer, store: Store, verb: str) -> None:
        server.buckets.clear()
        error = _refusal(store, verb)
        assert isinstance(error, BucketNotFoundError)
        assert "create the bucket first; cloudckpt never does" in str(error)
        assert server.count() == 1

    @pytest.mark.parametrize("bounds", [(90, 101), (100, 101), (500, 600)])
    def test_a_range_beyond_the_end_is_an_error_of_the_object(self, store: Store, bounds: tuple[int, int]) -> None:
        with pytest.raises(StorageError) as caught:
            store.get("there", start=bounds[0], stop=bounds[1])
        assert not isinstance(caught.value, TransientError)

    def test_a_read_stops_at_its_limit(self, server: ObjectServer, store: Store) -> None:
        with pytest.raises(StorageError, match="99"):
            store.read("there", limit_bytes=99)
        assert store.read("there", limit_bytes=100) == THERE

    def test_keys_that_leave_the_root_are_refused_unsent(self, server: ObjectServer, store: Store) -> None:
        for key in ("../there", "a//b", "", "/there", "a/./b"):
            with pytest.raises(OptionsError):
                store.put(key, _views(b"x"))
        assert server.count() == 0

    @pytest.mark.parametrize("verb", ["put", "create", "get", "read", "head", "list"])
    @pytest.mark.parametrize("status", [304, 400, 403, 404, 405, 407, 421, 499])
    def test_an_answer_that_is_in_no_stores_words_is_none(
        self, server: ObjectServer, store: Store, verb: str, status: int
    ) -> None:
        body = b"" if status == HTTPStatus.NOT_MODIFIED else b"<html>default backend</html>"
        server.inject(Fault(status=status, body=body, headers={"Content-Type": "text/html"}), times=-1)
        error = _refusal(store, verb)
        assert isinstance(error, TransientError)
        assert f"({status})" in str(error)
        assert "endpoint_url" in str(error)
        # Who answers for a store may have let it do the work first.
        assert error.may_have_landed

    @pytest.mark.parametrize("verb", ["put", "create", "get", "read", "head", "list"])
    @pytest.mark.parametrize(
        "head",
        [b"00\r\n0\r\n\r\n", b"\x15\x03\x01\x00\x02\x02\x46", b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\n"],
        ids=["chunks", "tls", "length"],
    )
    def test_bytes_that_are_no_http_are_no_answer(
        self, server: ObjectServer, store: Store, verb: str, head: bytes
    ) -> None:
        server.inject(Fault(kind=FaultKind.NO_HTTP, body=head), times=-1)
        error = _refusal(store, verb)
        assert isinstance(error, TransientError)
        assert error.may_have_landed

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("theirs", [HttpStatusError(404, "NoSuchKey"), FileExistsError("x"), AbsentError("x")])
    def test_what_the_caller_was_handling_is_no_answer_of_the_store(
        self, server: ObjectServer, store: Store, verb: str, theirs: Exception
    ) -> None:
        server.inject(Fault(kind=FaultKind.RESET_BEFORE_REPLY), times=-1)
        assert isinstance(while_handling(theirs, lambda: _refusal(store, verb)), TransientError)

    # ---- list and delete

    def test_a_listing_has_all_pages_sizes_and_times(self, server: ObjectServer, store: Store) -> None:
        before_s = time.time()
        for number in range(23):
            server.put_object(f"root/many/{number:02}", bytes(number))
        found = _listing(store, "many/").objects
        assert [(info.key, info.size_bytes) for info in found] == [(f"many/{n:02}", n) for n in range(23)]
        assert all(before_s - 2 <= info.modified_s <= time.time() + 2 for info in found)
        assert server.count() == 5

    def test_a_page_is_one_request_and_its_mark_leads_to_the_next(self, server: ObjectServer, store: Store) -> None:
        for number in range(8):
            server.put_object(f"root/many/{number}", b"")
        first = store.list("many/")
        second = store.list("many/", mark=first.mark)
        assert [info.key for info in (*first.objects, *second.objects)] == [f"many/{n}" for n in range(8)]
        assert (bool(first.mark), second.mark, server.count()) == (True, "", 2)

    def test_a_listing_is_never_remembered(self, server: ObjectServer, store: Store) -> None:
        store.list()
        server.put_object("root/late", b"x")
        assert [info.key for info in _listing(store).objects] == ["late", "there"]

    def test_a_prefix_may_end_inside_a_name(self, server: ObjectServer, store: Store) -> None:
        for name in ("step-1/a", "step-12/b", "step-2/c", "stepped"):
            server.put_object(f"root/{name}", b"x")
        assert [info.key for info in _listing(store, "step-1").objects] == ["step-1/a", "step-12/b"]
        assert _listing(store, "step-1", delimiter="/").prefixes == ("step-1/", "step-12/")

    def test_a_delimiter_splits_into_objects_and_prefixes(self, server: ObjectServer, store: Store) -> None:
        for number in range(12):
            server.put_object(f"root/d{number:02}/x/y", b"x")
        listing = _listing(store, delimiter="/")
        assert [info.key for info in listing.objects] == ["there"]
        assert listing.prefixes == tuple(f"d{number:02}/" for number in range(12))

    def test_a_neighbour_of_the_root_is_not_in_it(self, server: ObjectServer, store: Store) -> None:
        server.put_object("root2/x", b"x")
        server.put_object("rootless", b"x")
        assert [info.key for info in _listing(store).objects] == ["there"]

    def test_foreign_names_and_markers_of_directories_are_kept_out(self, server: ObjectServer, store: Store) -> None:
        for name in ("root/", "root/dir/", "root//odd", "root/a//b", "root/dir/real"):
            server.put_object(name, b"")
        assert [info.key for info in _listing(store).objects] == ["dir/real", "there"]
        assert _listing(store, delimiter="/").prefixes == ("a/", "dir/")

    def test_an_empty_listing_is_empty_and_a_failed_one_raises(self, server: ObjectServer, store: Store) -> None:
        assert _listing(store, "nothing/").objects == ()
        for number in range(9):
            server.put_object(f"root/{number}", b"x")
        server.inject(
            Fault(status=500), when=lambda request: bool(request.query.keys() & {"continuation-token", "pageToken"})
        )
        with pytest.raises(TransientError):
            _listing(store)

    # ---- whatever says 200

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("headers", [{}, WEB_HEADERS], ids=["bare", "web"])
    @pytest.mark.parametrize("page", PAGES)
    def test_what_no_object_store_answered_is_never_believed(
        self, server: ObjectServer, store: Store, verb: str, headers: dict[str, str], page: str
    ) -> None:
        server.inject(Fault(status=200, body=PAGES[page], headers=headers), times=-1)
        error = _refusal(store, verb)
        assert isinstance(error, TransientError)

    def test_the_error_says_that_no_object_store_answered(self, server: ObjectServer, store: Store) -> None:
        server.inject(Fault(status=200, body=PAGES["html"], headers=WEB_HEADERS), times=-1)
        assert {verb for verb in VERBS if "no object store answered" not in str(_refusal(store, verb))} <= {"get"}

    @pytest.mark.parametrize("verb", VERBS)
    def test_what_the_caller_was_handling_does_not_hide_the_cause(
        self, server: ObjectServer, store: Store, verb: str
    ) -> None:
        target = f"http://localhost:{server.port}/login"
        server.inject(Fault(status=302, code="", body=b"", headers={"Location": target}), times=-1)
        error = while_handling(ValueError("the loss is nan"), lambda: _refusal(store, verb))
        assert "no object store answered" in str(error)

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_no_redirect_to_another_host_is_followed(
        self, server: ObjectServer, store: Store, elsewhere: ObjectServer, verb: str, status: int
    ) -> None:
        # Another name is another host, though it leads to this machine, too.
        target = f"http://localhost:{elsewhere.port}/login"
        server.inject(Fault(status=status, code="", body=b"", headers={"Location": target}), times=-1)
        error = _refusal(store, verb)
        assert isinstance(error, StorageError)
        assert elsewhere.requests == []
        assert server.count() == 1
        assert "no object store answered" in str(error)

    @pytest.fixture
    def elsewhere(self) -> Iterator[ObjectServer]:
        with ObjectServer() as server:
            yield server

    def test_a_create_that_a_page_answered_is_unknown_and_then_looked_at(
        self, server: ObjectServer, store: Store
    ) -> None:
        retrying = RetryingStore(store, RetryPolicy(), sleep=lambda _: None)
        server.inject(Fault(status=200, body=PAGES["html"], headers=WEB_HEADERS), times=1)
        retrying.create("fresh", b"abc")
        assert server.data("root/fresh") == b"abc"

    def test_a_delete_takes_many_keys_and_absent_ones(self, server: ObjectServer, store: Store) -> None:
        names = [f"n{number}" for number in range(1500)]
        for name in names:
            server.put_object(f"root/{name}", b"x")
        store.delete([*names, "absent"])
        assert server.keys() == ["root/there"]

    def test_a_delete_of_nothing_sends_nothing(self, server: ObjectServer, store: Store) -> None:
        store.delete([])
        assert server.count() == 0

    def test_what_a_delete_left_is_named_and_the_rest_is_gone(self, server: ObjectServer, store: Store) -> None:
        for name in ("a", "b", "c"):
            server.put_object(f"root/{name}", b"x")
        self.refuse_delete(server, "root/b", 403, "AccessDenied")
        with pytest.raises(AccessDeniedError, match=r"'b'.*1 of 3") as caught:
            store.delete(["a", "b", "c"])
        assert (caught.value.op, caught.value.key) == ("delete", "b")
        assert server.keys() == ["root/b", "root/there"]

    def test_what_a_delete_may_do_later_is_transient(self, server: ObjectServer, store: Store) -> None:
        server.put_object("root/a", b"x")
        self.refuse_delete(server, "root/a", 503, "SlowDown")
        with pytest.raises(TransientError):
            store.delete(["a"])

    def refuse_delete(self, server: ObjectServer, name: str, status: int, code: str) -> None:
        """Refuse the delete of one object."""
        server.fail_delete_of[name] = code

    # ---- life

    def test_threads_share_a_store(self, server: ObjectServer, store: Store) -> None:
        def round_trip(number: int) -> bool:
            data = number.to_bytes(4, "big") * 50_000
            store.put(f"t/{number}", _views(data[:7], data[7:]))
            return store.get(f"t/{number}", start=0, stop=len(data)) == data

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(round_trip, range(64)))

    def test_a_refresh_leaves_verbs_in_flight_alone(self, server: ObjectServer, own_store: Store) -> None:
        server.put_object("root/large", bytes(4 * MIB))
        stop = threading.Event()

        def read_on() -> int:
            count = 0
            while not stop.is_set():
                count += len(own_store.get("large", start=0, stop=4 * MIB)) == 4 * MIB
            return count

        with ThreadPoolExecutor(4) as pool:
            counts = [pool.submit(read_on) for _ in range(4)]
            for _ in range(5):
                own_store.refresh()
                time.sleep(0.02)
            stop.set()
            assert all(count.result() > 0 for count in counts)

    def test_a_connection_that_others_have_closed_while_one_waited_for_it_is_not_used(
        self, server: ObjectServer, own_store: Any
    ) -> None:
        server.put_object("root/there", b"12345")
        errand, is_first = own_store._connecting, [True]

        def run(connect: Callable[[], object]) -> None:
            errand.run(connect)
            if is_first:
                is_first.clear()
                own_store.get("there", start=0, stop=5)
                own_store.refresh()

        own_store._connecting = SimpleNamespace(run=run)
        assert bytes(own_store.get("there", start=0, stop=5)) == b"12345"

    def test_close_is_final_and_may_be_repeated(self, own_store: Store) -> None:
        own_store.head("there")
        own_store.close()
        own_store.close()
        with pytest.raises(OptionsError, match="closed"):
            own_store.head("there")

    def test_the_url_is_the_root(self, server: ObjectServer) -> None:
        store = self.engine.open(server, root="bucket/a b/c/")
        assert store.url == f"{self.engine.scheme}://bucket/a b/c"
        store.close()

    def test_a_root_may_be_a_bucket(self, server: ObjectServer) -> None:
        store = self.engine.open(server, root="bucket")
        store.put("k", _views(b"x"))
        assert [info.key for info in store.list().objects] == ["k", "root/there"]
        assert store.list(delimiter="/").prefixes == ("root/",)
        store.close()

    def test_nothing_is_sent_before_the_first_verb(self, server: ObjectServer) -> None:
        self.engine.open(server).close()
        assert server.count() == 0

    # ---- secrets

    def test_credentials_in_a_url_are_refused_and_not_repeated(self) -> None:
        with pytest.raises(OptionsError) as caught:
            self.engine.kind(f"{self.engine.scheme}://{CANARY}:x@bucket/root", storage_options={})
        assert CANARY not in str(caught.value)

    def test_a_store_is_not_pickled(self, store: Store) -> None:
        with pytest.raises(TypeError, match="credentials"):
            pickle.dumps(store)

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("code", ["ExpiredToken", "SignatureDoesNotMatch", "InternalError", "Strange"])
    def test_no_credential_shows_in_errors_and_logs(
        self, server: ObjectServer, caplog: pytest.LogCaptureFixture, verb: str, code: str
    ) -> None:
        caplog.set_level(logging.DEBUG)
        store = self.engine.open(server)
        server.inject(Fault(status=400, body=_echo(code)), times=-1, when=lambda request: verb != "head")
        server.inject(Fault(status=403, body=_echo(code)), times=-1)
        error = _refusal(store, verb)
        store.close()
        shown = [repr(store), store.url, "".join(traceback.format_exception(error)), repr(vars(error)), caplog.text]
        assert [text for text in shown if CANARY in text] == []
        assert _sends_a_credential(server.requests[-1])

    @pytest.mark.parametrize("kind", [FaultKind.RESET_BEFORE_REPLY, FaultKind.SHORT_HONEST])
    def test_no_credential_shows_when_the_network_fails(
        self, server: ObjectServer, caplog: pytest.LogCaptureFixture, kind: FaultKind
    ) -> None:
        caplog.set_level(logging.DEBUG)
        store = self.engine.open(server)
        server.inject(Fault(kind=kind), times=-1)
        error = _refusal(store, "get")
        store.close()
        assert CANARY not in "".join(traceback.format_exception(error)) + caplog.text

    def test_an_error_survives_pickling_without_its_library(self, server: ObjectServer, store: Store) -> None:
        server.inject(Fault())
        error = _refusal(store, "put")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.op, again.key) == (type(error), str(error), "put", "fresh")

    def test_a_message_holds_op_key_root_code_and_what_to_do(self, server: ObjectServer, store: Store) -> None:
        server.inject(Fault(status=403, code="AccessDenied"))
        message = str(_refusal(store, "put"))
        assert re.search(r"put of 'fresh' in \w+://bucket/root failed \(403 AccessDenied\): let the cred", message)
        assert "?" not in message

    def test_a_described_object_has_the_key_that_was_asked_for(self, store: Store) -> None:
        found = store.head("there")
        assert found == ObjectInfo(key="there", size_bytes=100, modified_s=found.modified_s)


def _echo(code: str) -> bytes:
    """An error body that repeats what it was sent, as AWS does for tokens and signatures."""
    return (
        f"<Error><Code>{code}</Code><Message>no</Message><Token-0>CANARYTOKEN0123456789</Token-0>"
        "<AWSAccessKeyId>CANARYKEYID0123456789</AWSAccessKeyId><SignatureProvided>CANARYSIG</SignatureProvided>"
        "<CanonicalRequest>PUT\n/bucket\nx-amz-security-token:CANARYTOKEN0123456789\n</CanonicalRequest></Error>"
    ).encode()


def _sends_a_credential(request: Request) -> bool:
    return CANARY in " ".join(request.headers.values())


class RefusesSingleDeletes:
    """For engines that delete one object per request."""

    def refuse_delete(self, server: ObjectServer, name: str, status: int, code: str) -> None:
        suffix = quote(name, safe="")
        server.inject(
            Fault(status=status, code=code), method="DELETE", when=lambda request: request.path.endswith(suffix)
        )
