"""Remember manifests on this machine from one look at a root to the next, and tell from a listing which still stand.

    file in the cache ──▶ manifest by prefix ──one flat listing says that it stands──▶ taken for read
                                               ╰── it does not say so, or there is none ──▶ read

A manifest never changes under its key. It may be deleted, and then another attempt at the same step may commit there.
So one is taken for read only where the listing shows an object of its size under its key, and of all indexes under its
prefix its own attempt's alone, of the size that it commits: another commit there would have brought another index, and
the `void` of a sweep is a smaller object. Only who overwrites a manifest in place, by hand and by as many bytes, goes
unseen; `verify` and a restore read it.

Nothing depends on the cache: what is damaged in it, foreign or missing is read from the store. It holds what manifests
say, so it is the user's alone (0700). Knows files and listings; decides nothing about what exists.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

import msgspec
import zstandard

from cloudckpt.errors import ManifestError
from cloudckpt.format import MANIFEST_NAME, Manifest, digest_of, index_key, parse_checkpoint_prefix
from cloudckpt.options import READERS
from cloudckpt.root.checkpoint import Checkpoint
from cloudckpt.store import ObjectInfo, Store

__all__ = ["CACHE_VARIABLE", "Known", "ManifestCache"]

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "CLOUDCKPT_CACHE"
_VERSION = 1
_SUFFIX = ".manifests"
_OWN = re.compile(r"\A[0-9a-f]{32}\.manifests(?:\.[0-9a-f]{16})?\Z")
# Of one root, as it is in memory, and of all files together: 100,000 manifests of 2 KiB take some 20 MiB of them.
_ROOT_BYTES = 256 << 20
_LIMIT_BYTES = 256 << 20
# A listing has pages of so many objects, one after the other; manifests are read by so many threads.
_PAGE = 1_000
# Requests one after the other that nobody has to be spared: a second where one takes a tenth of it.
_FEW_ROUNDS = 10

Manifests = Mapping[str, tuple[Manifest, bytes]]
"""Prefix of a checkpoint → its manifest, decoded and as it stands on the store."""


class Known:
    """What was read of a root before, and what the last listing says of it."""

    def __init__(self, manifests: Manifests, *, is_quick: bool | None = False) -> None:
        """Begin; no request.

        Args:
            manifests: what was read before.
            is_quick: take a manifest for standing wherever its prefix is listed, without looking at what is in it. A
                checkpoint that was removed counts as one until its shards are gone as well. None: where to look at
                each would take more than ten requests, one after the other.

        Attributes:
            look_count: requests that it takes to look at each.
        """
        self.manifests = manifests
        self.below: dict[str, list[ObjectInfo]] = {}
        object_count = sum(manifest.shard_count + 2 for manifest, _ in manifests.values())
        self._is_flat = object_count * READERS <= _PAGE * len(manifests)
        self.look_count = -(-object_count // _PAGE) if self._is_flat else len(manifests)
        rounds = self.look_count / (1 if self._is_flat else READERS)
        self.is_quick = rounds > _FEW_ROUNDS if is_quick is None else is_quick

    @property
    def is_flat(self) -> bool:
        """Whether all objects are listed: where that takes less time than to read again what is known."""
        return self._is_flat and not self.is_quick and bool(self.manifests)

    def prefixes(self, store: Store) -> Collection[str]:
        """List what stands at the top of a root."""
        if not self.is_flat:
            return store.list("", delimiter="/").prefixes
        below: dict[str, list[ObjectInfo]] = defaultdict(list)
        for info in store.list("").objects:
            below[info.key.partition("/")[0] + "/"].append(info)
        self.below = dict(below)
        return self.below

    def recalled(self, prefix: str) -> tuple[Manifest, bytes] | None:
        """Return the manifest that stands under a prefix, as far as the last listing tells; None: it is to be read."""
        known = self.manifests.get(prefix)
        if known is None or self.is_quick:
            return known
        manifest, data = known
        sizes = {info.key.removeprefix(prefix): info.size_bytes for info in self.below.get(prefix, ())}
        own = index_key(manifest.attempt)
        indexes = [name for name in sizes if name.endswith(own.partition("/")[2])]
        is_whole = manifest.index is not None and sizes.get(own) == manifest.index.size_bytes
        return known if is_whole and indexes == [own] and sizes.get(MANIFEST_NAME) == len(data) else None


class ManifestCache:
    """Manifests of roots, a file for each root."""

    def __init__(self, folder: Path, *, limit_bytes: int = _LIMIT_BYTES) -> None:
        """Use a folder, which need not be there; it holds `limit_bytes` at most."""
        self._folder = folder
        self._limit_bytes = limit_bytes

    @classmethod
    def of_environment(cls) -> Self | None:
        """Return the user's: below `XDG_CACHE_HOME`, else `~/.cache`; None where `CLOUDCKPT_CACHE` is `off`."""
        if os.environ.get(CACHE_VARIABLE, "").strip().lower() in ("off", "0", "no", "false"):
            return None
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        try:
            # As the XDG specification has it, a relative path is none.
            return cls((base if base.is_absolute() else Path.home() / ".cache") / "cloudckpt" / "manifests")
        except RuntimeError:
            return None  # nobody's home

    def manifests(self, store: Store) -> Manifests:
        """Return what is kept of a root; {} where nothing is, or nothing that can be read."""
        try:
            with _opened(self._file(store)) as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
                text = reader.read(_ROOT_BYTES)
            record = msgspec.msgpack.decode(text, type=_Record)
        except (OSError, MemoryError, RecursionError, zstandard.ZstdError, msgspec.MsgspecError, ValueError) as exc:
            logger.debug("no manifests of %s are kept: %s", store.url, exc)
            return {}
        if (record.version, record.place) != (_VERSION, _place(store)):
            return {}
        return {prefix: (one, data) for prefix, data in record.manifests.items() if (one := _decoded(prefix, data))}

    def keep(self, store: Store, checkpoints: Sequence[Checkpoint], known: Manifests) -> None:
        """Keep the manifests of a root's checkpoints, and of no others; where that cannot be done, nothing is."""
        if {one.prefix: one.digest for one in checkpoints} == {
            prefix: digest_of(data) for prefix, (_, data) in known.items()
        }:
            return
        manifests = {}
        for one in checkpoints:
            data = known[one.prefix][1] if one.prefix in known else b""
            if digest_of(data) != one.digest:
                data = one.manifest.encode()
            # What another version wrote may not come out byte for byte.
            if digest_of(data) == one.digest:
                manifests[one.prefix] = data
        text = msgspec.msgpack.encode(_Record(version=_VERSION, place=_place(store), manifests=manifests))
        if len(text) >= _ROOT_BYTES:
            return
        packed = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(text)
        try:
            self._replace(self._file(store), packed)
            self._thin_out()
        except OSError as exc:
            logger.debug("the manifests of %s are not kept: %s", store.url, exc)

    def _file(self, store: Store) -> Path:
        return self._folder / f"{digest_of(repr(_place(store)).encode())[:32]}{_SUFFIX}"

    def _replace(self, path: Path, data: bytes) -> None:
        if len(data) > self._limit_bytes:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
            new.replace(path)
        except BaseException:
            with suppress(OSError):
                new.unlink()
            raise

    def _thin_out(self) -> None:
        """Remove those of its files that were written longest ago, until the rest is small enough."""
        own = [path for path in self._folder.iterdir() if _OWN.match(path.name)]
        files = sorted(((path.lstat(), path) for path in own), key=lambda pair: -pair[0].st_mtime)
        total_bytes = 0
        for about, path in files:
            total_bytes += about.st_size
            if total_bytes > self._limit_bytes:
                path.unlink(missing_ok=True)


class _Record(msgspec.Struct, frozen=True):
    version: int
    place: tuple[str, str]
    manifests: dict[str, bytes]


def _opened(path: Path) -> BinaryIO:
    """Open a file to be read; raise OSError where it is none, such as a pipe that nobody writes to, or a link."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(file).st_mode):
        return os.fdopen(file, "rb")
    os.close(file)
    raise OSError(f"{path} is no file")


def _place(store: Store) -> tuple[str, str]:
    return store.url, store.endpoint


def _decoded(prefix: str, data: bytes) -> Manifest | None:
    """Return a manifest as its prefix has it, or None; what it says is sealed by itself."""
    try:
        manifest = Manifest.decode(data, key=prefix + MANIFEST_NAME)
    except ManifestError:
        return None
    is_there = parse_checkpoint_prefix(prefix) == (manifest.step, manifest.epoch)
    return manifest if is_there and manifest.state == "committed" else None
