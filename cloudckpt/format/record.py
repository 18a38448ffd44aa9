"""Read the JSON records of a store strictly: known versions, known fields, no name twice, limits before memory.

What an index, a manifest and a claim have in common. Pure functions over bytes; `key` names the object in errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import msgspec
import zstandard

from cloudckpt.errors import FormatVersionError, ManifestError, OptionsError, UnsupportedValueError
from cloudckpt.keys import shown

__all__ = [
    "FORMAT_VERSION",
    "INDEX_LIMIT_BYTES",
    "NUMBER_LIMIT",
    "SHARING_VERSION",
    "compress",
    "decode_record",
    "decompress",
    "encode_record",
    "lone_surrogates",
    "may_decode",
    "moment_of",
]

FORMAT_VERSION = 1
# Of the manifest and the index of a checkpoint whose shards may be those of others; an older reader refuses them.
SHARING_VERSION = 2

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# A day off the ends of what a datetime holds, for the zone of whoever shows it.
_FIRST_S = (datetime(1, 1, 2, tzinfo=UTC) - _EPOCH) / timedelta(seconds=1)
_LAST_S = (datetime(9999, 12, 30, tzinfo=UTC) - _EPOCH) / timedelta(seconds=1)

# Every count, size and coordinate is below this: exact in any JSON reader, and sums of a few fit 64 bits.
NUMBER_LIMIT = 1 << 53
# 405 billion parameters with Adam on 4,096 ranks stay far below this; an index that claims more is hostile.
INDEX_LIMIT_BYTES = 1 << 30
_DECODED_LIMIT_BYTES = 4 << 30
# Python objects take up to 24 times the memory of their JSON. Real indexes shrink to a tenth (names that count up: to
# a thirtieth), so a small object that claims to be a large index is refused before any of it is decoded.
_SHRINK_LIMIT = 256
_SHRINK_FREE_BYTES = 16 << 20
# A seventh smaller than at 3, and still 0.05 ms a section; higher levels cost more and save nothing.
_LEVEL = 6

_Record = TypeVar("_Record", bound=msgspec.Struct)


class _Version(msgspec.Struct):
    """The only field that every version of every record has."""

    format_version: int


def encode_record(value: object) -> bytes:
    """Return the JSON of a manifest, a claim or a pin, indented for people.

    Raises:
        OptionsError: it holds a text with lone surrogates.
    """
    try:
        return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"
    except UnicodeEncodeError as exc:
        raise OptionsError(f"{exc.object!r} has lone surrogates, which no record can hold") from exc


def decode_record(
    data: bytes,
    schema: type[_Record],
    *,
    key: str,
    written: Callable[[_Record], bytes] = encode_record,
    newest: int = FORMAT_VERSION,
) -> _Record:
    """Decode the JSON of an index, a manifest or a claim, if this library knows its version.

    Args:
        data: the record.
        schema: what it is to be.
        key: names it in errors.
        written: returns a record's bytes as this library writes them, which says that `data` needs no further look.
        newest: the highest version of such a record.

    Raises:
        FormatVersionError: a newer library wrote it.
        ManifestError: it is no JSON of that schema, or says something twice.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version > newest:
            raise FormatVersionError(
                f"{key} has format version {version}, and this cloudckpt reads versions up to {newest}; "
                "upgrade cloudckpt to read it",
                key=key,
            )
        record = msgspec.json.decode(data, type=schema)
        _refuse_double_names(data, written(record), key)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ManifestError(f"{key} cannot be decoded ({shown(exc)}); restore an older step", key=key) from exc
    if version < 1:
        raise ManifestError(f"{key} has format version {version}; restore an older step", key=key)
    return record


def _refuse_double_names(data: bytes, canonical: bytes, key: str) -> None:
    """Refuse an object with a name twice, of which one reader takes the first and another the last."""

    def refuse(pairs: list[tuple[str, object]]) -> None:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ManifestError(f"{key} has a name twice in one object; restore an older step", key=key)

    # What encodes to the same bytes again has none; only other text, such as another library's, is searched, in Python.
    if data != canonical:
        json.loads(data, object_pairs_hook=refuse)


def lone_surrogates(name: str) -> UnsupportedValueError:
    """Return the error for a name that is no Unicode text: undecodable file names have lone surrogates."""
    return UnsupportedValueError(
        f"{shown(name)} has lone surrogates, which JSON cannot hold; rename that entry of the state",
        key=name,
        type_name="str",
    )


def moment_of(told: str | float) -> datetime:
    """Return a time in UTC that a record or a store tells: as RFC 3339 with an offset, or seconds since 1970.

    What is beyond the years 1 to 9999, in whatever zone it is shown, is the first or the last that is not.

    Raises:
        ValueError: it is no time, or has no offset.
    """
    if isinstance(told, str):
        moment = datetime.fromisoformat(told)
        offset = moment.utcoffset()
        if offset is None:
            raise ValueError(f"{told!r} has no offset")
        since_s = (moment.replace(tzinfo=UTC) - _EPOCH - offset) / timedelta(seconds=1)
        if _FIRST_S <= since_s <= _LAST_S:
            return moment.astimezone(UTC)
    else:
        since_s = told
    return _EPOCH + timedelta(seconds=min(max(since_s, _FIRST_S), _LAST_S))


def may_decode(size_bytes: int, decoded_bytes: int) -> bool:
    """Tell whether a reader takes an index of this size that decodes to that size."""
    limit_bytes = min(_DECODED_LIMIT_BYTES, max(_SHRINK_FREE_BYTES, _SHRINK_LIMIT * size_bytes))
    return size_bytes <= INDEX_LIMIT_BYTES and 0 <= decoded_bytes <= limit_bytes


def compress(data: bytes) -> bytes:
    """Return one zstd frame of an index, which states its decoded size."""
    return zstandard.ZstdCompressor(level=_LEVEL).compress(data)


def decompress(data: bytes | memoryview, *, key: str) -> bytes:
    """Return what one zstd frame of an index holds, if the frame states a size that is plausible for it.

    Raises:
        ManifestError: it is no such frame, or more follows it.
    """
    try:
        size = zstandard.frame_content_size(data)
        if not may_decode(len(data), size):
            raise ManifestError(
                f"index {key} has {len(data)} bytes and states {size} decoded bytes, more than is read; "
                "restore an older step",
                key=key,
            )
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise ManifestError(f"index {key} is no zstd frame ({exc}); restore an older step", key=key) from exc
