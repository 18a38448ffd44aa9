"""Let what the ranks of a save or restore met travel as a value, and become the one error that the caller sees.

    done          a rank's part ──▶ Sent, its value or error        pickled, unpickled   Sent ──▶ bytes ──▶ Sent
    answers       all parts ──▶ one answer each, or one for all; of several errors a RanksFailedError, rank → error
    plain_errors  what comes back ──▶ one error

Every error and log line lists ranks in one way, and says of lost ones what to do. Nothing is sent here.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

from cloudckpt.errors import CloudCkptError, CommitUnknownError, OptionsError, RankLostError, text_of

__all__ = [
    "MissingPartsError",
    "RanksFailedError",
    "Sent",
    "UndecidedError",
    "answers",
    "done",
    "named_ranks",
    "own_failures",
    "pickled",
    "plain_errors",
    "rank_lost",
    "unpickled",
]

_SHOWN = 8

_Mine = TypeVar("_Mine")
_Result = TypeVar("_Result")


class RanksFailedError(Exception):
    """What some ranks raised where each did its own part; turned into an error for the caller by whoever led them.

    Attributes:
        failures: rank → its error.
    """

    def __init__(self, failures: Mapping[int, BaseException]) -> None:
        super().__init__(dict(failures))
        self.failures = dict(failures)


class UndecidedError(Exception):
    """Rank 0 was lost when it had all it needed to decide: nobody here knows whether it did."""


class MissingPartsError(Exception):
    """Another rank could not read what it was to pass on to this one; its own error says why."""


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
        text = f"{type(sent.error).__name__}: {text_of(sent.error)}" if sent.error is not None else str(exc)
        return pickle.dumps(Sent(sent.phase, error=CloudCkptError(text)))
    return data


def unpickled(data: bytes) -> Sent:
    """Bring a message back."""
    return cast("Sent", pickle.loads(data))  # noqa: S301 (of a rank of this job)


def named_ranks(ranks: Iterable[int]) -> str:
    """Return `rank 3`, `ranks 0, 2` or, of thousands, runs such as `ranks 0-2047`, whatever order they come in."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(start) if start == stop else f"{start}-{stop}" for start, stop in runs]
    more = [f"and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    is_one = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"{'rank' if is_one else 'ranks'} {', '.join([*texts[:_SHOWN], *more])}"


def rank_lost(why: str, ranks: Iterable[int], *, phase: str = "") -> RankLostError:
    """Return the error for ranks that are lost."""
    advice = "restart the job: it resumes from the newest committed checkpoint"
    return RankLostError(f"{why}; {advice}", ranks=ranks, phase=phase)


@contextmanager
def plain_errors(
    size: int = 1,
    failed: Callable[[str, Mapping[int, BaseException]], CloudCkptError] | None = None,
    *,
    about: str = "",
) -> Iterator[None]:
    """Turn what ranks met into one error, the same on every rank.

    Args:
        size: how many ranks there are.
        failed: makes the error of a text and of rank → error where ranks were lost, or met what is not ours or is not
            the same on all of them. Without it, that is the error of the first rank that met one, which notes the
            ranks; and that of a lost rank as it is.
        about: what stands beside an error of ours as a note, "" for none.

    Raises:
        CommitUnknownError: rank 0 was lost when it had all it needed to commit.
    """
    try:
        with _plain_errors(size, failed):
            yield
    except CloudCkptError as exc:
        if about:
            exc.add_note(about)
        raise


@contextmanager
def _plain_errors(
    size: int, failed: Callable[[str, Mapping[int, BaseException]], CloudCkptError] | None
) -> Iterator[None]:
    try:
        yield
    except RanksFailedError as exc:
        own = own_failures(exc.failures)
        error = _first(own) if failed is None else _same(own, size) or failed(_text(own, size), own)
        # What a user's object raised says more than that ranks failed.
        raise error from error.__cause__ or exc
    except UndecidedError as exc:
        raise CommitUnknownError(
            f"rank 0 was lost when it was about to commit: the checkpoint is whole or not there; {exc}", op="create"
        ) from exc
    except RankLostError as exc:
        if failed is None:
            raise
        raise failed(str(exc), dict.fromkeys(exc.ranks, exc)) from exc


def own_failures(failures: Mapping[int, BaseException]) -> Mapping[int, BaseException]:
    """Leave out the ranks that failed only because another one did."""
    return {rank: error for rank, error in failures.items() if not isinstance(error, MissingPartsError)} or failures


def _first(failures: Mapping[int, BaseException]) -> BaseException:
    ranks = sorted(failures)
    first = failures[ranks[0]]
    if ranks != [0]:
        first.add_note(f"on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_SHOWN]))}")
    return first


def _same(failures: Mapping[int, BaseException], size: int) -> CloudCkptError | None:
    """Return the error of ours that every rank met."""
    first = failures[min(failures)]
    kinds = {(type(error), text_of(error)) for error in failures.values()}
    return first if isinstance(first, CloudCkptError) and len(failures) == size and len(kinds) == 1 else None


def _text(failures: Mapping[int, BaseException], size: int) -> str:
    if size == 1:
        return text_of(failures[0], repr)
    return "; ".join(f"rank {rank}: {text_of(error)}" for rank, error in sorted(failures.items())[:_SHOWN])
