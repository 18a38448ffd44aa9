"""Turn the training script's lines of JSON into typed events; the script writes them, the demo reads them."""

from __future__ import annotations

import msgspec

__all__ = ["End", "Event", "Saved", "Saving", "Start", "Step", "read_event"]


class _Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="event", tag=str.lower):
    pass


class Start(_Event, frozen=True):
    """A process is ready to train.

    Attributes:
        first: the step that it trains first.
        restored: URL of the checkpoint that it restored, None on a fresh start.
        samples: samples of one data epoch.
    """

    first: int
    restored: str | None
    samples: int


class Step(_Event, frozen=True):
    """One step was trained.

    Attributes:
        loss: hexadecimal form of the float, which no rounding touches.
        data_epoch: passes over the data that are complete.
        position: samples of this data epoch that were used, this step's included.
    """

    step: int
    loss: str
    data_epoch: int
    position: int

    @property
    def loss_value(self) -> float:
        """The loss as a number, bit for bit."""
        return float.fromhex(self.loss)


class Saving(_Event, frozen=True):
    """The save of a step begins; steps that are trained meanwhile come before its `Saved`."""

    step: int


class Saved(_Event, frozen=True):
    """The save of a step is committed."""

    step: int
    bytes: int
    url: str


class End(_Event, frozen=True):
    """The last step is trained and every save is committed.

    Attributes:
        parameters: numbers in the model.
        digests: part of the state → SHA-256.
    """

    parameters: int
    digests: dict[str, str]


Event = Start | Step | Saving | Saved | End

_DECODER = msgspec.json.Decoder(Event)


def read_event(line: bytes) -> Event:
    """Decode one line.

    Raises:
        msgspec.ValidationError: it is not one of the events.
    """
    event: Event = _DECODER.decode(line)
    return event
