"""Turn what the ranks of a save or restore met into the one error that its caller sees.

Ranks' own errors reach every rank as one `RanksFailedError`, rank → error; whoever leads the ranks says here what comes
of it. Nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from cloudckpt.errors import CloudCkptError, CommitUnknownError, RankLostError
from cloudckpt.ranks.group import MissingPartsError, UndecidedError
from cloudckpt.ranks.message import RanksFailedError

__all__ = ["own_failures", "plain_errors"]

_SHOWN = 8


@contextmanager
def plain_errors(
    size: int = 1, failed: Callable[[str, Mapping[int, BaseException]], CloudCkptError] | None = None
) -> Iterator[None]:
    """Turn what ranks met into one error, the same on every rank.

    Args:
        size: how many ranks there are.
        failed: makes the error of a text and of rank → error where ranks were lost, or met what is not ours or is not
            the same on all of them. Without it, that is the error of the first rank that met one, which notes the
            ranks; and that of a lost rank as it is.

    Raises:
        CommitUnknownError: rank 0 was lost when it had all it needed to commit.
    """
    try:
        yield
    except RanksFailedError as exc:
        own = own_failures(exc.failures)
        raise (_first(own) if failed is None else _same(own, size) or failed(_text(own, size), own)) from exc
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
    kinds = {(type(error), str(error)) for error in failures.values()}
    return first if isinstance(first, CloudCkptError) and len(failures) == size and len(kinds) == 1 else None


def _text(failures: Mapping[int, BaseException], size: int) -> str:
    if size == 1:
        return repr(failures[0])
    return "; ".join(f"rank {rank}: {error}" for rank, error in sorted(failures.items())[:_SHOWN])
