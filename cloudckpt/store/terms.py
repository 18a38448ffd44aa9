"""What each put says beside its bytes: a signature over them, a checksum for the store to compare, a condition.

Pure values; a checksum is computed over the caller's memory, by the thread that puts.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import google_crc32c
import numpy as np

from cloudckpt.errors import OptionsError
from cloudckpt.options import Checksum

__all__ = ["PutTerms", "checksum_of", "refuse_terms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PutTerms:
    """What every put of a store says beside its bytes.

    Attributes:
        signed_payload: whether the signature covers the body (S3).
        checksum: of the body, compared by the store before it takes the object; None sends none.
        create_only: whether every put is refused where an object stands already.
    """

    signed_payload: bool = False
    checksum: Checksum | None = None
    create_only: bool = False


def refuse_terms(terms: PutTerms, what: str, *, checksums: Sequence[Checksum] = (), creates: bool = False) -> None:
    """Refuse, by name, what `what` cannot say: a checksum that is not in `checksums`, a condition unless `creates`."""
    if terms.checksum is not None and terms.checksum not in checksums:
        offered = f"give {' or '.join(map(repr, checksums))}, or none" if checksums else "leave it out"
        raise OptionsError(f"checksum={terms.checksum!r} cannot be sent by {what}; {offered}")
    if terms.create_only and not creates:
        raise OptionsError(f"create_only=True cannot be kept by {what}; leave it out")


def checksum_of(kind: Checksum, buffers: Sequence[memoryview]) -> str:
    """Return the checksum of the concatenation of `buffers` (bytes, C-contiguous), as S3 and GCS write it: base64.

    Raises:
        OptionsError: a library that it takes is not installed.
    """
    if kind == "sha256":
        digest = hashlib.sha256()
        for buffer in buffers:
            digest.update(buffer)
        return base64.b64encode(digest.digest()).decode()
    extend, size_bytes = _EXTENDING[kind]()
    value = 0
    for buffer in buffers:
        value = extend(value, buffer)
    return base64.b64encode(value.to_bytes(size_bytes, "big")).decode()


_Extend = Callable[[int, memoryview], int]


def _crc32() -> tuple[_Extend, int]:
    return lambda value, buffer: zlib.crc32(buffer, value), 4


def _crc32c() -> tuple[_Extend, int]:
    # It takes no memoryview; a view of numpy's copies nothing.
    return lambda value, buffer: google_crc32c.extend(value, np.frombuffer(buffer, np.uint8)), 4


def _crc64nvme() -> tuple[_Extend, int]:
    try:
        from awscrt import checksums  # type: ignore[import-not-found,unused-ignore]
    except ImportError as exc:
        raise OptionsError(
            'checksum="crc64nvme" by s3fs needs the package awscrt; install botocore[crt], or pass engine="obstore"'
        ) from exc
    return lambda value, buffer: checksums.crc64nvme(buffer, value), 8


_EXTENDING: dict[Checksum, Callable[[], tuple[_Extend, int]]] = {
    "crc32": _crc32,
    "crc32c": _crc32c,
    "crc64nvme": _crc64nvme,
}
