"""Find out whether a store can hold a root, by doing there what saves and restores do, below a prefix of its own.

    put ──▶ read back ──▶ listed at once ──▶ ranges ──▶ races to create ──▶ a large put and its reads ──▶ deleted
     ╰─ refused? with each `checksum`, with `create_only`                     ╰─ how fast, in one and in many requests

What a store lacks may be made up for by options: those are named. Whatever was written is removed at the end, also when
it fails or is interrupted.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import get_args

from cloudckpt.errors import (
    BucketNotFoundError,
    CloudCkptError,
    CreateNotEnforcedError,
    CredentialsExpiredError,
    ObjectNotFoundError,
    OptionsError,
    RetryExhaustedError,
    StorageError,
)
from cloudckpt.options import KIB, MIB, Checksum, Options
from cloudckpt.store import Store, local_path, open_store, race
from cloudckpt.threads import each

__all__ = ["Finding", "Probe", "probe"]

logger = logging.getLogger(__name__)

_ROUNDS = 20
_LARGE_BYTES = 64 * MIB
_PART_BYTES = 8 * MIB
_STREAMS = 8
_SMALL = 16
_RANGE_BYTES = 256 * KIB
# A clock this far off confuses who reads ages, and signatures of S3 fail at 15 minutes.
_SKEW_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one look at a store has shown.

    Attributes:
        name: what was looked at.
        is_good: whether a root can rely on it.
        is_needed: whether no root can be held without it.
        words: what was found, and the next action where it is not good.
    """

    name: str
    is_good: bool
    is_needed: bool
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a store is good for.

    Attributes:
        url: what was asked, without credentials.
        engine: what moved the bytes.
        can_hold_root: whether saves there are safe, with the options in `needs`.
        needs: options for `Options` without which they are not: `checksum`, `create_only`, `single_writer`.
        findings: each look, in order.
        put_bytes_s: bytes a second of one large put; 0 where it failed.
        get_bytes_s: of reading it back in parallel ranges.
        skew_s: seconds that the store's clock is ahead of this machine's; None if it does not tell.
        left: keys that could not be removed.
        verdict: all of it in one sentence.
    """

    url: str
    engine: str
    can_hold_root: bool
    needs: Mapping[str, object]
    findings: Sequence[Finding]
    put_bytes_s: float
    get_bytes_s: float
    skew_s: float | None
    left: Sequence[str]
    verdict: str


def probe(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    large_bytes: int = _LARGE_BYTES,
    rounds: int = _ROUNDS,
    progress: Callable[[str], None] = lambda _: None,
) -> Probe:
    """Ask a store whether it can hold a root, below `probe-…/` at the URL; some 400 requests and 200 MiB.

    Args:
        url: where a root is to be, or is: nothing of it is touched.
        storage_options: fsspec's own options for the URL.
        engine: what moves the bytes.
        options: as for a save; what is given there is not tried otherwise.
        large_bytes: of the large object, at least 8 MiB.
        rounds: races of 8 creators each.
        progress: is told what is done next.

    Raises:
        OptionsError: the URL, the engine or an option is wrong.
        StorageError: the store could not be reached, or nothing at all can be written or read there.
    """
    given = Options.of(options)
    found = _Found()
    with open_store(url, storage_options=storage_options, engine=engine, options=given) as store:
        place, name = store.url, store.engine
    for chosen, needs in _ways(given):
        with (
            _unmade(url, name),
            open_store(url, storage_options=storage_options, engine=engine, options=chosen) as store,
        ):
            looks = _Looks(store, found, large_bytes=max(large_bytes, _PART_BYTES), rounds=rounds, told=progress)
            if (refusal := looks.first_put()) is not None:
                found.refusals.append(refusal)
                continue
            found.needs.update(needs)
            looks.all()
            return found.probe(place, name)
    raise found.refusals[0]


@contextmanager
def _unmade(url: str | os.PathLike[str], engine: str) -> Iterator[None]:
    """Remove, at the end of the block, the directories down to the root that it has made on a disk, where empty."""
    path = Path(local_path(url)) if engine == "local" else None
    new = [] if path is None else list(takewhile(lambda one: not one.exists(), (path, *path.parents)))
    try:
        yield
    finally:
        with suppress(OSError):
            for directory in new:
                directory.rmdir()


def _ways(given: Options) -> Iterator[tuple[Options, dict[str, object]]]:
    """Yield options to try: as they are, then those that a bucket's policy may demand with each put."""
    yield given, {}
    settings = {name: getattr(given, name) for name in Options.__dataclass_fields__}
    if given.checksum is None:
        for checksum in get_args(Checksum):
            yield Options(**{**settings, "checksum": checksum}), {"checksum": checksum}
    if not (given.create_only or given.single_writer):
        yield Options(**{**settings, "create_only": True}), {"create_only": True}


