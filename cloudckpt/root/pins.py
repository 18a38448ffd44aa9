"""Say which checkpoints of a root are pinned: objects of which each keeps one, whatever the rules say.

    pins/step-…-e….json    created once, never changed; holds the manifest of its checkpoint, byte for byte

Knows pins and one store, and nothing of what stands under their prefixes; what holds them is in `pinning`. A pin that
cannot be read pins all the same: its key says of what. Any thread may enter.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from cloudckpt.errors import ManifestError, ObjectNotFoundError
from cloudckpt.format import (
    PIN_LIMIT_BYTES,
    PINS_PREFIX,
    Manifest,
    PinRecord,
    moment_of,
    parse_checkpoint_prefix,
    parse_pin_key,
    pin_key,
)
from cloudckpt.store import Store
from cloudckpt.threads import each

__all__ = ["Pin", "Pins"]

_READERS = 16


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


class Pins:
    """The pins of one root."""

    def __init__(self, store: Store) -> None:
        """Wrap `store`, which stays the caller's to close."""
        self._store = store

    def prefixes(self) -> set[str]:
        """Return the prefixes of all that is pinned, also of what nobody can read. One listing."""
        keys = [info.key for info in self._store.list(PINS_PREFIX).objects]
        return {prefix for key in keys if (prefix := parse_pin_key(key)) is not None}

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

    def all(self) -> list[Pin]:
        """Return all pins, by (epoch, step); of one that cannot be read its note says so. A request for each."""
        prefixes = sorted(self.prefixes())
        found = each(prefixes, self.describe, threads=_READERS, name="cloudckpt-pins")
        return sorted((pin for pin in found if pin is not None), key=lambda pin: pin.order)

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
