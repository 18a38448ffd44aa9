"""What every store promises, once, as tests that each backend and engine inherits.

A subclass gives the fixture `backend`. What a store wrote is looked at *around* it, with other code, and what it
reads was put there so, too: a bug that `put` and `get` share cannot hide. A class opens its store once, as a job does,
and finds its root empty at the start of each test. What only one store has is tested where it belongs.
"""

from __future__ import annotations

import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from cloudckpt.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    CloudCkptError,
    ObjectExistsError,
    ObjectNotFoundError,
    OptionsError,
    RetryExhaustedError,
    StorageError,
)
from cloudckpt.options import MIB, Options, RetryPolicy
from cloudckpt.store import RetryingStore, Store, open_store, probe_create
from cloudckpt.store.probe import _proven

__all__ = ["Backend", "CredentialContract", "RemoteContract", "StoreContract"]

PATIENCE = RetryPolicy(
    max_attempts=4, deadline_s=60.0, request_timeout_s=20.0, connect_timeout_s=2.0, backoff_base_s=0.05
)
ODD_KEYS = [
    "with space",
    "plus+plus",
    "100%",
    "50%25",
    "a%2Fb",
    "equals=sign",
    "~tilde",
    "ünï/cödé-試験",
    "emoji-😀",
    "and&and;semi",
    "colon:at@comma,",
    "quote'double\"",
    "(round)[square]{curly}",
    "star*question?hash#",
    "dollar$bang!",
    "pipe|less<more>",
    ".hidden",
    "dots..in...it",
    "ends.with.dot.",
    "UPPER",
    "upper",
    "-dash",
    "_",
    "/".join(["long" * 50] * 4),
]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One store under test, and ways around it.

    Attributes:
        url: its root, empty.
        engine: which engine to ask for.
        storage_options: what reaches it.
        raw_get: key below the root → bytes, or FileNotFoundError.
        raw_put: write an object.
        raw_list: all keys below the root, sorted.
        raw_clear: remove all that is below the root.
        open_with: opens it, when that is not done by its URL.
        many_keys: more than one page of a listing, and more than one bulk delete takes.
        secrets: what must never show.
        server_makes_buckets: whether a write to a missing bucket makes it, whatever the client says.
    """

    url: str
    engine: str = "auto"
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    raw_get: Callable[[str], bytes]
    raw_put: Callable[[str, bytes], None]
    raw_list: Callable[[], list[str]]
    raw_clear: Callable[[], None]
    open_with: Callable[[RetryPolicy], RetryingStore] | None = None
    many_keys: int = 1005
    secrets: Sequence[str] = field(default=(), repr=False)
    server_makes_buckets: bool = False

    def open(self, *, url: str | None = None, retry: RetryPolicy = PATIENCE, **storage_options: Any) -> RetryingStore:
        """Open the root, or another URL, with changes to the options."""
        if self.open_with is not None:
            return self.open_with(retry)
        options = {**self.storage_options, **storage_options} if self.storage_options else None
        return open_store(url or self.url, storage_options=options, engine=self.engine, options=Options(retry=retry))


def views(*parts: bytes) -> list[memoryview]:
    return [memoryview(part) for part in parts]


def noise(size_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def verbs(store: Store, key: str) -> dict[str, Callable[[], object]]:
    """Every verb, on one key."""
    return {
        "put": lambda: store.put(key, views(b"x")),
        "create": lambda: store.create(key, b"x"),
        "get": lambda: store.get(key, start=0, stop=1),
        "read": lambda: store.read(key, limit_bytes=9),
        "head": lambda: store.head(key),
        "list": store.list,
        "delete": lambda: store.delete([key]),
    }


class StoreContract:
    """The laws that hold everywhere."""

    @pytest.fixture(scope="class")
    @classmethod
    def store(cls, backend: Backend) -> Iterator[RetryingStore]:
        with backend.open() as store:
            yield store

    @pytest.fixture(autouse=True)
    def _empty_root(self, backend: Backend) -> Iterator[None]:
        yield
        backend.raw_clear()

    # -- put -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "sizes",
        [
            pytest.param([], id="nothing"),
            pytest.param([0], id="one-empty-buffer"),
            pytest.param([1], id="one-byte"),
            pytest.param([0, 3, 0, 0, 5, 0], id="some-empty"),
            pytest.param([8, 1 << 20, 3, 70_000, 1], id="header-and-views"),
            pytest.param([100, 9 * MIB + 3], id="more-than-8-MiB"),
            pytest.param([number % 7 for number in range(5000)], id="thousands-of-tiny"),
        ],
    )
    def test_a_put_writes_the_concatenation_of_its_buffers(
        self, store: RetryingStore, backend: Backend, sizes: list[int]
    ) -> None:
        data = memoryview(noise(sum(sizes)))
        ends = [sum(sizes[: count + 1]) for count in range(len(sizes))]
        store.put("a/b", [data[end - size : end] for end, size in zip(ends, sizes, strict=True)])
        assert backend.raw_get("a/b") == data

    def test_a_put_leaves_the_callers_memory_as_it_was(self, store: RetryingStore) -> None:
        memory = bytearray(noise(MIB))
        before = bytes(memory)
        store.put("a", [memoryview(memory)[:1000], memoryview(memory)[1000:]])
        assert memory == before
        memory.extend(b"not held by anybody")

    def test_memory_that_changes_after_a_put_does_not_change_the_object(
        self, store: RetryingStore, backend: Backend
    ) -> None:
        memory = bytearray(noise(2 * MIB))
        before = bytes(memory)
        store.put("a", [memoryview(memory)])
        memory[:] = bytes(len(memory))
        assert backend.raw_get("a") == before

    def test_a_put_replaces_the_whole_object(self, store: RetryingStore, backend: Backend) -> None:
        backend.raw_put("a", noise(50_000))
        store.put("a", views(b"short"))
        assert backend.raw_get("a") == b"short"

    def test_a_reader_beside_a_writer_sees_one_whole_object(self, store: RetryingStore, backend: Backend) -> None:
        values = [bytes([number]) * 200_000 for number in range(10)]
        backend.raw_put("a", values[0])
        seen = []
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(lambda: [store.put("a", views(value)) for value in values])
            while not writing.done():
                seen.append(store.read("a", limit_bytes=200_000))
            writing.result()
        assert all(value in values for value in seen)
        assert store.read("a", limit_bytes=200_000) == values[-1]

    # -- get, read, head -----------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("start", "stop"), [(0, 1), (0, 100_000), (99_999, 100_000), (1, 99_999), (65_535, 65_537), (500, 500)]
    )
    @pytest.mark.parametrize("gives_memory", [False, True])
    def test_a_get_brings_exactly_the_range(
        self, store: RetryingStore, backend: Backend, start: int, stop: int, gives_memory: bool
    ) -> None:
        data = noise(100_000)
        backend.raw_put("a", data)
        into = memoryview(bytearray(stop - start)) if gives_memory else None
        view = store.get("a", start=start, stop=stop, into=into)
        assert view == data[start:stop]

    def test_a_get_into_a_part_of_memory_touches_no_other_part(self, store: RetryingStore, backend: Backend) -> None:
        data = noise(5000)
        backend.raw_put("a", data)
        memory = bytearray(b"\xaa" * 9000)
        view = store.get("a", start=0, stop=5000, into=memoryview(memory)[2000:7000])
        assert view == data
        assert memory[:2000] == b"\xaa" * 2000
        assert memory[7000:] == b"\xaa" * 2000

    @pytest.mark.parametrize(("start", "stop"), [(0, 11), (9, 11), (10, 11), (20, 30)])
    def test_a_get_past_the_end_is_an_error(
        self, store: RetryingStore, backend: Backend, start: int, stop: int
    ) -> None:
        backend.raw_put("a", b"0123456789")
        with pytest.raises(StorageError):
            store.inner.get("a", start=start, stop=stop)

    def test_a_read_brings_the_whole_object(self, store: RetryingStore, backend: Backend) -> None:
        for name, data in {"empty": b"", "one": b"x", "more": noise(100_000)}.items():
            backend.raw_put(name, data)
            assert store.read(name, limit_bytes=100_000) == data

    @pytest.mark.parametrize("size_bytes", [11, 3 * MIB])
    def test_a_read_above_its_limit_is_an_error_after_a_second_look_at_most(
        self, store: RetryingStore, backend: Backend, size_bytes: int
    ) -> None:
        backend.raw_put("a", noise(size_bytes))
        before = store.stats()
        with pytest.raises(StorageError):
            store.read("a", limit_bytes=10)
        # By a network the answer alone may be damaged; a disk is asked once.
        looks = 1 if store.engine in ("local", "memory") else 2
        assert (store.stats() - before)["read"].requests == looks

    def test_a_head_tells_the_size_and_the_time(self, store: RetryingStore, backend: Backend) -> None:
        backend.raw_put("a/b", noise(12_345))
        info = store.head("a/b")
        assert (info.key, info.size_bytes) == ("a/b", 12_345)
        assert abs(info.modified_s - time.time()) < 3600

    @pytest.mark.parametrize("verb", ["get", "read", "head"])
    @pytest.mark.parametrize("key", ["absent", "dir", "dir/absent", "there/below"])
    def test_what_is_not_there_is_not_found(self, store: RetryingStore, backend: Backend, verb: str, key: str) -> None:
        backend.raw_put("there", b"x")
        backend.raw_put("dir/there", b"x")
        with pytest.raises(ObjectNotFoundError) as caught:
            verbs(store, key)[verb]()
        assert (caught.value.op, caught.value.key, caught.value.attempts) == (verb, key, 1)

    def test_a_head_is_never_answered_from_memory(self, store: RetryingStore, backend: Backend) -> None:
        with pytest.raises(ObjectNotFoundError):
            store.head("a")
        assert store.list().objects == ()
        backend.raw_put("a", b"12")
        assert store.head("a").size_bytes == 2
        backend.raw_put("a", b"123")
        assert store.head("a").size_bytes == 3
        assert [info.size_bytes for info in store.list().objects] == [3]

    # -- create --------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("data", [b"", b"x", noise(100_000)], ids=len)
    def test_a_create_writes_the_object(self, store: RetryingStore, backend: Backend, data: bytes) -> None:
        store.create("a/b", data)
        assert backend.raw_get("a/b") == data

    @pytest.mark.parametrize("first", [b"", b"first", noise(100_000)], ids=len)
    def test_a_create_never_overwrites(self, store: RetryingStore, backend: Backend, first: bytes) -> None:
        backend.raw_put("a/b", first)
        for layer in (store, store.inner):
            with pytest.raises(ObjectExistsError):
                layer.create("a/b", b"second")
        assert backend.raw_get("a/b") == first
        assert backend.raw_list() == ["a/b"]

    def test_a_key_that_was_deleted_can_be_created(self, store: RetryingStore, backend: Backend) -> None:
        store.create("a", b"first")
        store.delete(["a"])
        store.create("a", b"second")
        assert backend.raw_get("a") == b"second"

    def test_of_two_racing_creates_exactly_one_wins(self, store: RetryingStore, backend: Backend) -> None:
        barrier = threading.Barrier(2)

        def wins(key: str, name: str) -> bool:
            barrier.wait(30)
            try:
                store.create(key, name.encode())
            except ObjectExistsError:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            for number in range(20):
                key = f"claims/{number}"
                racers = {name: pool.submit(wins, key, name) for name in ("one", "two")}
                winners = [name for name, racer in racers.items() if racer.result()]
                assert winners == [backend.raw_get(key).decode()]
        assert len(backend.raw_list()) == 20

    def test_the_store_passes_the_probe_and_keeps_nothing_of_it(self, store: RetryingStore, backend: Backend) -> None:
        _proven.clear()
        probe_create(store)
        assert backend.raw_list() == []

    # -- list ----------------------------------------------------------------------------------------------

    def test_an_empty_root_lists_as_empty(self, store: RetryingStore) -> None:
        for listing in (store.list(), store.list("a/"), store.list(delimiter="/"), store.list("a/", delimiter="/")):
            assert (listing.objects, listing.prefixes) == ((), ())

    def test_a_listing_tells_every_object_below_in_order(self, store: RetryingStore, backend: Backend) -> None:
        sizes = {"b": 1, "a/z": 2, "a/b/c": 3, "a-b": 4, "a/b/d/e": 5, "A": 6, "a.b": 7}
        for key, size in sizes.items():
            backend.raw_put(key, bytes(size))
        assert [(info.key, info.size_bytes) for info in store.list().objects] == sorted(sizes.items())
        assert [info.key for info in store.list("a/").objects] == ["a/b/c", "a/b/d/e", "a/z"]

    def test_a_prefix_is_a_string_and_need_not_end_a_name(self, store: RetryingStore, backend: Backend) -> None:
        for key in ("step-1/a", "step-10/a", "step-10/ab", "step-2/a", "steps", "other"):
            backend.raw_put(key, b"x")
        assert [info.key for info in store.list("step-1").objects] == ["step-1/a", "step-10/a", "step-10/ab"]
        assert [info.key for info in store.list("step-10/a").objects] == ["step-10/a", "step-10/ab"]
        assert store.list("step-1", delimiter="/").prefixes == ("step-1/", "step-10/")
        listing = store.list("step", delimiter="/")
        assert [info.key for info in listing.objects] == ["steps"]
        assert listing.prefixes == ("step-1/", "step-10/", "step-2/")
        assert store.list("step-3").objects == ()

    def test_a_delimiter_splits_what_is_here_from_what_is_below(self, store: RetryingStore, backend: Backend) -> None:
        for key in ("top", "a/1", "a/2", "a/b/3", "c/d/e/4"):
            backend.raw_put(key, b"x")
        root, below, deep = (store.list(prefix, delimiter="/") for prefix in ("", "a/", "c/"))
        assert ([info.key for info in root.objects], root.prefixes) == (["top"], ("a/", "c/"))
        assert ([info.key for info in below.objects], below.prefixes) == (["a/1", "a/2"], ("a/b/",))
        assert ([info.key for info in deep.objects], deep.prefixes) == ([], ("c/d/",))

    def test_no_listing_leaves_the_root(self, backend: Backend) -> None:
        for url in (f"{backend.url}/a", f"{backend.url}/ab"):
            if backend.open_with is not None:
                pytest.skip("a bucket without URLs has one root")
            with backend.open(url=url) as store:
                store.put("x", views(b"x"))
        with backend.open(url=f"{backend.url}/a") as store:
            assert [info.key for info in store.list().objects] == ["x"]
            assert store.list("b").objects == ()

    def test_more_than_a_page_is_listed_and_deleted_whole(self, store: RetryingStore, backend: Backend) -> None:
        keys = [f"{number:05d}/x" for number in range(backend.many_keys)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: store.put(key, views(b"x")), keys))
        backend.raw_put("stays", b"x")
        assert [info.key for info in store.list().objects] == [*keys, "stays"]
        assert store.list(delimiter="/").prefixes == tuple(key.removesuffix("x") for key in keys)
        store.delete([*keys, "absent", "absent/too"])
        assert backend.raw_list() == ["stays"]

    # -- delete --------------------------------------------------------------------------------------------

    def test_a_delete_removes_those_keys_and_no_others(self, store: RetryingStore, backend: Backend) -> None:
        for key in ("a", "ab", "b/a", "b/ab", "c/d/e", "c/d/f"):
            backend.raw_put(key, b"x")
        store.delete(["a", "b/a", "c/d/e"])
        assert backend.raw_list() == ["ab", "b/ab", "c/d/f"]

    def test_what_is_absent_counts_as_deleted(self, store: RetryingStore, backend: Backend) -> None:
        backend.raw_put("a", b"x")
        store.delete(["absent", "a", "absent/too"])
        store.delete(["a"])
        store.delete([])
        assert backend.raw_list() == []

    # -- names ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("key", ODD_KEYS, ids=lambda key: key[:24])
    def test_an_odd_key_means_the_same_to_everybody(self, store: RetryingStore, backend: Backend, key: str) -> None:
        store.put(key, views(b"put"))
        assert backend.raw_list() == [key]
        assert backend.raw_get(key) == b"put"
        assert store.read(key, limit_bytes=9) == b"put"
        assert store.get(key, start=1, stop=3) == b"ut"
        assert store.head(key).key == key
        assert [info.key for info in store.list().objects] == [key]
        assert [info.key for info in store.list(key).objects] == [key]
        with pytest.raises(ObjectExistsError):
            store.create(key, b"create")
        store.delete([key])
        assert backend.raw_list() == []
        store.create(key, b"create")
        assert backend.raw_get(key) == b"create"

    @pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "a/../b", "..", "./a", "a\nb", "a\\b", "k" * 901])
    def test_a_key_that_could_mean_two_things_is_refused_by_every_verb(
        self, store: RetryingStore, backend: Backend, key: str
    ) -> None:
        for layer in (store, store.inner):
            for name, verb in verbs(layer, key).items():
                if name != "list":
                    with pytest.raises(OptionsError):
                        verb()
        assert backend.raw_list() == []

    # -- the rest ------------------------------------------------------------------------------------------

    def test_many_threads_do_not_mix_up_their_bytes(self, store: RetryingStore) -> None:
        def round_trip(number: int) -> bool:
            data, key = noise(100_000 + number, seed=number), f"{number % 4}/{number}"
            store.put(key, views(data[:1000], data[1000:]))
            into = memoryview(bytearray(50_000))
            return store.get(key, start=1000, stop=51_000, into=into) == data[1000:51_000]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(round_trip, range(64)))

    def test_each_verb_is_one_request(self, store: RetryingStore, backend: Backend) -> None:
        backend.raw_put("there", b"x")
        before = store.stats()
        store.create("new", b"x")
        for name, verb in verbs(store, "there").items():
            if name != "create":
                verb()
        spent = store.stats() - before
        assert {name: spent[name].requests for name in spent} == dict.fromkeys(verbs(store, "there"), 1)
        assert spent.retries == 0

    def test_a_store_works_on_after_a_refresh(self, store: RetryingStore, backend: Backend) -> None:
        store.put("a", views(b"x"))
        store.refresh()
        store.put("b", views(b"x"))
        assert backend.raw_list() == ["a", "b"]

    def test_close_may_be_called_again(self, backend: Backend) -> None:
        store = backend.open()
        store.put("a", views(b"x"))
        store.close()
        store.close()
        store.inner.close()

    def test_no_credential_shows(self, store: RetryingStore, backend: Backend) -> None:
        backend.raw_put("there", b"x")
        shown = [store.url, repr(store), repr(store.inner), str(store.stats())]
        for key in ("there", "absent"):
            for verb in verbs(store.inner, key).values():
                try:
                    verb()
                except CloudCkptError as exc:
                    shown += [str(exc), repr(exc), str(exc.__cause__)]
        assert not [text for text in shown for secret in backend.secrets if secret in text]


class RemoteContract(StoreContract):
    """The laws of stores behind a network."""

    @pytest.fixture
    def unreachable(self) -> Iterator[dict[str, Any]]:
        """Options that lead to a port where nobody answers."""
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            yield {"endpoint_url": f"http://127.0.0.1:{bound.getsockname()[1]}"}

    @pytest.fixture
    def missing_bucket(self, backend: Backend) -> str:
        scheme = backend.url.partition("://")[0]
        return f"{scheme}://no-such-bucket-{secrets.token_hex(6)}/root"

    @pytest.mark.parametrize("verb", ["put", "create", "list"])
    def test_a_missing_bucket_is_named(self, backend: Backend, missing_bucket: str, verb: str) -> None:
        if backend.server_makes_buckets and verb != "list":
            pytest.skip("this server makes a bucket for whoever writes to it")
        with backend.open(url=missing_bucket) as store, pytest.raises(BucketNotFoundError, match="create the bucket"):
            verbs(store, "a")[verb]()

    @pytest.mark.parametrize("verb", ["get", "read", "head", "list"])
    def test_nothing_is_found_in_a_missing_bucket_and_none_is_made(
        self, backend: Backend, missing_bucket: str, verb: str
    ) -> None:
        with backend.open(url=missing_bucket) as store:
            with pytest.raises(ObjectNotFoundError):
                verbs(store, "a")[verb]()
            with pytest.raises(BucketNotFoundError):
                store.list()

    @pytest.mark.parametrize("verb", ["put", "create", "get", "read", "head", "list", "delete"])
    def test_a_store_that_cannot_be_reached_ends_by_the_deadline(
        self, backend: Backend, unreachable: dict[str, Any], verb: str
    ) -> None:
        patience = RetryPolicy(max_attempts=3, deadline_s=20.0, request_timeout_s=5.0, backoff_base_s=0.01)
        with backend.open(retry=patience, **unreachable) as store, pytest.raises(StorageError) as caught:
            verbs(store, "a")[verb]()
        # A create, too: what no connection could carry has not landed.
        assert type(caught.value) is RetryExhaustedError
        assert caught.value.attempts == 3
        assert caught.value.elapsed_s <= patience.deadline_s


class CredentialContract(RemoteContract):
    """The laws of stores that check credentials. A subclass gives `wrong_credentials`: changes to the options."""

    @pytest.mark.parametrize("verb", ["put", "create", "get", "list", "delete"])
    def test_wrong_credentials_are_a_definite_refusal(
        self, backend: Backend, wrong_credentials: dict[str, Any], verb: str
    ) -> None:
        backend.raw_put("there", b"x")
        with backend.open(**wrong_credentials) as store, pytest.raises(AccessDeniedError) as caught:
            verbs(store, "new" if verb == "create" else "there")[verb]()
        shown = str(caught.value) + repr(caught.value)
        assert not [secret for secret in wrong_credentials.values() if secret in shown]
        assert backend.raw_list() == ["there"]
