"""Pin checkpoints so that they stay whatever the rules say, and let go of them; and refuse to delete what is pinned.

    pin    manifest read ──▶ pin created ──▶ does the manifest still stand? ──▶ acknowledged
    pass   pins listed ──▶ manifests deleted ──▶ pins listed ──▶ those set in between are put back

One of the two sees the other: a pin that was acknowledged was there before its manifest went, so whoever removes
manifests, or shards, finds it. One that came too late is not taken back: another call may have been told meanwhile
that it holds. It stays without effect, or its checkpoint is put back if that is still whole.
"""

from __future__ import annotations

from cloudckpt.errors import CheckpointNotFoundError, ObjectExistsError, PinnedError
from cloudckpt.format import parse_checkpoint_prefix
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint
from cloudckpt.root.pins import Pin
from cloudckpt.root.roots import Roots

__all__ = ["copy_pin", "pin", "pins_of", "refuse_pinned", "unpin"]

_SHOWN = 8


def pin(roots: Roots, step: int, note: str = "") -> Pin:
    """Keep the checkpoint that `find` returns for a step until it is unpinned; return its pin, also one of before.

    Raises:
        CheckpointNotFoundError: no commit of that step; or it was removed while it was being pinned.
        ManifestError: it cannot be read; or what pins it already cannot.
        OptionsError: the note is no text, or too long.
        StorageError: the store did not answer; it may be pinned, and asking again is safe.
    """
    found = roots.find(step)
    catalog = roots.catalog_of(found)
    made = _create(catalog, found, note)
    if made is None:
        return _pinned_before(catalog, found, note)
    if not catalog.is_still(found):
        raise _too_late(found)
    return made


def _create(catalog: Catalog, found: Checkpoint, note: str) -> Pin | None:
    """Create the pin; None if there is one."""
    try:
        return catalog.pins.create(found.manifest, catalog.manifest_bytes(found), note=note)
    except ObjectExistsError:
        return None
    except CheckpointNotFoundError as exc:
        raise _too_late(found) from exc


def _pinned_before(catalog: Catalog, found: Checkpoint, note: str) -> Pin:
    """Return the pin that is there; one of another attempt at that step pins what is no more, and is replaced."""
    record = catalog.pins.read(found.prefix)
    if record is not None and record.attempt == found.attempt:
        if not catalog.is_still(found) and catalog.put_back(found.prefix) is None:
            raise _too_late(found)
        return catalog.pins.pin_of(record)
    catalog.pins.remove(found.prefix)
    made = _create(catalog, found, note)
    if made is None or not catalog.is_still(found):
        raise _too_late(found)
    return made


def _too_late(found: Checkpoint) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"step {found.step} of epoch {found.epoch} was removed while it was being pinned ({found.url}); see whether it "
        "stands with `cloudckpt ls`, and pin another step if not"
    )


def copy_pin(source: Catalog, target: Catalog, checkpoint: Checkpoint) -> bool:
    """Pin in one root a checkpoint that was copied there, as it is pinned in another one; the root's own pin stays.

    Returns:
        Whether it was pinned by that.

    Raises:
        CheckpointNotFoundError: it was removed there meanwhile.
    """
    prefix = checkpoint.prefix
    is_made = target.pins.copy_from(source.pins, prefix)
    if is_made and not target.is_still(checkpoint) and target.put_back(prefix) is None:
        raise CheckpointNotFoundError(
            f"{prefix.rstrip('/')} was removed from {target.store.url} while it was copied there; copy it once more"
        )
    return is_made


def unpin(roots: Roots, step: int) -> Pin:
    """Take away the pin of a step, of the newest epoch of which there is one, in all roots; return what it was.

    Nothing is removed by that: the rules decide over the checkpoint from then on.

    Raises:
        CheckpointNotFoundError: no checkpoint of that step is pinned; the message names those that are.
        StorageError: the store did not answer.
    """
    pinned = [(catalog, prefix) for catalog in roots.catalogs for prefix in catalog.pins.prefixes()]
    of_step = [(place[1], catalog, prefix) for catalog, prefix in pinned if (place := _place(prefix))[0] == step]
    if not of_step:
        if not pinned and (above := roots.catalogs[0].root_above()):
            raise CheckpointNotFoundError(above)
        steps = sorted({_place(prefix)[0] for _, prefix in pinned})
        shown = ", ".join(map(str, steps[-_SHOWN:])) or "none"
        raise CheckpointNotFoundError(f"step {step} is not pinned at {roots.url}; pinned are: {shown}")
    newest = max(epoch for epoch, _, _ in of_step)
    taken: list[Pin] = []
    for epoch, catalog, prefix in of_step:
        if epoch == newest:
            taken += [one for one in [catalog.pins.describe(prefix)] if one is not None]
            if not catalog.is_taken(prefix):
                # Else the last copy of its manifest went with the pin.
                catalog.put_back(prefix)
            catalog.pins.remove(prefix)
    if not taken:
        raise CheckpointNotFoundError(f"step {step} is not pinned at {roots.url} any more")
    return taken[0]


def pins_of(roots: Roots) -> list[Pin]:
    """Return all pins of the roots, by (epoch, step)."""
    found = {one.order: one for catalog in reversed(roots.catalogs) for one in catalog.pins.all()}
    return [found[order] for order in sorted(found)]


def refuse_pinned(catalog: Catalog, prefix: str) -> None:
    """Raise `PinnedError` if the checkpoint under a prefix is pinned. One request."""
    note = catalog.pins.note_of(prefix)
    if note is not None:
        step, epoch = _place(prefix)
        raise PinnedError(
            f"step {step} of epoch {epoch} at {catalog.store.url} is pinned{f': {note}' if note else ''}. Nothing was "
            f"deleted; unpin it first (unpin({step}), or `cloudckpt unpin`), if it is to go",
            note=note,
        )


def _place(prefix: str) -> tuple[int, int]:
    """Return (step, epoch) of the prefix of a pin."""
    return parse_checkpoint_prefix(prefix) or (-1, 0)
