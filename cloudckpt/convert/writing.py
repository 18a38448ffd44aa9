"""Write files in which every byte has its place before the first one is written, as verified bytes come, in any order.

    spans of shards ──read, verified──▶ placed by the thread that has read them      pieces contiguous in their tensor
    parts of tensors ──read ahead into memory, in order──▶ placed                    of tensors with other pieces
    sums of segments ──▶ placed where the file has them, last

So nothing is copied between the buffer that a span was read into and the file, and every core reads, verifies, sums and
writes.
"""

from __future__ import annotations

import math
import struct
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np

from cloudckpt.convert.opened import Job, Part
from cloudckpt.convert.places import LEAVING_S
from cloudckpt.format import ChunkEntry
from cloudckpt.loading import RankInput, Taker
from cloudckpt.store import Place, assembled
from cloudckpt.threads import each
from cloudckpt.transfer import AbandonedError

__all__ = ["Layout", "Segment", "write_files"]

# One is written while another is put, or made durable.
_FILES_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes [start, stop) of a tensor's row-major ones, which are whole parts of it, and where in a file they begin."""

    name: str
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One file.

    Attributes:
        name: of it, in its folder.
        size_bytes: of it.
        literals: bytes that no tensor has, and where they begin.
        segments: of tensors; they and the literals are all of it.
        sums_at: of each segment, where in the file its CRC-32 stands, over the literals; () if none is wanted.
        before: is called once all bytes are in their places, before the file comes to stand.
    """

    name: str
    size_bytes: int
    literals: Sequence[tuple[int, bytes]]
    segments: Sequence[Segment]
    sums_at: Sequence[Sequence[int]] = ()
    before: Callable[[], None] = lambda: None


def write_files(job: Job, names: Iterable[str], layouts: Sequence[Callable[[], Layout]]) -> None:
    """Write files, some at once, each of them there whole or not at all.

    Args:
        job: the export.
        names: tensors of the checkpoint that are in them.
        layouts: return what each file is, by the time that it is written.

    Raises:
        IntegrityError: an object is missing or differs from what was committed.
        StorageError: a store could not be read or written.
    """
    boxes = {name: [((0,) * len(shape), shape)] for name in names if 0 not in (shape := job.entry(name).shape)}
    at_once = min(_FILES_AT_ONCE, len(layouts))
    options = replace(job.options, concurrency=max(1, job.options.concurrency // max(1, at_once)))
    writer = _Writer(replace(job, options=options), job.index.covering(boxes))
    each(layouts, writer.write, threads=at_once, name="cloudckpt-export")


@dataclass(frozen=True, slots=True)
class _Writer:
    """What writes the files of one export: `pieces` are those of its tensors."""

    job: Job
    pieces: dict[str, list[ChunkEntry]]

    def write(self, make: Callable[[], Layout]) -> None:
        layout = make()
        with (
            self.job.hold.standing(layout.name) as begin,
            assembled(self.job.folder, layout.name, size_bytes=layout.size_bytes) as place,
        ):
            with _gated(place, self.job.hold.go_on) as gated:
                self._fill(layout, gated)
            layout.before()
            begin()

    def _fill(self, layout: Layout, place: Place) -> None:
        sums = [_Sum() for _ in layout.sums_at]
        for at, data in layout.literals:
            place(at, memoryview(data))
        self._pour(layout.segments, sums, place)
        for total, places in zip(sums, layout.sums_at, strict=True):
            for at in places:
                place(at, memoryview(struct.pack("<L", total.value())))

    def _pour(self, segments: Sequence[Segment], sums: Sequence[_Sum], place: Place) -> None:
        takers: dict[tuple[int, int], list[Taker]] = defaultdict(list)
        parts: list[tuple[Part, Callable[[memoryview], None]]] = []
        for number, segment in enumerate(segments):
            if segment.start == segment.stop:
                continue
            take = partial(self._take, segment, sums[number] if sums else None, place)
            entry = self.job.entry(segment.name)
            firsts = [_first_byte(piece, entry.shape, entry.itemsize_bytes) for piece in self.pieces[segment.name]]
            if None in firsts:
                parts += [
                    (part, partial(take, part.first))
                    for part in self.job.parts(segment.name)
                    if segment.start <= part.first < segment.stop
                ]
                continue
            for piece, first in zip(self.pieces[segment.name], firsts, strict=True):
                taker = _Range.of(piece, first or 0, entry.itemsize_bytes, segment, take)
                if taker is not None:
                    takers[piece.rank, piece.number].append(taker)
        job = self.job
        RankInput(job.source, job.checkpoint, job.index, job.options).hand_on(takers)
        for (_, data), (_, take_part) in zip(job.stream([part for part, _ in parts]), parts, strict=True):
            take_part(data)

    def _take(self, segment: Segment, total: _Sum | None, place: Place, at: int, data: memoryview) -> None:
        """Place bytes of a segment, which begin at byte `at` of the tensor."""
        place(segment.at + at - segment.start, data)
        if total is not None:
            total.add(at, data)
        if self.job.gauge is not None:
            self.job.gauge.move(data.nbytes)


@contextmanager
def _gated(place: Place, go_on: Callable[[], None]) -> Iterator[Place]:
    """Yield what places bytes while the block lasts, and refuses them afterwards: an interrupt leaves readers at work.

    What they would write to is closed then, and its number may be another file's.
    """
    changed, state = threading.Condition(), [0, 1]

    def gated(at: int, data: memoryview) -> None:
        go_on()
        with changed:
            if not state[1]:
                raise AbandonedError("the file that these bytes are for was given up")
            state[0] += 1
        try:
            place(at, data)
        finally:
            with changed:
                state[0] -= 1
                changed.notify_all()

    try:
        yield gated
    finally:
        with changed:
            state[1] = 0
            changed.wait_for(lambda: not state[0], timeout=LEAVING_S)


@dataclass(slots=True)
class _Range:
    """The bytes [start, stop) of a shard, which begin at byte `first` of a tensor."""

    start: int
    stop: int
    first: int
    take: Callable[[int, memoryview], None]
    buffer_bytes: int = 0

    @classmethod
    def of(
        cls, piece: ChunkEntry, first: int, itemsize: int, segment: Segment, take: Callable[[int, memoryview], None]
    ) -> _Range | None:
        """Return what a piece has of a segment, None if nothing; `first` is its first byte in the tensor."""
        start = max(first, segment.start)
        stop = min(first + math.prod(piece.sizes) * itemsize, segment.stop)
        if start >= stop:
            return None
        return cls(piece.start + start - first, piece.start + stop - first, start, take)

    def accept(self, data: np.ndarray, at: int) -> None:
        start, stop = max(at, self.start), min(at + len(data), self.stop)
        self.take(self.first + start - self.start, data[start - at : stop - at].data)

    def finish(self) -> None:
        """Do nothing: none is empty."""


def _first_byte(piece: ChunkEntry, shape: Sequence[int], itemsize: int) -> int | None:
    """Return where in a tensor's row-major bytes a piece begins, None if it does not lie there in one."""
    first, stride, is_cut = 0, itemsize, False
    for offset, size, extent in zip(reversed(piece.offsets), reversed(piece.sizes), reversed(shape), strict=True):
        if is_cut and size > 1:
            return None
        is_cut = is_cut or size < extent
        first += offset * stride
        stride *= extent
    return first


# -- sums -----------------------------------------------------------------------------------------------------

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


@dataclass(slots=True)
class _Sum:
    """The CRC-32 of bytes that come in any order, from several threads; 0 of none."""

    _found: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, at: int, data: memoryview) -> None:
        """Add bytes that begin at `at`."""
        self._found.append((at, data.nbytes, zlib.crc32(data)))

    def value(self) -> int:
        total = 0
        for _, size_bytes, one in sorted(self._found):
            total = _times(_shift(size_bytes), total) ^ one
        return total


def _times(a: int, b: int) -> int:
    """Return the product of two polynomials modulo CRC-32's, the bit of the lowest power first, as zlib has them."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=1024)
def _shift(size_bytes: int) -> int:
    """Return what a sum is multiplied by when so many bytes follow: x to the power of their bits."""
    power, result = 1 << 30, _ONE
    bits = 8 * size_bytes
    while bits:
        if bits & 1:
            result = _times(power, result)
        power = _times(power, power)
        bits >>= 1
    return result
