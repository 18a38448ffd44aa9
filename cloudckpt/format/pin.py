"""The pin: the small object that says of a checkpoint that it is to stay, and holds its manifest.

A pure value with strict decoding, as the manifest is. The manifest's text is in it byte for byte, sealed as it was: so
a checkpoint whose manifest was deleted can be committed again as what it was. No clock and no store here.
"""

from __future__ import annotations

from datetime import datetime
from typing import Self

import msgspec

from cloudckpt.errors import FormatVersionError, ManifestError, OptionsError
from cloudckpt.format.codec.walk import is_text
from cloudckpt.format.manifest import MANIFEST_LIMIT_BYTES, Manifest
from cloudckpt.format.record import FORMAT_VERSION, decode_record, encode_record, moment_of
from cloudckpt.keys import checkpoint_prefix, parse_pin_key, pin_key, shown

__all__ = ["PIN_LIMIT_BYTES", "PinRecord"]

_NOTE_LIMIT = 1_000
# Within text, quotes, backslashes and line feeds of a manifest take two bytes each.
PIN_LIMIT_BYTES = 2 * MANIFEST_LIMIT_BYTES + (64 << 10)


class PinRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pin.

    Attributes:
        format_version: of this schema.
        step: of the checkpoint.
        epoch: of the checkpoint.
        attempt: of the checkpoint.
        note: why it is to stay, for people.
        created_at: RFC 3339 with an offset, by the clock of who pinned it; for people.
        manifest: the text of the checkpoint's manifest.
    """

    format_version: int
    step: int
    epoch: int
    attempt: str
    note: str
    created_at: str
    manifest: str

    @classmethod
    def of(cls, manifest: Manifest, data: bytes, *, note: object, created_at: str) -> Self:
        """Return the pin of a checkpoint.

        Args:
            manifest: its manifest.
            data: the bytes of that, as they stand.
            note: why it is to stay.
            created_at: RFC 3339 with an offset.

        Raises:
            OptionsError: the note is no text, or longer than a pin holds; or the checkpoint is not one of a root.
        """
        if not isinstance(note, str) or not is_text(note) or len(note) > _NOTE_LIMIT:
            raise OptionsError(f"note is {shown(note)}; give a text of {_NOTE_LIMIT} characters at most")
        if manifest.step is None:
            raise OptionsError("only a step of a root is pinned; what is saved to a URL of its own stays as it is")
        return cls(
            format_version=FORMAT_VERSION,
            step=manifest.step,
            epoch=manifest.epoch,
            attempt=manifest.attempt,
            note=note,
            created_at=created_at,
            manifest=data.decode(),
        )

    @property
    def key(self) -> str:
        """Its key below the root."""
        return pin_key(self.prefix)

    @property
    def prefix(self) -> str:
        """Where its checkpoint stands below the root, with its slash."""
        return checkpoint_prefix(self.step, self.epoch)

    def encode(self) -> bytes:
        """Return the object's bytes."""
        return encode_record(self)

    def created(self) -> datetime:
        """Return when it was pinned, by the clock of who did."""
        return moment_of(self.created_at)

    def checkpoint_manifest(self) -> tuple[Manifest, bytes]:
        """Return the manifest that it holds, decoded and as it stood; raises `ManifestError` if that is damaged."""
        data = self.manifest.encode()
        return Manifest.decode(data, key=self.key), data

    @classmethod
    def decode(cls, data: bytes, *, key: str) -> PinRecord:
        """Read a pin back; `key` is where it stands.

        Raises:
            ManifestError: it is no pin of a known version, or not one of the checkpoint that its key names.
        """
        try:
            pin = decode_record(data, cls, key=key)
            problem = _problem(pin, key)
        except FormatVersionError:
            raise
        except (ManifestError, OptionsError, ValueError) as exc:
            raise _unreadable(key, exc) from exc
        if problem:
            raise _unreadable(key, problem)
        return pin


def _problem(pin: PinRecord, key: str) -> str:
    """Say what in a pin cannot be, "" if all can; raises what its manifest or its time do."""
    manifest, _ = pin.checkpoint_manifest()
    own = (manifest.step, manifest.epoch, manifest.attempt, manifest.state)
    if own != (pin.step, pin.epoch, pin.attempt, "committed") or parse_pin_key(key) != pin.prefix:
        return "it is of another checkpoint"
    pin.created()
    return ""


def _unreadable(key: str, why: object) -> ManifestError:
    return ManifestError(
        f"the pin {key} cannot be read: {shown(why)}. What it pins stays all the same; take the pin away, and pin it "
        "anew",
        key=key,
    )
