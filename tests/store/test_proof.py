"""An answer with status 200 is believed only if it is a store's, and nobody starts anew because of one that is not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt.errors import CloudCkptError, SaveFailedError, TransientError
from cloudckpt.options import MIB, Options, RetryPolicy
from cloudckpt.store.facts import GarbledReplyError
from cloudckpt.store.proof import (
    check_created,
    check_generation,
    check_listed,
    check_listing,
    check_object,
    check_stored,
    is_document,
)
from tests.store.engine_laws import PAGES, WEB_HEADERS
from tests.store.engines import GCSFS, OBSTORE_GCS, OBSTORE_S3, S3FS, Engine
from tests.store.http_dialects import Request
from tests.store.http_object_server import Fault, ObjectServer

ENGINES = [
    *(pytest.param(S3FS, id="s3fs"), pytest.param(OBSTORE_S3, id="obstore-s3")),
    *(pytest.param(GCSFS, id="gcsfs"), pytest.param(OBSTORE_GCS, id="obstore-gcs")),
]
SENT = [memoryview(b"a"), memoryview(b"bc")]
MD5 = hashlib.md5(b"abc").hexdigest()
ODD_ETAGS = ["0x8D1CA1", "65a1f3c2-5f3c", "d41d8cd98f00b204", "CJ2pqL_6q5ADEAE="]


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        yield server


def unasked() -> tuple[str | None, int]:
    raise AssertionError("nothing was to be asked")


def raises(error: type[Exception]) -> Callable[[], bytes]:
    def look() -> bytes:
        raise error

    return look


@pytest.mark.parametrize(
    "body",
    [
        b"<ListBucketResult/>",
        b'<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">',
        b"\xef\xbb\xbf<?xml version='1.0'?>\r\n<!-- a > b --><s3:ListBucketResult\n a='b'>",
    ],
)
def test_a_document_is_known_by_its_root(body: bytes) -> None:
    assert is_document(body, "ListBucketResult")


@pytest.mark.parametrize("body", [*PAGES.values(), b"<ListBucketResults/>", b"<a><ListBucketResult/></a>", b"<Error/>"])
def test_another_document_is_none(body: bytes) -> None:
    assert not is_document(body, "ListBucketResult")


@pytest.mark.parametrize("etag", [f'"{MD5}"', MD5, f'"{MD5.upper()}"'])
def test_the_digest_of_the_bytes_proves_a_put(etag: str) -> None:
    check_stored(etag, SENT, unasked)


@pytest.mark.parametrize("etag", ["0" * 32, f'"{MD5}-12"'])
def test_of_a_large_object_an_etag_that_looks_like_a_digest_is_believed_until_the_commit(etag: str) -> None:
    check_stored(etag, [memoryview(bytes(MIB)), memoryview(b"x")], unasked)


@pytest.mark.parametrize("etag", [*ODD_ETAGS, "0" * 32, f"{MD5}-1"])
def test_another_etag_proves_a_put_if_the_object_has_it_too(etag: str) -> None:
    check_stored(etag, SENT, lambda: (etag, 3))
    for found in ((etag, 4), (None, 3), ("other", 3)):
        with pytest.raises(GarbledReplyError):
            check_stored(etag, SENT, lambda found=found: found)  # type: ignore[misc]
    with pytest.raises(GarbledReplyError) as caught:
        check_stored(etag, SENT, raises(FileNotFoundError))  # type: ignore[arg-type]
    # The second look's own failure must not be taken for the answer to the first request.
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_the_digest_of_the_bytes_proves_a_create() -> None:
    check_created(f'"{MD5}"', b"abc", unasked)  # type: ignore[arg-type]


@pytest.mark.parametrize("etag", [*ODD_ETAGS, "0" * 32, f"{MD5}-1"])
def test_any_other_etag_proves_a_create_if_the_bytes_are_there(etag: str) -> None:
    check_created(etag, b"abc", lambda: b"abc")
    for look in (lambda: b"abd", raises(FileNotFoundError), raises(PermissionError)):
        with pytest.raises(GarbledReplyError):
            check_created(etag, b"abc", look)


@pytest.mark.parametrize("etag", [None, ""])
def test_no_etag_proves_nothing(etag: str | None) -> None:
    with pytest.raises(GarbledReplyError):
        check_stored(etag, SENT, lambda: (etag, 3))
    with pytest.raises(GarbledReplyError):
        check_created(etag, b"abc", lambda: b"abc")


def test_an_object_has_an_etag_and_is_no_page() -> None:
    check_object("e", None)
    check_object("e", "application/json")
    for etag, kind in (("e", "text/html"), ("e", "Text/HTML; charset=utf-8"), (None, "binary/octet-stream"), ("", "")):
        with pytest.raises(GarbledReplyError):
            check_object(etag, kind)


def test_a_generation_is_a_number() -> None:
    check_generation("1721")
    for generation in (None, "", "latest", "-1"):
        with pytest.raises(GarbledReplyError):
            check_generation(generation)


@pytest.mark.parametrize(
    ("names", "prefixes", "delimiter"),
    [
        (["run2/x"], [], ""),
        (["run/x", "other"], [], ""),
        (["run/x/y"], [], "/"),
        (["run/x//"], [], "/"),
        ([], ["run/x"], "/"),
        ([], ["run/x/y/"], "/"),
        ([], ["run/"], "/"),
        ([], ["other/"], "/"),
        ([], ["run/x/"], ""),
    ],
)
def test_a_listing_of_anything_else_than_what_was_asked_for_is_none(
    names: list[str], prefixes: list[str], delimiter: str
) -> None:
    with pytest.raises(GarbledReplyError):
        check_listed(names, prefixes, prefix="run/", delimiter=delimiter)


def test_a_listing_of_what_was_asked_for_is_one() -> None:
    check_listed(["run/x/y", "run/"], [], prefix="run/", delimiter="")
    check_listed(["run/x", "run/", "run/dir/"], ["run/x/", "run//"], prefix="run/", delimiter="/")


@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize(
    "echo",
    [
        *("<Prefix>root/epochs/</Prefix>", "<Prefix/>", "<Prefix>root/</Prefix><Delimiter>-</Delimiter>"),
        *("<ContinuationToken>x</ContinuationToken>", "<EncodingType>base64</EncodingType>"),
    ],
)
def test_an_empty_listing_that_answers_another_question_is_not_believed(
    server: ObjectServer, engine: Engine, echo: str
) -> None:
    body = f"<ListBucketResult>{echo}<IsTruncated>false</IsTruncated></ListBucketResult>"
    server.inject(Fault(status=200, body=body.encode()))
    store = engine.open(server)
    with pytest.raises(TransientError, match="no object store answered"):
        store.list("", delimiter="/")
    store.close()


def listing(inner: str) -> Fault:
    return Fault(status=200, body=f"<ListBucketResult>{inner}</ListBucketResult>".encode())


LAST = "<IsTruncated>false</IsTruncated>"
CONTRADICTIONS = {
    "another bucket": listing(f"<Name>other</Name><Prefix>root/</Prefix><KeyCount>0</KeyCount>{LAST}"),
    "entries are missing": listing(f"<Name>bucket</Name><Prefix>root/</Prefix><KeyCount>2</KeyCount>{LAST}"),
    "an error in it": listing(f"<Name>bucket</Name>{LAST}<Error><Code>InternalError</Code></Error>"),
    "of no bucket": listing(LAST),
    "of no end": listing("<Name>bucket</Name>"),
    "says nothing": listing(""),
    **{str(status): replace(listing(f"<Name>bucket</Name>{LAST}"), status=status) for status in (202, 203, 204, 206)},
}
JSON_CONTRADICTIONS = {
    "an error in it": Fault(status=200, body=b'{"kind": "storage#objects", "error": {"code": 500}}'),
    "no names": Fault(status=200, body=b'{"kind": "storage#objects", "items": [{"size": "1"}]}'),
    "no lists": Fault(status=200, body=b'{"kind": "storage#objects", "items": 1, "prefixes": null}'),
    **{str(status): Fault(status=status, body=b'{"kind": "storage#objects"}') for status in (202, 203, 206)},
}


@pytest.mark.parametrize(
    ("engine", "reply"),
    [
        pytest.param(engine, reply, id=f"{name}-{what}")
        for engines, replies in (
            ({"s3fs": S3FS, "obstore-s3": OBSTORE_S3}, CONTRADICTIONS),
            ({"gcsfs": GCSFS, "obstore-gcs": OBSTORE_GCS}, JSON_CONTRADICTIONS),
        )
        for name, engine in engines.items()
        for what, reply in replies.items()
    ],
)
def test_an_empty_listing_that_contradicts_itself_is_no_empty_root(
    server: ObjectServer, engine: Engine, reply: Fault
) -> None:
    server.inject(reply)
    store = engine.open(server)
    with pytest.raises(TransientError, match="no object store answered"):
        store.list("", delimiter="/")
    store.close()


@pytest.mark.parametrize(
    ("bucket", "name"),
    [("b", "b"), ("tenant:b", "b"), ("arn:aws:s3:eu-west-1:1:accesspoint/a", "b"), ("a-x-s3alias", "b")],
)
def test_a_bucket_may_have_another_name_inside_the_store(bucket: str, name: str) -> None:
    check_listing(bucket=bucket, name=name, entry_count=0, key_count=0, is_last=True)


def test_a_listing_that_holds_something_may_say_less_of_itself() -> None:
    check_listing(bucket="b", name=None, entry_count=1, key_count=0, is_last=None)


@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize("token", ["", "<NextContinuationToken/>"], ids=["none", "empty"])
def test_a_page_before_another_says_where_that_begins(server: ObjectServer, engine: Engine, token: str) -> None:
    body = f"<ListBucketResult><IsTruncated>true</IsTruncated>{token}</ListBucketResult>"
    server.inject(Fault(status=200, body=body.encode()))
    store = engine.open(server)
    with pytest.raises(TransientError, match="and not where"):
        store.list()
    store.close()


def opened(server: ObjectServer, engine: Engine, **more: Any) -> cloudckpt.CheckpointManager:
    """Open a manager with little patience on a root of the server."""
    return cloudckpt.CheckpointManager(
        f"{engine.scheme}://bucket/root",
        storage_options=engine.options(server),
        engine=engine.kind.engine,
        options=Options(retry=RetryPolicy(max_attempts=2, backoff_base_s=0.01)),
        **more,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_listings_without_their_query_are_no_fresh_start_and_remove_nothing(
    server: ObjectServer, engine: Engine
) -> None:
    with opened(server, engine) as manager:
        manager.save(5, {"t": torch.ones(1)})
    server.put_object("root/step-0000000006-e0001/0123456789abcdef/r00000-0000.safetensors", b"a killed job's")
    server.put_object("another/run", b"x")
    with opened(server, engine, retention=1, prune_grace_s=0, sweep_after_s=None) as manager:
        manager.save(7, {"t": torch.ones(1)})
        before = set(server.keys())
        server.unheard = frozenset({"prefix", "delimiter"})
        with pytest.raises(CloudCkptError, match="no object store answered"):
            manager.restore({"t": torch.zeros(1)})
        with pytest.raises(CloudCkptError, match="no object store answered"):
            manager.sweep(older_than_s=0, dry_run=False)
    assert set(server.keys()) == before


@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize("etag", [*ODD_ETAGS, "0" * 32])
def test_a_store_with_etags_of_its_own_is_believed_after_a_second_look(
    server: ObjectServer, engine: Engine, etag: str
) -> None:
    server.etag_of = lambda stored: f"{etag[:-1]}{stored.generation}"
    store = engine.open(server)
    store.put("put", [memoryview(b"abc")])
    store.create("created", b"abc")
    assert server.keys() == ["root/created", "root/put"]
    assert store.read("created", limit_bytes=3) == b"abc"
    store.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("page", PAGES)
def test_a_restore_from_what_is_no_store_raises_and_is_no_fresh_start(
    server: ObjectServer, engine: Engine, page: str
) -> None:
    server.inject(Fault(status=200, body=PAGES[page], headers={"ETag": WEB_HEADERS["ETag"]}), times=-1)
    options = Options(retry=RetryPolicy(max_attempts=2, backoff_base_s=0.01))
    with (
        cloudckpt.CheckpointManager(
            f"{engine.scheme}://bucket/root",
            storage_options=engine.options(server),
            engine=engine.kind.engine,
            options=options,
        ) as manager,
        pytest.raises(CloudCkptError, match="no object store answered"),
    ):
        manager.restore({"t": torch.zeros(1)})


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_a_page_whose_etag_is_its_own_digest_stores_nothing(server: ObjectServer, engine: Engine) -> None:
    page = PAGES["html"]
    etag = hashlib.md5(page).hexdigest()
    server.inject(Fault(status=200, body=page, headers={"ETag": f'"{etag}"', "Content-Type": "text/html"}))
    store = engine.open(server)
    with pytest.raises(TransientError, match="no object store answered"):
        store.put("k", [memoryview(b"abc")])
    store.close()


def _is_shard(request: Request) -> bool:
    name = request.query.get("name", request.path)
    return request.method in ("PUT", "POST") and name.endswith(".safetensors")


@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize("is_late", [False, True], ids=["lost", "listed late"])
def test_no_checkpoint_is_committed_whose_shards_the_store_does_not_hold(
    server: ObjectServer, engine: Engine, *, is_late: bool
) -> None:
    state = {"t": torch.ones(MIB // 4 + 1)}
    with opened(server, engine, retention=1, prune_grace_s=0) as manager:
        manager.save(1, state)
        if is_late:
            nothing = f"<Name>bucket</Name>{LAST}"
            server.inject(listing(nothing), when=lambda asked: "e0001/" in asked.query.get("prefix", ""))
            saved = manager.save(2, state)
            assert saved is not None
            return
        page = PAGES["html"]
        etag = hashlib.md5(page).hexdigest()
        server.inject(Fault(status=200, body=page, headers={"ETag": f'"{etag}"'}), when=_is_shard)
        with pytest.raises(SaveFailedError, match=r"nothing was committed.*is stored, and .* it is not there"):
            manager.save(2, state)
        restored = manager.restore({"t": torch.zeros(MIB // 4 + 1)})
        assert restored is not None
        assert restored.step == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_save_that_a_page_answered_raises_and_one_in_between_is_made_good(
    server: ObjectServer, engine: Engine, tmp_path: Path
) -> None:
    options = Options(retry=RetryPolicy(max_attempts=3, backoff_base_s=0.01))
    page = Fault(status=200, body=PAGES["html"], headers=WEB_HEADERS)

    def save(name: str) -> None:
        cloudckpt.save(
            {"t": torch.ones(100)},
            f"{engine.scheme}://bucket/{name}",
            storage_options=engine.options(server),
            engine=engine.kind.engine,
            options=options,
        )

    save("probed")
    server.inject(page, times=-1, when=lambda request: request.method in ("PUT", "POST"))
    with pytest.raises(CloudCkptError, match="no object store answered"):
        save("failed")
    server.reset()
    seen: set[str] = set()

    def is_first_write(request: Request) -> bool:
        name = request.query.get("name", request.path)
        is_first = request.method in ("PUT", "POST") and name not in seen
        seen.add(name)
        return is_first

    server.inject(page, times=-1, when=is_first_write)
    save("made")
    assert len(seen) >= 3
    loaded = cloudckpt.read(
        f"{engine.scheme}://bucket/made", storage_options=engine.options(server), engine=engine.kind.engine
    )
    assert torch.equal(loaded["t"], torch.ones(100))
