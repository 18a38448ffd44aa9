"""Put what ranks tell each other in one exchange into bytes; what raises on one of them travels as a value.

done      a rank's part ──▶ Sent        answers   all parts ──▶ one answer each, or one that is meant for all
pickled   Sent ──▶ bytes                unpickled
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from cloudckpt.errors import CloudCkptError, OptionsError
from cloudckpt.ranks.outcome import RanksFailedError

__all__ = ["Sent", "answers", "done", "pickled", "unpickled"]

_Mine = TypeVar("_Mine")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Sent:
    """A rank's part in one exchange: which exchange it believes to be in, and its value or error."""

    phase: str
    value: object = None
    error: BaseException | None = None


def done(phase: str, mine: Callable[[], object]) -> Sent:
    """Let a rank do its part, and keep what that raises."""
    try:
        return Sent(phase, mine())
    except Exception as exc:  # noqa: BLE001 (the end of a rank's part: raised again on every rank)
        return Sent(phase, error=exc)


def answers(sent: Sequence[Sent], decide: Callable[[list[_Mine]], Sequence[_Result]]) -> list[Sent]:
    """Return what the ranks are told: one answer each, or a single one that is meant for all."""
    stranger = next((rank for rank, part in enumerate(sent) if part.phase != sent[0].phase), None)
    failures = {rank: part.error for rank, part in enumerate(sent) if part.error is not None}
    if stranger is not None:
        said = f"rank 0 is at {sent[0].phase!r} and rank {stranger} at {sent[stranger].phase!r}"
        return [Sent("", error=OptionsError(f"{said}; call the same save or restore on every rank"))]
    if failures:
        return [Sent("", error=RanksFailedError(failures))]
    try:
        return [Sent("", value) for value in decide([cast("_Mine", part.value) for part in sent])]
    except Exception as exc:  # noqa: BLE001 (as above)
        return [Sent("", error=exc)]


def pickled(sent: Sent) -> bytes:
    """Bring a message between ranks of one job into bytes; an error that does not pickle is told by its text."""
    try:
        data = pickle.dumps(sent)
        if sent.error is not None:
            pickle.loads(data)  # noqa: S301 (our own)
    except Exception as exc:  # noqa: BLE001 (an error of a user's own may raise anything here)
        text = f"{type(sent.error).__name__}: {sent.error}" if sent.error is not None else str(exc)
        return pickle.dumps(Sent(sent.phase, error=CloudCkptError(text)))
    return data


def unpickled(data: bytes) -> Sent:
    """Bring a message back."""
    return cast("Sent", pickle.loads(data))  # noqa: S301 (of a rank of this job)
