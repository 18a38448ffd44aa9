"""Read a checkpoint, or a part of it, without a state: new host tensors and values; or only say what it holds.

    names, globs ──▶ what is called so ──▶ tensors filled, values decoded ──▶ nested dicts and lists

One process reads for itself. A candidate that is corrupt is passed over, as a restore does it. Keeps FORMAT invariants
1 and 12.
"""

from __future__ import annotations

import fnmatch
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from cloudckpt.errors import CheckpointNotFoundError, IntegrityError, OptionsError
from cloudckpt.format import DTYPES, NOTES, Index, PathElement, codec, told_near, unflatten
from cloudckpt.loading.input import RankInput, by_part_name, decode_index, part_targets
from cloudckpt.loading.search import Search
from cloudckpt.options import Options
from cloudckpt.root import Candidate, Catalog, Checkpoint, Roots
from cloudckpt.state import FILES, OURS, RankName, stateless_module, with_attributes
from cloudckpt.transfer import Gauge, Watch

__all__ = ["Contents", "TensorInfo", "candidates_in", "contents_of", "nothing_at", "read_contents", "read_state"]

logger = logging.getLogger(__name__)

_GLOB = frozenset("*?[")
_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """What a checkpoint says of one tensor.

    Attributes:
        shape: its full extent, whatever ranks hold parts of it.
        dtype: in which it is stored.
        size_bytes: of its elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a checkpoint holds, without the bytes of it.

    Attributes:
        checkpoint: which one.
        tensors: name → shape, dtype and size, in the order in which they were saved.
        values: name → bytes that the value takes in the checkpoint.
        files: path → bytes of each file that was saved beside the state.
        per_rank: name → how many ranks saved a state of their own under it, which `read` leaves out.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorInfo]
    values: Mapping[str, int]
    per_rank: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All names that `read` takes: of tensors, then of values."""
        return [*self.tensors, *self.values]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors and values."""
        return sum(tensor.size_bytes for tensor in self.tensors.values()) + sum(self.values.values())

    def select(self, keys: str | Sequence[str]) -> list[str]:
        """Return the names that `read` would read for these keys.

        Raises:
            CheckpointNotFoundError: a key matches nothing; says what is near it.
        """
        return _select(self.names, self.names, keys, self.checkpoint.url)


def contents_of(checkpoint: Checkpoint, index: Index) -> Contents:
    """Return what an index says of its checkpoint."""
    part_bytes: Counter[str] = Counter()
    for name, numbers in codec.part_names(index.tensors).items():
        part_bytes[name] = sum(math.prod(index.tensors[part].shape) for part in numbers.values())
    owners = Counter(owner.name for name in index.tensors if (owner := RankName.parse(name)) is not None)
    return Contents(
        checkpoint=checkpoint,
        tensors={
            name: TensorInfo(
                shape=tuple(entry.shape),
                dtype=DTYPES[entry.dtype],
                size_bytes=math.prod(entry.shape) * DTYPES[entry.dtype].itemsize,
            )
            for name, entry in index.tensors.items()
            if not name.startswith(OURS)
        },
        values={
            name: len(msgspec.json.encode(value)) + part_bytes[name]
            for name, value in index.values.items()
            if not name.startswith(OURS)
        },
        per_rank=dict(owners),
        files={
            name.removeprefix(FILES): math.prod(entry.shape)
            for name, entry in index.tensors.items()
            if name.startswith(FILES)
        },
    )


def read_contents(candidates: Iterator[Candidate], roots: Roots) -> Contents:
    """Return what the first candidate holds whose manifest and index can be read.

    Raises:
        CheckpointNotFoundError: there is no candidate.
        IntegrityError: every candidate is corrupt; the first one's error.
    """
    search = Search(candidates, roots, "reading")
    for _, checkpoint, index in candidates_in(search, roots):
        return contents_of(checkpoint, index)
    raise nothing_at(roots)


def read_state(
    candidates: Iterator[Candidate],
    keys: str | Sequence[str] | None,
    *,
    roots: Roots,
    options: Options,
    gauge: Gauge | None = None,
) -> dict[str, object]:
    """Return what `keys` name in the first candidate that is whole, None: all: nested, in memory of its own.

    Args:
        candidates: checkpoints, best first. One that is corrupt is logged, and the next one is tried.
        keys: names, or shell globs of names; a name also selects all that lies below it.
        roots: where the candidates are.
        options: sizes, parallelism, patience.
        gauge: is told how many bytes have moved.

    Raises:
        CheckpointNotFoundError: there is no candidate, or a key matches nothing in the one that is read.
        IntegrityError: every candidate is corrupt; the first one's error.
        UnsupportedValueError: a value is of a type that this program has not registered.
        StorageError: the store could not be read.
    """
    search = Search(candidates, roots, "reading")
    for catalog, checkpoint, index in candidates_in(search, roots):
        names = _names_of(index, keys, checkpoint.url)
        try:
            return _read(catalog, checkpoint, index, names, options, gauge)
        except IntegrityError as exc:
            search.may_go_on(checkpoint, {0: exc})
    raise nothing_at(roots)


def candidates_in(search: Search, roots: Roots) -> Iterator[tuple[Catalog, Checkpoint, Index]]:
    """Yield the candidates of a search, each with its index, until its caller has had enough."""
    while (found := search.next()) is not None:
        catalog = roots.catalogs[found.root]
        checkpoint = catalog.adopt(found.manifest, prefix=found.prefix)
        yield catalog, checkpoint, decode_index(checkpoint, found.index)


def nothing_at(roots: Roots) -> CheckpointNotFoundError:
    """Return the error that says that nothing is committed there."""
    return CheckpointNotFoundError(f"no committed checkpoint at {roots.url}")


def _read(
    catalog: Catalog, checkpoint: Checkpoint, index: Index, names: Sequence[str], options: Options, gauge: Gauge | None
) -> dict[str, object]:
    tensors = {
        name: torch.empty(saved.shape, dtype=DTYPES[saved.dtype], device="cpu")
        for name in names
        if (saved := index.tensors.get(name)) is not None
    }
    stored = {name: index.values[name] for name in names if name in index.values}
    parts = part_targets(index, stored)
    RankInput(catalog.store, checkpoint, index, options, Watch(gauge=gauge)).fill({**tensors, **by_part_name(parts)})
    values = {name: codec.decode(value, key=name, parts=parts.get(name)) for name, value in stored.items()}
    leaves = {name: tensors[name] if name in tensors else values[name] for name in names}
    found = codec.decode_json(index.values.get(NOTES, {}), key=NOTES)
    notes = found if isinstance(found, dict) else {}
    _tell_stateless(values, notes, checkpoint.url)
    state = unflatten(leaves, _paths_of_some(index, names))
    with_attributes(state, "", notes, is_new=True)
    return state


def _tell_stateless(values: Mapping[str, object], notes: Mapping[str, object], url: str) -> None:
    """Say where a module stood of which nothing was saved, because it has no state: what is read is no module."""
    found = [name for name, value in values.items() if "." in name and stateless_module(value, notes.get(name))]
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        logger.warning(
            "%s: a module without any state was saved at %s%s; what is read there is an empty dict, and NOT the "
            "module: restore into a state that has one, or keep it out of the values that you save",
            url,
            ", ".join(found[:_SHOWN]),
            more,
        )


# -- names ----------------------------------------------------------------------------------------------------


def _names_of(index: Index, keys: str | Sequence[str] | None, url: str) -> list[str]:
    all_names = [*index.tensors, *index.values]
    names = [name for name in all_names if not name.startswith(OURS)]
    if keys is None:
        if any(RankName.parse(name) for name in all_names):
            logger.warning("%s: state that each rank has for itself is NOT read; restore it with as many ranks", url)
        return names
    return _select(names, all_names, keys, url)


def _select(names: Sequence[str], all_names: Sequence[str], keys: str | Sequence[str], url: str) -> list[str]:
    """Return the names that keys name; of the library's own only those that a key names by their beginning."""
    chosen: dict[str, None] = {}
    for key in [keys] if isinstance(keys, str) else list(keys):
        if not isinstance(key, str):
            raise OptionsError(f"a key is {key!r}; give the names of tensors and values, or globs of them")
        found = list(_matches(key, all_names if key.startswith(OURS) else names))
        if not found:
            is_glob = not _GLOB.isdisjoint(key)
            told = told_near("" if is_glob else key, names)
            raise CheckpointNotFoundError(f"nothing in {url} is named {key!r}{told}")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def _matches(key: str, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if name == key or fnmatch.fnmatchcase(name, key) or name.startswith(f"{key}."):
            yield name


def _paths_of_some(index: Index, names: Sequence[str]) -> dict[str, list[PathElement]]:
    """Return the paths of some names; a list of which only a part was asked for becomes a dict by place."""
    chosen = set(names)
    left_out = [path for name, path in index.paths.items() if name not in chosen]
    torn = {_key(path[:depth]) for path in left_out for depth in range(1, len(path))}
    return {
        name: [_keyed(step) if _key(path[:depth]) in torn else step for depth, step in enumerate(path)]
        for name, path in index.paths.items()
        if name in chosen
    }


def _key(path: Sequence[PathElement]) -> tuple[str, ...]:
    return tuple(map(repr, path))


def _keyed(step: PathElement) -> PathElement:
    """Turn a place in a list or tuple into a dict's key."""
    place = step.get("tuple") if isinstance(step, dict) else step
    return {"key": place} if isinstance(place, int) else step
