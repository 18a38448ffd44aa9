"""Find the checkpoints that have names, give a name to one, and say which names have moved on.

    save     name given to an attempt ──▶ that attempt commits: in this request the name moves
    pass     what the name has moved on from ──▶ uncommitted, unless a rule, a pin or another name keeps it
             ──▶ only then its object goes: a pass that was cut off is finished by the next one

A name is that of the highest (epoch, step) among the committed attempts that were given it. Nothing is overwritten,
and no object says which one that is, so that none can be wrong. Asks a catalog; deletes names and no checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.options import READERS
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint
from cloudckpt.root.pins import Held, Named
from cloudckpt.root.roots import Roots
from cloudckpt.threads import each

__all__ = [
    "committed_as",
    "forget_names",
    "give_name",
    "named",
    "named_candidates",
    "names_given",
    "names_of",
    "no_name",
    "superseded",
]

_SHOWN = 8


def named_candidates(roots: Roots) -> dict[str, list[tuple[Catalog, Named]]]:
    """Return each name, and what may have it, the newest first. One listing of each root."""
    found: dict[str, list[tuple[Catalog, Named]]] = {}
    for catalog in roots.catalogs:
        for one in catalog.pins.held().names:
            found.setdefault(one.name, []).append((catalog, one))
    return {name: sorted(places, key=lambda place: place[1].order, reverse=True) for name, places in found.items()}


def named(roots: Roots, name: str) -> Checkpoint | None:
    """Return the checkpoint that has a name, None if none has.

    Raises:
        ManifestError: the newest that was given it cannot be read.
        StorageError: a store cannot be asked.
    """
    return _first_committed(named_candidates(roots).get(name, []))


def names_of(roots: Roots) -> dict[str, Checkpoint]:
    """Return all names, and what has them; raises as `named` does."""
    candidates = named_candidates(roots)
    found = each(list(candidates.values()), _first_committed, threads=READERS, name="cloudckpt-names")
    return {name: one for name, one in zip(candidates, found, strict=True) if one is not None}


def _first_committed(places: Sequence[tuple[Catalog, Named]]) -> Checkpoint | None:
    for catalog, one in places:
        try:
            found = catalog.open(one.prefix)
        except CheckpointNotFoundError:
            continue
        if found.attempt == one.attempt:
            return found
    return None


def no_name(roots: Roots, name: str) -> CheckpointNotFoundError:
    """Return the error that says that nothing has a name, and which names there are."""
    shown = ", ".join(map(repr, sorted(named_candidates(roots))[:_SHOWN])) or "none"
    return CheckpointNotFoundError(f"no checkpoint at {roots.url} is named {name!r}; names there: {shown}")


def give_name(catalog: Catalog, checkpoint: Checkpoint, name: str, *, epoch: int) -> None:
    """Give a name to the newest checkpoint of a job, which is committed; no pass takes that one meanwhile.

    Args:
        catalog: that holds it.
        checkpoint: the newest of the job.
        name: for it.
        epoch: in which the job writes; 0 if it has not claimed one.

    Raises:
        FencedError: a newer job has claimed the root; the name was not given.
        CheckpointNotFoundError: it is not there any more.
    """
    if epoch:
        catalog.claims.fence(epoch)
    catalog.pins.give(Named(name, checkpoint.prefix, checkpoint.attempt))
    if not catalog.is_still(checkpoint):
        raise CheckpointNotFoundError(
            f"{checkpoint.url} was removed while it was given the name {name!r}; save it again"
        )


def superseded(catalog: Catalog, held: Held) -> list[Named]:
    """Return what is of no name any more, because something newer has it: also attempts that never committed.

    Args:
        catalog: the root's.
        held: its names.
    """
    stale: list[Named] = []
    for _, group in groupby(sorted(held.names, key=lambda one: one.name), key=lambda one: one.name):
        oldest_first = sorted(group, key=lambda one: (one.order, one.key))
        if len(oldest_first) == 1:
            continue
        live = next((one for one in reversed(oldest_first) if committed_as(catalog, one) is not None), None)
        if live is None:
            continue
        found = committed_as(catalog, live)
        # It is only remembered; what it has taken the name from may have it again.
        if found is not None and catalog.is_still(found):
            stale += [one for one in oldest_first if one.order <= live.order and one != live]
    return stale


def committed_as(catalog: Catalog, one: Named) -> Checkpoint | None:
    """Return the checkpoint of an attempt that has a name, as far as is remembered; None if it is none."""
    found = catalog.recall([one.prefix]).checkpoints
    return found[0] if found and found[0].attempt == one.attempt else None


def forget_names(catalog: Catalog, gone: Sequence[Checkpoint]) -> None:
    """Take away the names of checkpoints that were deleted. One listing."""
    attempts = {(one.prefix, one.attempt) for one in gone}
    catalog.pins.take([one for one in catalog.pins.held().names if (one.prefix, one.attempt) in attempts])


def names_given(held: Held, checkpoints: Sequence[Checkpoint]) -> Mapping[tuple[int, int], Sequence[str]]:
    """Return (epoch, step) → the names of each of these that was given some. No request."""
    attempts = {(one.prefix, one.attempt): one.order for one in checkpoints}
    found: dict[tuple[int, int], list[str]] = {}
    for one in held.names:
        if (order := attempts.get((one.prefix, one.attempt))) is not None:
            found.setdefault(order, []).append(one.name)
    return found
