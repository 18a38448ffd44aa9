"""Open one plain file at a URL, for `torch.save` and whatever else writes or reads files: whole or not there, verified.

    write ──blocks summed──▶ a file without a name ──close──▶ sums of old and new ▶ the object, at once ▶ sums of new
    read  ◀──blocks, some ahead, each compared with its sum──  the object

The object is the file and nothing else, so that every program reads it. Its sums stand beside it, and tell of each
moment which bytes may be there. One thread has an open file; a file that is read has threads of its own.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Literal, Self, cast, overload

import xxhash

from cloudckpt.convert.blob import SizedFile
from cloudckpt.convert.places import folder_and_name, info_of, refuse_ours
from cloudckpt.errors import ChecksumError, FormatVersionError, ManifestError, ObjectNotFoundError, OptionsError
from cloudckpt.format import SUMS_LIMIT_BYTES, SUMS_SUFFIX, FileSums, SumsRecord
from cloudckpt.options import MIB, Options
from cloudckpt.store import RetryingStore, appended, local_path, open_store, refuse_beyond_one_put

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["open_file"]

_BLOCK_BYTES = 4 * MIB
_AHEAD = 8
# What a reader may find between a write that was cut off and the next; more of them are not kept apart.
_CONTENTS_LIMIT = 8


@overload
def open_file(
    url: str | os.PathLike[str],
    mode: Literal["wb"],
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    unverified: bool = False,
) -> IO[bytes]: ...


@overload
def open_file(
    url: str | os.PathLike[str],
    mode: Literal["rb"] = "rb",
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    unverified: bool = False,
) -> io.BufferedReader: ...


def open_file(
    url: str | os.PathLike[str],
    mode: str = "rb",
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    unverified: bool = False,
) -> IO[bytes] | io.BufferedReader:
    """Open a file at a URL, to be written whole or read verified; for `torch.save`, `torch.load` and the like.

    ```python
    with cloudckpt.open("s3://bucket/model.pt", "wb") as file:
        torch.save(model.state_dict(), file)
    with cloudckpt.open("s3://bucket/model.pt") as file:
        state = torch.load(file)
    ```

    What is written is there when the block has ended without an exception, all of it at once, in place of what was
    there; before that, or if the block or the process ends otherwise, nothing has changed. It is a plain object, for
    every program; beside it stands a small one, `model.pt.cloudckpt-sums`, by which `open` verifies what it reads:
    keep them together when you copy. For a whole training state `cloudckpt.save` is faster, and needs no memory or
    disk for it.

    Args:
        url: of the file. Of several processes each opens it for itself; two that write it at a time have one result or
            the other, whose sums may be the other's, so that a reader refuses it.
        mode: `wb` or `rb`. What is written is gathered in memory up to 64 MiB, then in a file below `TMPDIR`, or on a
            disk in the directory it goes to; S3 takes 5 GiB.
        storage_options: fsspec's own options for the URL.
        engine: what moves the bytes, as for `save`.
        options: patience.
        unverified: read a file as it is, without its sums: another program wrote it, or they are damaged.

    Returns:
        To write: what takes bytes in order (`write`, `tell`, `close`), and never was if it is neither closed nor left
        by the end of its block. To read: a seekable file of Python's.

    Raises:
        ObjectNotFoundError: there is no such file (a `FileNotFoundError`); or it has no sums.
        ChecksumError: it has not the bytes that were written, or its sums are damaged; also later, from a read, and
            from each after that.
        OptionsError: another mode, or a URL that names no file or a directory, or one to write in a checkpoint or root.
        StorageError: the store could not be read or written; nothing has changed.
    """
    if mode not in ("rb", "wb"):
        raise OptionsError(f"mode is {mode!r}; give 'rb' or 'wb'")
    folder, name = folder_and_name(url)
    with ExitStack() as stack:
        chosen = Options.of(options)
        store = stack.enter_context(open_store(folder, storage_options=storage_options, engine=engine, options=chosen))
        if mode == "wb":
            _refuse_no_file(store, name)
            refuse_ours(store, name, storage_options, chosen)
            return cast("IO[bytes]", _FileWriter(store, name, stack.pop_all()))
        raw = _Reading(store, name, is_verified=not unverified, stack=stack)
        raw.own(stack.pop_all())
        return _Reader(raw)


def _refuse_no_file(store: RetryingStore, name: str) -> None:
    """Refuse to write in the place of a directory or a device, before sums are put beside it."""
    if store.engine != "local":
        return
    place = Path(local_path(store.url), name)
    try:
        is_other = place.exists() and not place.is_file()
    except OSError:  # the store itself says more
        return
    if is_other:
        raise OptionsError(f"{place} is a directory, or else no regular file; give the path of a file")


class _FileWriter:
    """A file that is written from its first byte to its last, and is there when it is closed, or never.

    One that is neither closed nor left by the end of a `with` block never was.
    """

    def __init__(self, store: RetryingStore, key: str, stack: ExitStack) -> None:
        """Begin the file; `stack` closes the store."""
        self._store, self._key, self._stack = store, key, stack
        # The store after the object: it is what puts that.
        self._object = appended(store, key)
        with ExitStack() as failing:
            failing.push(stack)
            self._append = self._object.__enter__()
            failing.pop_all()
        self._size_bytes = 0
        self._block, self._in_block = xxhash.xxh3_64(), 0
        self._digests: list[str] = []
        self._is_open = True

    @property
    def closed(self) -> bool:
        """Whether nothing can be written any more."""
        return not self._is_open

    def writable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return False."""
        return False

    def seekable(self) -> bool:
        """Return False."""
        return False

    def read(self, _size: int = -1) -> bytes:
        """Raise `io.UnsupportedOperation`; it is here because NumPy takes what has no `read` for a path."""
        raise io.UnsupportedOperation("not readable: it was opened by 'wb'")

    def seek(self, _offset: int, _whence: int = 0) -> int:
        """Raise `io.UnsupportedOperation`: what writes archives asks, and writes in order then."""
        raise io.UnsupportedOperation("not seekable: it is written in order")

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._size_bytes

    def flush(self) -> None:
        """Do nothing: it is there as a whole, or not."""

    def write(self, data: ReadableBuffer) -> int:
        """Take the next bytes; they may change afterwards.

        Raises:
            ValueError: it is closed.
            StorageError: there is no room to gather them; leave the block by that.
        """
        if not self._is_open:
            raise ValueError(f"{self._key!r} is closed")
        view = memoryview(data)
        view = (view if view.c_contiguous else memoryview(view.tobytes())).cast("B")
        refuse_beyond_one_put(
            self._store,
            self._key,
            self._size_bytes + view.nbytes,
            advice="save it with cloudckpt.save, which has no such limit",
        )
        self._append(view)
        self._size_bytes += view.nbytes
        size_bytes = view.nbytes
        while view.nbytes:
            part = view[: _BLOCK_BYTES - self._in_block]
            self._block.update(part)
            self._in_block += part.nbytes
            view = view[part.nbytes :]
            if self._in_block == _BLOCK_BYTES:
                self._end_block()
        return size_bytes

    def _end_block(self) -> None:
        if self._in_block:
            self._digests.append(self._block.hexdigest())
            self._block, self._in_block = xxhash.xxh3_64(), 0

    def close(self) -> None:
        """Put the file where it belongs; nothing if it is closed already.

        Raises:
            StorageError: it could not be written; what was there is there still. In the place of a file without sums
                the new one may be there, without sums as well.
        """
        if not self._is_open:
            return
        self._is_open = False
        self._end_block()
        mine = FileSums(size_bytes=self._size_bytes, block_bytes=_BLOCK_BYTES, digests=tuple(self._digests))
        with self._stack:
            try:
                before = _contents_of(self._store, self._key)
                # A file without sums has none to be told beside the new ones, which would call it damaged.
                is_foreign = before is None and info_of(self._store, self._key) is not None
                if not is_foreign:
                    self._put_sums(mine, *(one for one in before or () if one != mine))
            except BaseException as exc:
                self._object.__exit__(type(exc), exc, exc.__traceback__)
                raise
            self._object.__exit__(None, None, None)
            if before or is_foreign:
                self._put_sums(mine)

    def _put_sums(self, *contents: FileSums) -> None:
        self._store.put(self._key + SUMS_SUFFIX, [memoryview(SumsRecord.of(*contents).encode())])

    def discard(self) -> None:
        """Let it never have been; nothing if it is closed already."""
        if self._is_open:
            self._is_open = False
            with self._stack, suppress(_DiscardedError):
                error = _DiscardedError()
                self._object.__exit__(_DiscardedError, error, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


class _DiscardedError(Exception):
    """What ends a file that is not to be."""


def _contents_of(store: RetryingStore, key: str) -> tuple[FileSums, ...] | None:
    """Return what a file that is to be replaced may be; of many, cut off one after the other, the one that it is.

    None where no sums are. Sums that cannot be read say nothing: the file is replaced all the same.
    """
    try:
        contents = SumsRecord.decode(store.read(key + SUMS_SUFFIX, limit_bytes=SUMS_LIMIT_BYTES), key=key).contents
    except ObjectNotFoundError:
        return None
    except ManifestError:
        return ()
    if len(contents) < _CONTENTS_LIMIT:
        return contents
    try:
        return tuple(one for one in contents if _is_content(store, key, one))
    except ObjectNotFoundError:
        return ()


def _is_content(store: RetryingStore, key: str, sums: FileSums) -> bool:
    return store.head(key).size_bytes == sums.size_bytes and all(
        _digest_at(store, key, sums, number)[1] == digest for number, digest in enumerate(sums.digests)
    )


def _digest_at(store: RetryingStore, key: str, sums: FileSums, number: int) -> tuple[memoryview, str]:
    """Return a block of a file, and its digest."""
    start = number * sums.block_bytes
    data = store.get(key, start=start, stop=min(start + sums.block_bytes, sums.size_bytes))
    return data, xxhash.xxh3_64_hexdigest(data)


class _Reader(io.BufferedReader):
    """A file that is read, and after an error says that again: PyTorch's reader goes on, and would tell another one."""

    def __init__(self, raw: _Reading) -> None:
        super().__init__(raw, MIB)
        self._raise_again = raw.raise_again

    def read(self, size: int | None = -1, /) -> bytes:
        self._raise_again()
        return super().read(size)

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        self._raise_again()
        return super().readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._raise_again()
        return super().seek(offset, whence)


class _Reading(SizedFile):
    """A file that is read, block by block, of which some are under way before they are asked for."""

    def __init__(self, store: RetryingStore, key: str, *, is_verified: bool, stack: ExitStack) -> None:
        self._store, self._key = store, key
        self._sums = self._found(is_verified=is_verified)
        super().__init__(self._sums.size_bytes)
        self._threads = stack.enter_context(ThreadPoolExecutor(_AHEAD, "cloudckpt-file"))
        self._blocks: dict[int, Future[memoryview]] = {}
        self._stack: ExitStack | None = None
        self._failure: BaseException | None = None

    def raise_again(self) -> None:
        """Raise what a read has met; what it had got before that is lost, so that none can go on."""
        if self._failure is not None:
            raise self._failure

    def own(self, stack: ExitStack) -> None:
        """Close with it what is on a stack."""
        self._stack = stack

    def _found(self, *, is_verified: bool) -> FileSums:
        """Return what the file is to be; unverified, a content of which nothing is known."""
        info = self._store.head(self._key)
        if not is_verified:
            return FileSums(size_bytes=info.size_bytes, block_bytes=_BLOCK_BYTES, digests=())
        sums = f"{self._key}{SUMS_SUFFIX}"
        try:
            contents = SumsRecord.decode(self._store.read(sums, limit_bytes=SUMS_LIMIT_BYTES), key=sums).contents
        except ObjectNotFoundError as exc:
            raise ObjectNotFoundError(
                f"{self._key!r} at {self._store.url} has no sums beside it ({sums}): another program wrote it, or they "
                "were left behind; give unverified=True to read it as it is",
                op="open",
                key=self._key,
            ) from exc
        except FormatVersionError:
            raise
        except ManifestError as exc:
            raise ChecksumError(
                f"{self._key!r} at {self._store.url} cannot be verified, because the sums beside it are damaged "
                f"({sums}); write it anew, or give unverified=True to read it as it is",
                key=self._key,
            ) from exc
        possible = [one for one in contents if one.size_bytes == info.size_bytes]
        if not possible:
            raise self._damaged(f"it has {info.size_bytes} bytes, and {contents[0].size_bytes} were written")
        # Where a write was cut off, it is one of several, and a block in which they differ tells which.
        while len(possible) > 1:
            first, second = possible[:2]
            numbers = range(len(first.digests))
            number = next((one for one in numbers if first.digests[one] != second.digests[one]), 0)
            _, digest = _digest_at(self._store, self._key, first, number)
            left = [one for one in possible if one.digests[number : number + 1] == (digest,)]
            possible = left if 0 < len(left) < len(possible) else possible[:1]
        return possible[0]

    def _damaged(self, why: str) -> ChecksumError:
        return ChecksumError(
            f"{self._key!r} at {self._store.url} is not what was written: {why}; write it anew, or open it "
            "again if it is being replaced just now; what another program has put there, unverified=True reads",
            key=self._key,
        )

    def readinto(self, buffer: WriteableBuffer) -> int:
        try:
            return self._read_into(buffer)
        except BaseException as exc:
            self._failure = exc
            raise

    def _read_into(self, buffer: WriteableBuffer) -> int:
        memory = memoryview(buffer).cast("B")
        if not memory.nbytes or self._at >= self._sums.size_bytes:
            return 0
        number, first = divmod(self._at, self._sums.block_bytes)
        data = self._block(number)[first : first + memory.nbytes]
        memory[: data.nbytes] = data
        self._at += data.nbytes
        return data.nbytes

    def _block(self, number: int) -> memoryview:
        count = -(-self._sums.size_bytes // self._sums.block_bytes)
        # What is read on and on is asked for ahead; who jumps about gets the one block.
        is_going_on = number == 0 or number - 1 in self._blocks
        wanted = range(number, min(count, number + (_AHEAD if is_going_on else 1)))
        for one in [one for one in self._blocks if not number - 1 <= one < number + _AHEAD]:
            del self._blocks[one]
        for one in wanted:
            if one not in self._blocks:
                self._blocks[one] = self._threads.submit(self._read, one)
        return self._blocks[number].result()

    def _read(self, number: int) -> memoryview:
        for _ in range(2):  # only a second look tells a damaged object from a damaged answer
            data, digest = _digest_at(self._store, self._key, self._sums, number)
            if not self._sums.digests or digest == self._sums.digests[number]:
                return data
        raise self._damaged(f"block {number} differs")

    def close(self) -> None:
        stack, self._stack = self._stack, None
        try:
            if stack is not None:
                self._blocks.clear()
                stack.close()
        finally:
            super().close()
            failure, self._failure = self._failure, None
            # PyTorch's reader passes over what has interrupted it, or tells it as a broken file.
            if failure is not None and not isinstance(failure, Exception) and sys.exception() is not failure:
                raise failure