@dataclass(slots=True, kw_only=True)
class _Found:
    """What the looks have shown so far."""

    findings: list[Finding] = field(default_factory=list)
    needs: dict[str, object] = field(default_factory=dict)
    refusals: list[StorageError] = field(default_factory=list)
    put_bytes_s: float = 0.0
    get_bytes_s: float = 0.0
    skew_s: float | None = None
    left: list[str] = field(default_factory=list)

    def add(self, name: str, words: str, *, is_good: bool = True, is_needed: bool = True) -> None:
        self.findings.append(Finding(name=name, is_good=is_good, is_needed=is_needed, words=words))

    def probe(self, url: str, engine: str) -> Probe:
        bad = [one for one in self.findings if one.is_needed and not one.is_good]
        lesser = [one for one in self.findings if not one.is_needed and not one.is_good]
        needs = ", ".join(f"{name}={value!r}" for name, value in self.needs.items())
        if bad:
            verdict = f"{url} cannot hold a root: {bad[0].words}"
        else:
            verdict = f"{url} can hold a root{f', with Options({needs})' if needs else ''}"
            verdict += "".join(f"; but {one.words}" for one in lesser)
        return Probe(
            url=url,
            engine=engine,
            can_hold_root=not bad,
            needs=dict(self.needs),
            findings=tuple(self.findings),
            put_bytes_s=self.put_bytes_s,
            get_bytes_s=self.get_bytes_s,
            skew_s=self.skew_s,
            left=tuple(self.left),
            verdict=verdict,
        )


