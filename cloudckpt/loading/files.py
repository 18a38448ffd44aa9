"""Write the files of a checkpoint into a folder, each whole or not at all, from verified bytes.

    small ones ──some at once, in memory──▶ put        large ones ──ranges, as they come──▶ their place in the file

The way back of `state.files`. Knows paths as what they are in a checkpoint: none of them leaves the folder. Keeps
FORMAT invariants 1 and 12.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
import torch

from cloudckpt.errors import CheckpointNotFoundError, IntegrityError, ManifestError
from cloudckpt.format import ChunkEntry, Index
from cloudckpt.loading.input import RankInput
from cloudckpt.loading.landing import Taker
from cloudckpt.loading.reading import candidates_in, nothing_at
from cloudckpt.loading.search import Search
from cloudckpt.options import Options
from cloudckpt.root import Candidate, Roots
from cloudckpt.state import FILES
from cloudckpt.store import Place, RetryingStore, assembled, is_key
from cloudckpt.transfer import Gauge, Watch, bytes_of

__all__ = ["read_files"]

_BATCH_BYTES = 32 << 20
_SHOWN = 8


def read_files(
    candidates: Iterator[Candidate],
    folder: RetryingStore,
    names: str | Sequence[str] | None,
    *,
    roots: Roots,
    options: Options,
    gauge: Gauge | None = None,
) -> list[str]:
    """Write the files of the first candidate that is whole below a folder; return their paths.

    Args:
        candidates: checkpoints, best first. One that is corrupt is logged, and the next one is tried.
        folder: where they go; what stands under their paths is replaced, other files stay.
        names: paths, those with a slash at their end of all that is below; None: all.
        roots: where the candidates are.
        options: sizes, parallelism, patience.
        gauge: is told how many bytes have moved.

    Raises:
        CheckpointNotFoundError: there is no candidate; or it holds no files, or none of a name.
        IntegrityError: every candidate is corrupt; the first one's error. Each file is whole, or not changed.
        StorageError: a store could not be read or written; likewise.
    """
    search = Search(candidates, roots, "reading files")
    for catalog, checkpoint, index in candidates_in(search, roots):
        sizes = _chosen(index, names, checkpoint.url)
        reader = RankInput(catalog.store, checkpoint, index, options, Watch(gauge=gauge))
        try:
            _write(reader, sizes, folder)
        except IntegrityError as exc:
            search.may_go_on(checkpoint, {0: exc})
            continue
        return list(sizes)
    raise nothing_at(roots)


def _chosen(index: Index, names: str | Sequence[str] | None, url: str) -> dict[str, int]:
    """Return path → size in bytes of the files that are wanted."""
    there: dict[str, int] = {}
    for name, entry in index.tensors.items():
        if name.startswith(FILES):
            path = name.removeprefix(FILES)
            if entry.dtype != "uint8" or len(entry.shape) != 1 or not is_key(path):
                raise ManifestError(f"{name!r} in {url} is no file", key=name)
            there[path] = math.prod(entry.shape)
    if names is None and there:
        return there
    found: dict[str, int] = {}
    for wanted in [names] if isinstance(names, str) else names or ():
        chosen = {
            path: size
            for path, size in there.items()
            if path == wanted or (wanted[-1:] == "/" and path.startswith(wanted))
        }
        if not chosen:
            raise CheckpointNotFoundError(f"no file of {url} is {wanted!r}; files there: {_shown(there)}")
        found |= chosen
    if not found:
        raise CheckpointNotFoundError(f"{url} holds no files; save some with files={{'tokenizer/': directory}}")
    return found


def _shown(paths: Iterable[str]) -> str:
    return ", ".join(list(paths)[:_SHOWN]) or "none"


def _write(reader: RankInput, sizes: Mapping[str, int], folder: RetryingStore) -> None:
    small = [path for path, size in sizes.items() if size <= _BATCH_BYTES]
    ends = accumulate(sizes[path] for path in small)
    for _, batch in groupby(zip(small, ends, strict=True), key=lambda one: one[1] // _BATCH_BYTES):
        tensors = {path: torch.empty(sizes[path], dtype=torch.uint8) for path, _ in batch}
        reader.fill({f"{FILES}{path}": tensor for path, tensor in tensors.items()})
        for path, tensor in tensors.items():
            folder.put(path, [bytes_of(tensor).data] if tensor.numel() else [])
    for path in sizes.keys() - set(small):
        name = f"{FILES}{path}"
        pieces = reader.index.covering({name: [((0,), (sizes[path],))]})[name]
        with assembled(folder, path, size_bytes=sizes[path]) as place:
            takers: dict[tuple[int, int], list[Taker]] = defaultdict(list)
            for piece in pieces:
                takers[piece.rank, piece.number].append(_Placing.of(piece, place))
            reader.hand_on(takers)


@dataclass(slots=True)
class _Placing:
    """The bytes [start, stop) of a shard, which go to a file from its byte `first` on."""

    start: int
    stop: int
    first: int
    place: Place
    buffer_bytes: int = 0

    @classmethod
    def of(cls, piece: ChunkEntry, place: Place) -> _Placing:
        return cls(piece.start, piece.start + piece.sizes[0], piece.offsets[0], place)

    def accept(self, data: np.ndarray, at: int) -> None:
        start, stop = max(at, self.start), min(at + len(data), self.stop)
        self.place(self.first + start - self.start, data[start - at : stop - at].data)

    def finish(self) -> None:
        """Do nothing: a range of no bytes has no place."""
