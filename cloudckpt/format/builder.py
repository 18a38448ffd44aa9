"""Build an index of one rank's section after the other, each compressed as soon as it is there.

Pure values; what it gives becomes an `Index`, which checks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import xxhash

from cloudckpt.format.codec import JsonValue
from cloudckpt.format.header import Header, Holder, RankRecord, TensorRecord
from cloudckpt.format.record import FORMAT_VERSION, SHARING_VERSION, compress
from cloudckpt.format.section import Section, TensorEntry, Tensors
from cloudckpt.format.tree import PathElement

__all__ = ["IndexBuilder", "Writers"]


class IndexBuilder:
    """Make an index of one rank's section after the other, in any order; a section is held compressed.

    Attributes:
        tensors: name → dtype and shape; a tensor's place is its number, so more may be added and none removed.
    """

    def __init__(self, *, attempt: str, block_bytes: int, content: str = "", holders: Sequence[Holder] = ()) -> None:
        """Begin an index; of version 2, with the kind of its contents and who holds shards, if it has a `content`."""
        self._content, self._holders = content, list(holders)
        self.tensors: dict[str, TensorEntry] = {}
        self._attempt = attempt
        self._block_bytes = block_bytes
        self._columns = Tensors([])
        self._writers = Writers()
        self._sections: dict[int, tuple[RankRecord, bytes]] = {}

    def add(self, section: Section) -> None:
        """Add what a rank wrote, once per rank; its pieces in the order of their bytes, as a layout places them."""
        if len(self._columns) < len(self.tensors):
            self._columns = Tensors(list(self.tensors.values()))
            self._writers.grow(len(self.tensors))
        data = section.encode(self._columns)
        frame = compress(data)
        self._sections[section.rank] = _record_of(section, self._attempt, len(data), frame), frame
        self._writers.see(section)

    def finish(
        self, values: Mapping[str, JsonValue], paths: Mapping[str, list[PathElement]]
    ) -> tuple[Header, list[bytes]]:
        """Return the header of what was added, and the frames of its sections in the same order."""
        self._writers.grow(len(self.tensors))
        writers = self._writers.found.tolist()
        ranks = sorted(self._sections)
        header = Header(
            format_version=SHARING_VERSION if self._content else FORMAT_VERSION,
            attempt=self._attempt,
            block_bytes=self._block_bytes,
            tensors={
                name: TensorRecord(entry.dtype, entry.shape, writer)
                for (name, entry), writer in zip(self.tensors.items(), writers, strict=True)
            },
            values=dict(values),
            paths=dict(paths),
            ranks=[self._sections[rank][0] for rank in ranks],
            content=self._content or msgspec.UNSET,
            holders=self._holders if self._content else msgspec.UNSET,
        )
        return header, [self._sections[rank][1] for rank in ranks]


class Writers:
    """Which rank wrote all of a tensor, by the tensor's number: -1 where it was none or several."""

    def __init__(self) -> None:
        self.found = np.zeros(0, dtype=np.int64)
        self._is_seen = np.zeros(0, dtype=bool)

    def grow(self, count: int) -> None:
        """Make room for so many tensors."""
        more = count - len(self.found)
        self.found = np.concatenate((self.found, np.full(more, -1, dtype=np.int64)))
        self._is_seen = np.concatenate((self._is_seen, np.zeros(more, dtype=bool)))

    def see(self, section: Section) -> None:
        """Take the next rank into account."""
        is_here = np.zeros(len(self.found), dtype=bool)
        is_here[section.tensor] = True
        self.found[is_here] = np.where(self._is_seen[is_here], -1, section.rank)
        self._is_seen |= is_here


def _record_of(section: Section, attempt: str, decoded_bytes: int, frame: bytes) -> RankRecord:
    return RankRecord(
        rank=section.rank,
        attempt="" if section.attempt == attempt else section.attempt,
        shard_count=len(section.shard_sizes),
        stored_bytes=int(section.shard_sizes.sum()),
        piece_count=len(section),
        size_bytes=len(frame),
        decoded_bytes=decoded_bytes,
        digest=xxhash.xxh3_64_hexdigest(frame),
    )
