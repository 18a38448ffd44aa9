"""The sums of a plain file: the small object beside it that says which bytes it may have.

A pure value with strict decoding, as the manifest is. A file that is replaced is one of two for a moment, and its sums
tell both. No clock and no store here.
"""

from __future__ import annotations

import msgspec

from cloudckpt.errors import ManifestError
from cloudckpt.format.record import FORMAT_VERSION, decode_record, encode_record

__all__ = ["SUMS_LIMIT_BYTES", "SUMS_SUFFIX", "FileSums", "SumsRecord"]

SUMS_SUFFIX = ".cloudckpt-sums"
SUMS_LIMIT_BYTES = 64 << 20
_DIGEST_DIGITS = 16


class FileSums(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One content that a file may have.

    Attributes:
        size_bytes: of it.
        block_bytes: of which each but the last block has so many.
        digests: xxh3-64 of each block, 16 hexadecimal digits each, the highest first.
    """

    size_bytes: int
    block_bytes: int
    digests: tuple[str, ...]

    def problem(self) -> str:
        """Say what in it cannot be, "" if all can."""
        if self.size_bytes < 0 or self.block_bytes < 1 or len(self.digests) != -(-self.size_bytes // self.block_bytes):
            return (
                f"{len(self.digests)} digests are not those of {self.size_bytes} bytes in blocks of {self.block_bytes}"
            )
        return ""


class SumsRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file may be.

    Attributes:
        format_version: of this schema.
        contents: the newest first; the file is one of them.
    """

    format_version: int
    contents: tuple[FileSums, ...]

    @classmethod
    def of(cls, *contents: FileSums) -> SumsRecord:
        """Return the record of what a file may be."""
        return cls(format_version=FORMAT_VERSION, contents=contents)

    def encode(self) -> bytes:
        """Return the object's bytes."""
        return encode_record(self)

    @classmethod
    def decode(cls, data: bytes, *, key: str) -> SumsRecord:
        """Read it back; raises `ManifestError` if it is none, and `FormatVersionError` if it is a newer one."""
        record = decode_record(data, cls, key=key)
        problem = next(filter(None, (one.problem() for one in record.contents)), "")
        if problem or not record.contents:
            raise ManifestError(f"{key} holds no sums of a file: {problem or 'it is empty'}", key=key)
        return record
