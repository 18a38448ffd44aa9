"""Read the newest checkpoint of a root before anybody can ask for it: while torch is imported and a model is built.

    prefetch(url) ──▶ thread: connect, list ──▶ newest prefix with a manifest ──▶ its index and its shards, span by span
                                                of several ranks, where as many saved it: each rank's own shards
    restore       ──▶ over(store) ──▶ bytes that are here or on their way, else the store's     ──▶ verified as ever

A guess, and no more: which checkpoint is restored the restore looks for anew, and it compares every block with its
digest, wherever the bytes came from. What an attempt wrote under a key never changes, so that no bytes are stale. Knows
keys and bytes; what is in them it asks the index only where a part is wanted, and only then it needs torch. Daemons
read, any thread may ask. A forked child begins with nothing.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from cloudckpt.errors import CloudCkptError, OptionsError
from cloudckpt.keys import MANIFEST_NAME, index_key, parse_checkpoint_prefix, parse_shard_name
from cloudckpt.options import Options
from cloudckpt.store import Flow, Intake, Listing, ObjectInfo, RangeGets, RetryingStore, Store, new_memory, open_store
from cloudckpt.threads import new_lock, started

__all__ = ["Ahead", "Prefetch", "prefetch"]

logger = logging.getLogger(__name__)

# How many prefixes without a manifest are passed over: saves that are under way, or were killed.
_TRIES = 4
# What is not begun when somebody asks is the restore's own: pieces are short, so that this is most of it.
_PIECE_BYTES = 8 << 20

_Place = tuple[str, str]
"""URL and endpoint of a root."""


def prefetch(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    only: str | Sequence[str] | None = None,
) -> Prefetch:
    """Begin to read what `restore` will ask for, in the background, and return at once.

    For the first lines of a program, before it imports torch: meanwhile credentials and the connection are there, the
    root is listed, and the newest checkpoint is read, as far as the budget goes. The next `restore` or `load` of this
    URL in this process takes from that what it needs, waits for nothing else, and frees the rest. It looks for the
    newest checkpoint anew and verifies all bytes as without this; so what it restores is the same. What goes wrong
    here is told to the log, and costs no more than the time that would have been saved.

    One process of several (`RANK` and `WORLD_SIZE`, as torchrun sets them) reads the shards that the same rank has
    saved, which is what it will need on the same mesh, if as many ranks have saved it; else it connects and lists, and
    the log says so (INFO). Rank 0 alone reads the index.

    Args:
        url: what the manager, or `load`, will be given.
        storage_options: as there; a connection is shared only where they are the same.
        engine: as there.
        options: as there; so many requests are in flight, and what is read and not yet asked for takes
            `memory_budget_bytes` at most (512 MiB, if that is None). The restore may hold as much beside that, so that
            both together are twice the budget. What it takes is given back as it goes into its tensors, and what
            nobody has taken when the restore ends (with `wait`, when the rest of it has come).
        only: as for `restore`: names of what is wanted, with all that is below them; None is all. Then the index is
            read first, which tells where they are; that needs torch, and the thread imports it.

    Returns:
        What holds the bytes; `close` frees them where nothing is to be restored.

    Raises:
        OptionsError: the URL, the engine, an option or a name is wrong.
    """
    chosen, names = Options.of(options), None if only is None else _names_of(only)
    made = Prefetch(open_store(url, storage_options=storage_options, engine=engine, options=chosen), chosen, names)
    with _LOCK:
        before, _HELD[made.place] = _HELD.get(made.place), made
    if before is not None:
        before.close()
    made._begin()  # noqa: SLF001 (its own kind)
    return made


def _names_of(only: str | Sequence[str]) -> list[str]:
    names = [only] if isinstance(only, str) else list(only)
    if not (names and all(isinstance(name, str) and name for name in names)):
        raise OptionsError(f"only is {only!r}; give one or more names of what the state holds")
    return names


@dataclass(slots=True, eq=False)
class _Piece:
    """A range of an object that is to be read, or is here.

    Attributes:
        data: its bytes, once they are here.
        is_begun: whether somebody reads it, or has.
    """

    key: str
    start: int
    stop: int
    data: memoryview | None = None
    is_begun: bool = False

    def part(self, start: int, stop: int) -> memoryview:
        """Return some of the bytes, by their place in the object."""
        return memoryview(self.data or b"")[start - self.start : stop - self.start]


class Prefetch:
    """What `prefetch` reads and holds. Any thread may ask; ends with the restore that it is for, or with `close`.

    Attributes:
        place: URL and endpoint of the root.
    """

    def __init__(self, store: RetryingStore, options: Options, only: Sequence[str] | None = None) -> None:
        """Made by `prefetch`."""
        self.place: _Place = (store.url, store.endpoint)
        self._store = store
        self._options = options
        self._only = only
        self._pieces: dict[str, list[_Piece]] = {}
        self._waiting: deque[_Piece] = deque()
        self._changed = threading.Condition()
        self._is_asked = False
        self._is_over = False
        self._under_way = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free what is held, and begin to read nothing more. Idempotent; returns at once."""
        with _LOCK:
            if _HELD.get(self.place) is self:
                del _HELD[self.place]
        with self._changed:
            self._is_over = True
            self._waiting.clear()
            self._pieces.clear()
            self._changed.notify_all()
            is_last = not self._under_way
        if is_last:
            self._store.close()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all is here that will be; tell whether it is. Nobody needs to."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._under_way and not self._waiting, timeout)

    @property
    def held_bytes(self) -> int:
        """Bytes that are here, and not taken yet."""
        with self._changed:
            return sum(len(one.data) for some in self._pieces.values() for one in some if one.data is not None)

    # -- reading -------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._hire(self._look)

    def _hire(self, work: Callable[[], None]) -> None:
        """Have a thread do something, and close the store behind the last one; a machine without one does without."""

        def run() -> None:
            try:
                work()
            except Exception as exc:  # noqa: BLE001 (the end of a thread; the restore meets it again, and raises it)
                self._give_up(exc)
            finally:
                self._leave()

        with self._changed:
            self._under_way += 1
        try:
            started(run, name="cloudckpt-prefetch")
        except CloudCkptError as exc:
            self._give_up(exc)
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._under_way -= 1
            is_last = self._is_over and not self._under_way
            self._changed.notify_all()
        if is_last:
            self._store.close()

    def _give_up(self, error: Exception) -> None:
        with self._changed:
            is_missed = not (self._is_asked or self._is_over)
            self._begin_nothing_more()
        if is_missed:
            logger.warning("%s is not read ahead of a restore, which will read by itself: %s", self._store.url, error)

    def _look(self) -> None:
        prefix, objects = self._newest()
        sizes = {info.key.removeprefix(prefix): info.size_bytes for info in objects}
        indexes = [info for info in objects if info.key.endswith(index_key(""))]
        if not indexes:
            return
        # Of several attempts at a step the last one is the likeliest; a wrong guess is never asked for.
        latest = max(indexes, key=lambda info: info.modified_s)
        attempt = latest.key.removeprefix(prefix).partition("/")[0]
        index = _Piece(latest.key, 0, latest.size_bytes)
        place = _place_among_ranks()
        mine = self._shards_of(place, [name for name in sizes if name.startswith(f"{attempt}/")])
        if self._only is None or (place is not None and not mine):
            whole = ((prefix + name, *span) for name in mine for span in self._spans_of_all(sizes[name]))
            self._read_these([*([index] if place is None or not place[0] else []), *self._within_budget(index, whole)])
        elif self._expect([index]) and (data := self._read_one(self._next())) is not None:
            spans = _wanted_spans(data, self._only, prefix, sizes, None if place is None else place[0], self._options)
            self._read_these(self._within_budget(index, spans))

    def _shards_of(self, place: tuple[int, int] | None, names: Sequence[str]) -> list[str]:
        """Return which of the shards of an attempt this process is likely to read, in that order."""
        numbered = {name: found for name in names if (found := parse_shard_name(name))}
        if place is None:
            # By their numbers first: the state's first tensors stand in the first shards of each rank.
            return sorted(numbered, key=lambda name: numbered[name][::-1])
        rank, size = place
        # A rank that has written nothing has no shards; then this is a guess that is not made.
        saved_by = 1 + max((of for of, _ in numbered.values()), default=-1)
        if saved_by != size or not 0 <= rank < size:
            logger.info(
                "%s: only the connection and the listing are ahead of a restore on rank %d of %d: %d ranks saved it",
                *(self._store.url, rank, size, saved_by),
            )
            return []
        return sorted(name for name, (of, _) in numbered.items() if of == rank)

    def _spans_of_all(self, size_bytes: int) -> Iterator[tuple[int, int]]:
        step = min(self._options.span_bytes, _PIECE_BYTES)
        return ((start, min(start + step, size_bytes)) for start in range(0, size_bytes, step))

    def _within_budget(self, index: _Piece, spans: Iterable[tuple[str, int, int]]) -> Iterator[_Piece]:
        """Yield ranges of objects as far as the budget goes, which the index has a part of."""
        span_bytes, budget_bytes = min(self._options.span_bytes, _PIECE_BYTES), self._options.transfer_budget_bytes
        # An engine may gather what is in flight in pieces, and then join them.
        left_bytes = max(budget_bytes - self._options.concurrency * span_bytes, budget_bytes // 2) - index.stop
        for key, start, stop in spans:
            if (left_bytes := left_bytes - (stop - start)) < 0:
                return
            yield _Piece(key, start, stop)

    def _expect(self, pieces: Sequence[_Piece]) -> bool:
        """Have pieces read by whoever is next; tell whether there is still somebody whom they are for."""
        with self._changed:
            if self._is_asked or self._is_over:
                return False
            for one in pieces:
                self._pieces.setdefault(one.key, []).append(one)
            self._waiting.extend(pieces)
            self._changed.notify_all()
        return True

    def _read_these(self, pieces: Iterable[_Piece]) -> None:
        found = list(pieces)
        if self._expect(found):
            for _ in range(min(self._options.concurrency, len(found)) - 1):
                self._hire(self._read)
            self._read()

    def _newest(self) -> tuple[str, Sequence[ObjectInfo]]:
        """Return the prefix of the newest checkpoint, and what is below it; that is nothing where there is none."""
        top = self._store.list("", delimiter="/")
        if any(info.key == MANIFEST_NAME for info in top.objects):
            return "", self._store.list("").objects  # the URL is one checkpoint
        placed = [(place[::-1], prefix) for prefix in top.prefixes if (place := parse_checkpoint_prefix(prefix))]
        for _, prefix in sorted(placed, reverse=True)[:_TRIES]:
            found = self._store.list(prefix).objects
            if any(info.key == prefix + MANIFEST_NAME for info in found):
                return prefix, found
        return "", ()

    def _read(self) -> None:
        """Read one piece after the other, until somebody asks: then what is not begun is the restore's own."""
        while (piece := self._next()) is not None:
            self._read_one(piece)

    def _read_one(self, piece: _Piece | None) -> memoryview | None:
        if piece is None:
            return None
        try:
            memory = memoryview(new_memory(piece.stop - piece.start))
            data = self._store.get(piece.key, start=piece.start, stop=piece.stop, into=memory)
        except BaseException:
            self._note(piece, None)
            raise
        self._note(piece, data)
        return data

    def _next(self) -> _Piece | None:
        with self._changed:
            while self._waiting:
                piece = self._waiting.popleft()
                if not piece.is_begun:
                    piece.is_begun = True
                    return piece
            return None

    def _note(self, piece: _Piece, data: memoryview | None) -> None:
        with self._changed:
            piece.data = data
            if data is None or self._is_over:
                self._replace(piece)
            self._changed.notify_all()

    def _replace(self, piece: _Piece, rest: Sequence[_Piece] = ()) -> None:
        some = self._pieces.get(piece.key, [])
        with suppress(ValueError):
            some.remove(piece)
            some.extend(rest)

    def _begin_nothing_more(self) -> None:
        while self._waiting:
            self._replace(self._waiting.popleft())

    # -- asking --------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """Begin to read nothing more: what is not on its way by now is read by who restores."""
        with self._changed:
            self._is_asked = True
            self._begin_nothing_more()

    def take(self, key: str, start: int, stop: int) -> list[tuple[int, memoryview]]:
        """Return what is here of the bytes [start, stop) of an object, by place; waits for what is on its way.

        Each byte is handed out once: who asks again, because it was wrong, has it from the store.
        """
        found = []
        with self._changed:
            self._changed.wait_for(lambda: all(one.data is not None for one in self._within(key, start, stop)))
            for piece in self._within(key, start, stop):
                first, last = max(start, piece.start), min(stop, piece.stop)
                rest = [(piece.start, first), (last, piece.stop)]
                found.append((first, piece.part(first, last)))
                self._replace(
                    piece, [_Piece(key, at, to, piece.part(at, to), is_begun=True) for at, to in rest if at < to]
                )
        return sorted(found, key=lambda part: part[0])

    def _within(self, key: str, start: int, stop: int) -> list[_Piece]:
        return [one for one in self._pieces.get(key, ()) if max(start, one.start) < min(stop, one.stop)]


def _wanted_spans(
    data: memoryview,
    only: Sequence[str],
    prefix: str,
    sizes: Mapping[str, int],
    rank: int | None,
    options: Options,
) -> Iterator[tuple[str, int, int]]:
    """Yield where the bytes of tensors by some names are: (key, start, stop), as a restore of them reads it.

    Args:
        data: of the index.
        only: the names; what is below one of them is meant, too.
        prefix: of the checkpoint.
        sizes: of what stands below that, by name.
        rank: whose shards are meant; None are all.
        options: the sizes.

    Raises:
        ManifestError: it is no index.
    """
    # Of torch, which who wants a part is about to import anyway.
    from cloudckpt.format import Index, plan_spans

    index = Index.decode(bytes(data), key=prefix)
    is_copied = any(name.startswith(f"{one.attempt}/") for one in index.holders for name in sizes)
    shards = {(one.rank, one.number): one for one in index.shards() if rank is None or one.rank == rank}
    wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for of in sorted({one for one, _ in shards}):
        for name, piece in index.pieces_of(of):
            if any(name == one or name.startswith(f"{one}.") for one in only):
                stop = piece.start + math.prod(piece.sizes) * index.tensors[name].itemsize_bytes
                wanted.setdefault((of, piece.number), []).append((piece.start, stop))
    span_bytes = max(1, min(options.span_bytes, _PIECE_BYTES) // index.block_bytes) * index.block_bytes
    for place in sorted(wanted, key=lambda place: place[::-1]):
        one = shards[place]
        spans = plan_spans(
            wanted[place], size_bytes=one.size_bytes, block_bytes=index.block_bytes, span_bytes=span_bytes
        )
        yield from ((one.key(prefix, is_copied=is_copied), span.start, span.stop) for span in spans)


def _place_among_ranks() -> tuple[int, int] | None:
    """Return rank and number of the processes of this job, as launchers tell them; None for a lone one.

    The rank is -1 where nobody tells it.
    """
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "")
    if not size.isdigit() or int(size) < 2:
        return None
    return int(rank) if rank.isdigit() else -1, int(size)


class Ahead:
    """What was read ahead for one restore; all of it is let go with `close`."""

    def __init__(self, stores: Iterable[Store]) -> None:
        """Look for what was begun for the roots behind these stores; from here on nothing more of that is begun."""
        with _LOCK:
            self._held = {place: _HELD[place] for place in map(_place_of, stores) if place in _HELD}
        for held in self._held.values():
            held.ask()

    def over(self, store: Store) -> Store:
        """Return the store with what was read ahead of it in front."""
        held = self._held.get(_place_of(store))
        return store if held is None else _Fronted(store, held)

    def close(self) -> None:
        """Free what nobody took. Idempotent."""
        for held in self._held.values():
            held.close()


def _place_of(store: Store) -> _Place:
    return store.url, store.endpoint


class _Fronted(RangeGets):
    """A store, of which some bytes were read before. See `Store` for the verbs."""

    def __init__(self, store: Store, held: Prefetch) -> None:
        self._store = store
        self._held = held

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def engine(self) -> str:
        return self._store.engine

    @property
    def endpoint(self) -> str:
        return self._store.endpoint

    @property
    def is_create_atomic(self) -> bool:
        return self._store.is_create_atomic

    def stream(self, key: str, *, start: int, stop: int, into: Intake) -> None:
        at = start
        for place, data in [*self._held.take(key, start, stop), (stop, memoryview(b""))]:
            if at < place:
                self._store.stream(key, start=at, stop=place, into=into)
            Flow(into, len(data)).take(data)
            at = place + len(data)

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        parts = self._held.take(key, 0, limit_bytes)
        return bytes(parts[0][1]) if len(parts) == 1 else self._store.read(key, limit_bytes=limit_bytes)

    def beside(self, url: str) -> Store | None:
        return self._store.beside(url) if isinstance(self._store, RetryingStore) else None

    def put(self, key: str, buffers: Sequence[memoryview]) -> None:
        self._store.put(key, buffers)

    def create(self, key: str, data: bytes) -> None:
        self._store.create(key, data)

    def head(self, key: str) -> ObjectInfo:
        return self._store.head(key)

    def list(self, prefix: str = "", *, delimiter: str = "", mark: str = "") -> Listing:
        return self._store.list(prefix, delimiter=delimiter, mark=mark)

    def delete(self, keys: Sequence[str]) -> None:
        self._store.delete(keys)

    def refresh(self) -> None:
        self._store.refresh()

    def close(self) -> None:
        self._store.close()


_LOCK = new_lock()
_HELD: dict[_Place, Prefetch] = {}
# Its threads did not come along, and a connection of its parent's is not for a child to close.
_inherited: list[object] = []


def _after_fork() -> None:
    _inherited.append(dict(_HELD))
    _HELD.clear()


os.register_at_fork(after_in_child=_after_fork)
