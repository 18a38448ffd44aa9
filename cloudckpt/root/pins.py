"""Say which checkpoints of a root are pinned or have a name: objects of which each keeps one, whatever the rules say.

    pins/step-…-e….json               created once, never changed; holds the manifest of its checkpoint, byte for byte
    pins/NAME/step-…-e….ATTEMPT       created before that attempt commits; its key says all

Knows pins and one store, and nothing of what stands under their prefixes; what holds them is in `pinning`. A pin that
cannot be read pins all the same: its key says of what. Any thread may enter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from cloudckpt.errors import ManifestError, ObjectExistsError, ObjectNotFoundError
from cloudckpt.format import (
    PIN_LIMIT_BYTES,
    PINS_PREFIX,
    Manifest,
    PinRecord,
    moment_of,
    name_key,
    parse_checkpoint_prefix,
    parse_name_key,
    parse_pin_key,
    pin_key,
)
from cloudckpt.options import READERS
from cloudckpt.store import Store
from cloudckpt.threads import each

__all__ = ["Held", "Named", "Pin", "Pins"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """What keeps a checkpoint until it is taken away.

    Attributes:
        step: of the checkpoint.
        epoch: of the checkpoint.
        url: of the checkpoint.
        note: why it is to stay, as who pinned it says.
        created_at: when, by that one's clock.
    """

    step: int
    epoch: int
    url: str
    note: str
    created_at: datetime

    @property
    def order(self) -> tuple[int, int]:
        """(epoch, step) of the checkpoint."""
        return self.epoch, self.step


@dataclass(frozen=True, slots=True)
class Named:
    """That an attempt, if it is what is committed under a prefix, has a name."""

    name: str
    prefix: str
    attempt: str

    @property
    def key(self) -> str:
        """Of the object that says so."""
        return name_key(self.name, self.prefix, self.attempt)

    @property
    def order(self) -> tuple[int, int]:
        """(epoch, step) of the checkpoint: of those of one name the highest that is committed has it."""
        step, epoch = parse_checkpoint_prefix(self.prefix) or (-1, 0)
        return epoch, step


@dataclass(frozen=True, slots=True)
class Held:
    """What one listing tells of all that is kept whatever the rules say.

    Attributes:
        pinned: prefixes, also of what nobody can read.
        names: the names given, the oldest checkpoint's first; of each name also those that it has moved on from, and
            those of attempts that never committed.
    """

    pinned: frozenset[str]
    names: tuple[Named, ...]

    @property
    def prefixes(self) -> frozenset[str]:
        """All of them."""
        return self.pinned.union(one.prefix for one in self.names)


class Pins:
    """The pins and names of one root."""

    def __init__(self, store: Store) -> None:
        """Wrap `store`, which stays the caller's to close."""
        self._store = store

    def prefixes(self) -> set[str]:
        """Return the prefixes of all that is pinned, also of what nobody can read. One listing."""
        return set(self.held().pinned)

    def held(self) -> Held:
        """Return what is pinned, and what has names. One listing."""
        keys = [info.key for info in self._store.list(PINS_PREFIX).objects]
        names = [Named(*found) for key in keys if (found := parse_name_key(key)) is not None]
        return Held(
            pinned=frozenset(prefix for key in keys if (prefix := parse_pin_key(key)) is not None),
            names=tuple(sorted(names, key=lambda one: (one.order, one.key))),
        )

    def give(self, named: Named) -> None:
        """Give a name; nothing is said where it is given already. One request."""
        with suppress(ObjectExistsError):
            self._store.create(named.key, b"\n")

    def take(self, names: Sequence[Named]) -> None:
        """Take these away."""
        if names:
            self._store.delete([one.key for one in names])

    def is_pinned(self, prefix: str) -> bool:
        """Tell whether the checkpoint under a prefix is pinned. One request."""
        try:
            self._store.head(pin_key(prefix))
        except ObjectNotFoundError:
            return False
        return True

    def read(self, prefix: str) -> PinRecord | None:
        """Return the pin of the checkpoint under a prefix, None if there is none. One request.

        Raises:
            ManifestError: it cannot be read, and pins all the same.
        """
        key = pin_key(prefix)
        try:
            return PinRecord.decode(self._store.read(key, limit_bytes=PIN_LIMIT_BYTES), key=key)
        except ObjectNotFoundError:
            return None

    def note_of(self, prefix: str) -> str | None:
        """Return the note of a pin, or why it cannot be read; None if there is no pin. One request."""
        try:
            found = self.read(prefix)
        except ManifestError as exc:
            return str(exc)
        return None if found is None else found.note

    def all(self, held: Held | None = None) -> list[Pin]:
        """Return all pins, by (epoch, step); of one that cannot be read its note says so. A request for each.

        Args:
            held: what a listing has just told; None asks for one.
        """
        prefixes = sorted((held or self.held()).pinned)
        found = each(prefixes, self.describe, threads=READERS, name="cloudckpt-pins")
        return sorted((pin for pin in found if pin is not None), key=lambda pin: pin.order)

    def copy_from(self, other: Pins, prefix: str) -> bool:
        """Create the pin that another root has of a prefix here, byte for byte, also one that cannot be read.

        Returns:
            Whether it was created; not where one is here, which stays, or none is there any more.
        """
        key = pin_key(prefix)
        with suppress(ObjectExistsError, ObjectNotFoundError):
            self._store.create(key, other._store.read(key, limit_bytes=PIN_LIMIT_BYTES))
            return True
        return False

    def create(self, manifest: Manifest, data: bytes, *, note: str) -> Pin:
        """Pin a checkpoint whose manifest has these bytes.

        Raises:
            ObjectExistsError: it is pinned already.
            OptionsError: the note is none.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = PinRecord.of(manifest, data, note=note, created_at=now)
        self._store.create(record.key, record.encode())
        return self.pin_of(record)

    def remove(self, prefix: str) -> None:
        """Take a pin away; nothing is said where there is none."""
        self._store.delete([pin_key(prefix)])

    def pin_of(self, record: PinRecord) -> Pin:
        """Return what a record says, for people."""
        return Pin(
            step=record.step,
            epoch=record.epoch,
            url=f"{self._store.url.removesuffix('/')}/{record.prefix.rstrip('/')}",
            note=record.note,
            created_at=record.created(),
        )

    def describe(self, prefix: str) -> Pin | None:
        """Return the pin of the checkpoint under a prefix, for people, also if it cannot be read; None if none is."""
        try:
            record = self.read(prefix)
        except ManifestError as exc:
            return self._unreadable(prefix, exc)
        return None if record is None else self.pin_of(record)

    def _unreadable(self, prefix: str, error: ManifestError) -> Pin:
        info = self._store.head(pin_key(prefix))
        step, epoch = parse_checkpoint_prefix(prefix) or (-1, 0)
        return Pin(
            step=step,
            epoch=epoch,
            url=f"{self._store.url.removesuffix('/')}/{prefix.rstrip('/')}",
            note=str(error),
            created_at=moment_of(info.modified_s),
        )