class _Looks:
    """The looks at one store, in order."""

    def __init__(
        self, store: Store, found: _Found, *, large_bytes: int, rounds: int, told: Callable[[str], None]
    ) -> None:
        self._store = store
        self._found = found
        self._large_bytes = large_bytes
        self._rounds = rounds
        self._told = told
        self._prefix = f"probe-{secrets.token_hex(16)}/"
        # What may stand there, whether or not a listing shows it.
        self._written: list[str] = []

    def first_put(self) -> StorageError | None:
        """Put a few bytes, to be removed with the rest; return why the store refuses them."""
        key = self._key("first")
        try:
            self._store.put(key, [memoryview(b"cloudckpt asks whether it may write here")])
        except OptionsError as exc:  # an engine that knows no such option
            return StorageError(str(exc), op="put", key=key)
        except BucketNotFoundError:
            raise
        except (RetryExhaustedError, CredentialsExpiredError, KeyboardInterrupt) as exc:
            exc.add_note(f"{key} may stay there")
            raise
        except StorageError as exc:
            return exc
        return None

    def all(self) -> None:
        """Look at everything; a look that fails is a finding, and the next one goes on."""
        looks: Mapping[str, Callable[[], None]] = {
            "read after write": self._small,
            "ranged reads": self._ranges,
            "create-only writes": self._races,
            "large object": self._large,
        }
        try:
            for name, look in looks.items():
                self._told(name)
                try:
                    look()
                except StorageError as exc:
                    self._found.add(name, f"{name} failed: {exc}", is_good=False)
        except KeyboardInterrupt as exc:
            self._clean()
            left = self._found.left
            exc.add_note(f"{', '.join(left)} may stay there" if left else "what was written there was removed")
            raise
        finally:
            self._clean()

    def _key(self, name: str) -> str:
        self._written.append(f"{self._prefix}{name}")
        return self._written[-1]

    def _small(self) -> None:
        contents = {self._key(f"small/{number:02d}"): b"%d" % number * 100 for number in range(_SMALL)}
        began_s = time.time()
        for key, content in contents.items():
            self._store.put(key, [memoryview(content)])
            if self._store.read(key, limit_bytes=KIB) != content:
                self._found.add("read after write", "what was written is read back as other bytes", is_good=False)
                return
        listed = {info.key: info.size_bytes for info in self._store.list(f"{self._prefix}small/").objects}
        self._found.add("read after write", "what was written is read back at once")
        lost = [key for key, content in contents.items() if listed.get(key) != len(content)]
        words = (
            f"{len(lost)} of {len(contents)} objects are not listed right after they were written, so that a restore "
            "may miss the newest checkpoint; use a store whose listings are consistent"
            if lost
            else f"all of {len(contents)} objects are listed right after they were written"
        )
        self._found.add("list after write", words, is_good=not lost)
        folded = self._store.list(self._prefix, delimiter="/").prefixes
        if list(folded) != [f"{self._prefix}small/"]:
            self._found.add("list after write", "a listing does not fold keys at their slashes", is_good=False)
        self._clock(next(reversed(contents)), began_s)

    def _clock(self, key: str, began_s: float) -> None:
        written_s, now_s = self._store.head(key).modified_s, time.time()
        # Stores tell whole seconds: what lies between is no skew.
        skew_s = min(0.0, written_s + 1.0 - began_s) + max(0.0, written_s - now_s)
        self._found.skew_s = skew_s
        words = (
            f"its clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's; set the clocks"
            if abs(skew_s) > _SKEW_S
            else "its clock agrees with this machine's"
        )
        self._found.add("clock", words, is_good=abs(skew_s) <= _SKEW_S, is_needed=False)

    def _ranges(self) -> None:
        content = secrets.token_bytes(_RANGE_BYTES)
        key = self._key("ranges")
        self._store.put(key, [memoryview(content)])
        cuts = [(0, 1), (0, _RANGE_BYTES), (_RANGE_BYTES - 1, _RANGE_BYTES), (1_000, 100_001)]
        wrong = [cut for cut in cuts if bytes(self._store.get(key, start=cut[0], stop=cut[1])) != content[slice(*cut)]]
        words = f"the bytes {wrong[0]} of an object are others than were written" if wrong else "ranges are exact"
        self._found.add("ranged reads", words, is_good=not wrong)

    def _races(self) -> None:
        if not self._store.is_create_atomic:
            self._not_enforced(f"the {self._store.engine} engine cannot create an object only if its key is free")
            return
        answered = 0
        for number in range(self._rounds):
            try:
                answered += race(self._store, self._key(f"race/{number:02d}"))
            except CreateNotEnforcedError as exc:
                self._not_enforced(str(exc))
                return
        words = f"of 8 creators of one key exactly one won, {answered} times of {self._rounds}"
        if answered < self._rounds:
            words += "; faults spoilt the other races"
        if not answered:
            words = f"nobody knows whether it refuses to overwrite: faults spoilt all {self._rounds} races; try again"
        self._found.add("create-only writes", words, is_good=answered > 0)

    def _not_enforced(self, why: str) -> None:
        self._found.needs["single_writer"] = True
        words = (
            f"it does not enforce create-only writes ({why}): two jobs could commit the same step. Options("
            "single_writer=True) is safe as long as no other job ever writes to the root"
        )
        self._found.add("create-only writes", words, is_good=False, is_needed=False)

    def _large(self) -> None:
        part = secrets.token_bytes(_PART_BYTES)
        parts = [memoryview(part)] * (self._large_bytes // _PART_BYTES)
        key, size_bytes = self._key("large"), _PART_BYTES * len(parts)
        began_s = time.perf_counter()
        self._store.put(key, parts)
        self._found.put_bytes_s = size_bytes / (time.perf_counter() - began_s)
        began_s = time.perf_counter()

        def is_same(start: int) -> bool:
            return self._store.get(key, start=start, stop=start + _PART_BYTES) == part

        same = each(range(0, size_bytes, _PART_BYTES), is_same, threads=_STREAMS, name="cloudckpt-probe")
        self._found.get_bytes_s = size_bytes / (time.perf_counter() - began_s)
        words = f"an object of {size_bytes // MIB} MiB was put in one request and read back"
        if not all(same):
            words = f"an object of {size_bytes // MIB} MiB reads back as other bytes than were put"
        self._found.add("large object", words, is_good=all(same))

    def _listed(self) -> list[str]:
        keys: list[str] = []
        mark = ""
        while True:
            page = self._store.list(self._prefix, mark=mark)
            keys += [info.key for info in page.objects]
            if not (mark := page.mark):
                return keys

    def _clean(self) -> None:
        if not self._written:
            return
        self._told("delete")
        written, self._written = self._written, []
        try:
            self._store.delete(written)
            left = self._listed()
            words = (
                f"{len(left)} objects are still listed after they were deleted" if left else "deleted is gone at once"
            )
            if not left:
                with suppress(ObjectNotFoundError):
                    self._store.head(written[0])
                    # No listing tells which.
                    words, left = "objects are still there after they were deleted", written
        except CloudCkptError as exc:
            left = list(getattr(exc, "left_keys", ())) or written
            words = f"it lets nothing be deleted ({exc}), so that checkpoints are never pruned"
        self._found.left = left
        self._found.add("delete", words, is_good=not left, is_needed=False)
