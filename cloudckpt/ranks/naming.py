"""Tell people of ranks: the one way in which every error and log line lists them, and says what to do."""

from __future__ import annotations

from collections.abc import Iterable

from cloudckpt.errors import RankLostError

__all__ = ["named_ranks", "rank_lost"]

_SHOWN = 8


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
