"""Ranged gets over connections of our own: whatever a server or a network does, the bytes are right or it raises."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from cloudckpt.options import MIB, RetryPolicy
from cloudckpt.store.facts import BodyLengthError, GarbledReplyError, HttpStatusError, UnsentError
from cloudckpt.store.intake import Whole
from cloudckpt.store.limit import limited, told_of_moves
from cloudckpt.store.ranged import RangeReader
from cloudckpt.store.retrying import RetryingStore
from tests.store.engines import OBSTORE_S3
from tests.store.http_object_server import ObjectServer

DATA = bytes(range(251)) * 40
OBJECT = b'ETag: "d41d8cd98f00b204e9800998ecf8427e"\r\n'


class Script:
    """A server that reads heads and says what it was told to, word by word; a reply that is empty hangs up."""

    def __init__(self, *replies: bytes) -> None:
        self.replies = list(replies)
        self.connections = 0
        self.heads: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/bucket"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                with connection:
                    self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        while self.replies:
            head = b""
            while b"\r\n\r\n" not in head:
                if not (piece := connection.recv(65536)):
                    return
                head += piece
            self.heads.append(head.decode())
            reply = self.replies.pop(0)
            connection.sendall(reply.removesuffix(b"HANGUP"))
            if reply.endswith(b"HANGUP"):
                return

    def close(self) -> None:
        self._listener.close()


def whole(body: bytes = DATA, *, more: bytes = b"", status: bytes = b"206 Partial Content") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return b"HTTP/1.1 " + status + b"\r\n" + OBJECT + length + more + b"\r\n" + body


def chunked(body: bytes = DATA) -> bytes:
    parts = [body[start : start + 999] for start in range(0, len(body), 999)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    return b"HTTP/1.1 206 Partial Content\r\n" + OBJECT + b"Transfer-Encoding: chunked\r\n\r\n" + framed


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[Script, RangeReader]]]:
    made: list[tuple[Script, RangeReader]] = []

    def begin(*replies: bytes) -> tuple[Script, RangeReader]:
        script = Script(*replies)
        sign = lambda _, headers: headers  # noqa: E731
        made.append(
            (script, RangeReader(script.url, sign, proof="etag", connect_s=5.0, context=ssl.create_default_context))
        )
        return made[-1]

    yield begin
    for script, reader in made:
        reader.close()
        script.close()


Serve = Callable[..., tuple[Script, RangeReader]]


def read(reader: RangeReader) -> bytes:
    memory = memoryview(bytearray(len(DATA)))
    reader.stream("k", 0, len(DATA), Whole(memory, 0))
    return bytes(memory)


@pytest.mark.parametrize(
    "reply",
    [
        whole(),
        whole(status=b"200 OK"),
        whole(more=b"Connection: close\r\n") + b"HANGUP",
        b"HTTP/1.1 100 Continue\r\n\r\n" + whole(),
        chunked(),
        b"HTTP/1.1 206 Partial Content\r\n" + OBJECT + b"\r\n" + DATA + b"HANGUP",
        whole().replace(b"HTTP/1.1", b"HTTP/1.0") + b"HANGUP",
        whole().replace(b"ETag", b"etag").replace(b"Content-Length: ", b"CONTENT-LENGTH:"),
    ],
    ids=["206", "200", "last", "continue", "chunks", "until the end", "1.0", "letters"],
)
def test_every_form_that_a_reply_may_have_is_read(serve: Serve, reply: bytes) -> None:
    script, reader = serve(reply, whole())
    assert [read(reader), read(reader)] == [DATA, DATA]
    assert len(script.heads) == 2


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (whole()[:-1] + b"HANGUP", BodyLengthError),
        (whole(DATA + b"x"), BodyLengthError),
        (whole(DATA[:-1]), BodyLengthError),
        (chunked(DATA[:-1]), BodyLengthError),
        (chunked(DATA + b"x"), BodyLengthError),
        (chunked()[:-300] + b"HANGUP", ConnectionError),
        (whole(more=b"Content-Range: bytes 1-10040/99999\r\n"), BodyLengthError),
        (whole().replace(b"ETag", b"X-Tag"), GarbledReplyError),
        (whole(more=b"Content-Type: text/html\r\n"), GarbledReplyError),
        (b"SSH-2.0-OpenSSH\r\nHANGUP", GarbledReplyError),
        (b"HTTP/1.1 206 OK\r\n" + b"a: b\r\n" * 20_000 + b"\r\n", GarbledReplyError),
        (b"HTTP/1.1 20HANGUP", ConnectionError),
        (b"HANGUP", ConnectionError),
        (b"HTTP/1.1 204 No Content\r\n\r\n", HttpStatusError),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", HttpStatusError),
    ],
)
def test_what_is_not_the_object_raises_and_its_connection_is_not_used_again(
    serve: Serve, reply: bytes, kind: type[Exception]
) -> None:
    script, reader = serve(reply, whole())
    with pytest.raises(kind):
        read(reader)
    assert script.connections == 1
    assert reader._idle == []


def test_a_refusal_in_chunks_says_its_code_its_region_and_when_to_come_back(serve: Serve) -> None:
    body = b"<Error><Code>SlowDown</Code><Message>reduce</Message></Error>"
    framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:20], body[20:])) + b"0\r\n\r\n"
    head = b"HTTP/1.1 503 Slow\r\nRetry-After: 7\r\nx-amz-bucket-region: eu-x-1\r\nTransfer-Encoding: chunked\r\n\r\n"
    _, reader = serve(head + framed)
    with pytest.raises(HttpStatusError) as caught:
        read(reader)
    error = caught.value
    assert (error.status, error.code, error.retry_after, error.region) == (503, "SlowDown", "7", "eu-x-1")
    assert not error.is_foreign


def test_one_connection_carries_one_get_after_the_other(serve: Serve) -> None:
    script, reader = serve(*[whole()] * 5)
    assert [read(reader) for _ in range(5)] == [DATA] * 5
    assert script.connections == 1


def test_a_connection_that_the_server_has_left_is_not_used_again(serve: Serve) -> None:
    script, reader = serve(whole() + b"HANGUP", whole())
    read(reader)
    (_, connection), *_ = reader._idle
    while connection.is_quiet:  # the end is on its way
        threading.Event().wait(0.001)
    assert read(reader) == DATA
    assert (script.connections, len(script.heads)) == (2, 2)


def test_a_get_whose_bytes_stand_still_ends_and_one_whose_bytes_move_does_not(serve: Serve) -> None:
    moves: list[int] = []
    _, reader = serve(whole()[:-5], b"")
    with limited(still_s=0.3, total_s=60.0), told_of_moves(moves.append), pytest.raises(TimeoutError, match="still"):
        read(reader)
    assert moves[-1] == len(DATA) - 5


def test_a_get_ends_when_its_time_is_up_whatever_moves(serve: Serve) -> None:
    _, reader = serve(whole()[:-5], b"")
    with limited(still_s=60.0, total_s=0.3), pytest.raises(TimeoutError, match="time"):
        read(reader)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/b", "http://no.such.host.invalid/b"])
def test_an_endpoint_that_cannot_be_reached_is_told_as_unsent(url: str) -> None:
    reader = RangeReader(url, lambda _, headers: headers, proof="etag", connect_s=5.0, context=ssl.SSLContext)
    with pytest.raises(UnsentError) as caught:
        reader.stream("k", 0, 10, Whole(memoryview(bytearray(10)), 0))
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_a_get_is_signed_as_botocore_signs_it() -> None:
    with ObjectServer() as server:
        server.put_object("root/a b+c%ü", DATA)
        store = OBSTORE_S3.open(server, requester_pays=True)
        assert bytes(store.get("a b+c%ü", start=5, stop=99)) == DATA[5:99]
        store.close()
        (request,) = server.requests
        sent = request.headers
        assert (sent["user-agent"], sent["x-amz-request-payer"]) == ("cloudckpt", "requester")
        again = AWSRequest(
            method="GET",
            url=f"{server.endpoint}{request.path}",
            headers={"Range": "bytes=5-98", "x-amz-request-payer": "requester"},
        )
        keys = Credentials("CANARYKEYID0123456789", "CANARYSECRET0123456789", "CANARYTOKEN0123456789")
        signer = S3SigV4Auth(keys, "s3", "eu-west-1")
        again.context["timestamp"] = sent["x-amz-date"]
        signer._modify_request_before_signing(again)
        canonical = signer.canonical_request(again)
        assert sent["authorization"].endswith(signer.signature(signer.string_to_sign(again, canonical), again))


def test_a_get_goes_by_obstore_where_a_proxy_stands_between(monkeypatch: pytest.MonkeyPatch) -> None:
    with ObjectServer() as proxy:
        proxy.put_object("root/k", DATA)
        monkeypatch.setenv("http_proxy", proxy.endpoint)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        store = OBSTORE_S3.open(proxy, endpoint_url="http://store.example", allow_http=True)
        assert bytes(store.get("k", start=0, stop=10)) == DATA[:10]
        store.close()
        assert "object_store" in proxy.requests[0].headers["user-agent"]


def test_a_get_of_many_pieces_leaves_its_memory_alone_when_it_is_cut(serve: Serve) -> None:
    """What stood behind the bytes that came is as it was: the caller may hold other objects there."""
    _, reader = serve(whole()[: -len(DATA) // 2] + b"HANGUP")
    memory = memoryview(bytearray(b"\xaa" * (len(DATA) + 100)))
    with pytest.raises(BodyLengthError):
        reader.stream("k", 0, len(DATA), Whole(memory[: len(DATA)], 0))
    assert bytes(memory[len(DATA) :]) == b"\xaa" * 100


def test_a_read_over_a_slow_link_is_one_request_though_it_takes_longer_than_one_may_stand_still() -> None:
    """obstore's own client would end it."""
    body = bytes(MIB // 4)
    with ObjectServer() as server:
        server.put_object("root/k", body)
        with _Trickle(server, pieces=8, pause_s=0.1) as port:
            policy = RetryPolicy(request_timeout_s=0.5, deadline_s=30.0)
            inner = OBSTORE_S3.open(server, retry=policy, endpoint_url=f"http://127.0.0.1:{port}")
            with RetryingStore(inner, policy) as store:
                assert bytes(store.get("k", start=0, stop=len(body))) == body
                assert store.stats()["get"].requests == 1


class _Trickle:
    """Passes replies on in pieces, with pauses between them."""

    def __init__(self, server: ObjectServer, *, pieces: int, pause_s: float) -> None:
        self._server, self._pieces, self._pause_s = server, pieces, pause_s
        self._listener = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> int:
        threading.Thread(target=self._serve, daemon=True).start()
        port: int = self._listener.getsockname()[1]
        return port

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with suppress(OSError), client, socket.create_connection(("127.0.0.1", self._server.port)) as server:
            server.sendall(client.recv(65536))
            while data := server.recv(MIB // 4 // self._pieces):
                client.sendall(data)
                threading.Event().wait(self._pause_s)
