"""Say what one committed checkpoint is, and which of several is the newest or the best. Pure values, no I/O."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Self

from cloudckpt.errors import ManifestError, OptionsError, StorageError
from cloudckpt.format import Manifest

__all__ = ["WORKED", "Checkpoint", "Fit", "Survey", "Unreadable", "best_first", "check_metric", "prefix_of"]


WORKED = "worked_s"
"""Under which a manifest's summary says how long the line of history has been at work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What of a state and of a checkpoint went together in a restore, on this rank.

    Attributes:
        missing: names that the state has and the checkpoint lacks; they were left as they are.
        unexpected: names that the checkpoint has and the state lacks.
        cast: names of tensors that were restored into another dtype than they were saved in.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One committed checkpoint.

    Attributes:
        step: training step, -1 for a checkpoint outside a root.
        epoch: incarnation of the job that saved it, 0 outside a root.
        attempt: which attempt's objects make it up.
        url: its prefix; `cloudckpt.load(state, url)` reads it.
        metrics: what the caller measured at the save.
        created_at: when, by the saving coordinator's clock.
        total_bytes: bytes of all its shards.
        world_size: ranks that saved it.
        digest: SHA-256 of its manifest.
        manifest: the manifest itself.
        prefix: where it stands below the root that was opened, with its slash; "" if the URL opened is its own.
        fit: what a restore that returned this found of it in the state; None where nothing was restored.
    """

    step: int
    epoch: int
    attempt: str
    url: str
    metrics: Mapping[str, float]
    created_at: datetime
    total_bytes: int
    world_size: int
    digest: str
    manifest: Manifest = field(repr=False)
    prefix: str = field(repr=False)
    fit: Fit | None = field(default=None, repr=False, compare=False)

    def __hash__(self) -> int:
        """Hash by what tells one from another: metrics and metadata are dicts, and have none."""
        return hash((self.url, self.digest))

    @property
    def metadata(self) -> Mapping[str, object]:
        """The caller's own, decoded when it is asked for: a type that this program lacks keeps nothing else away.

        Raises:
            UnsupportedValueError: it holds a type that is not registered here.
            ManifestError: it holds what nobody can decode.
        """
        return self.manifest.metadata_values()

    @property
    def worked_s(self) -> float | None:
        """Seconds that the jobs of its line of history had been at work when it was committed; None if not known."""
        return self.manifest.summary.get(WORKED)

    @property
    def order(self) -> tuple[int, int]:
        """(epoch, step): what makes one checkpoint newer than another (FORMAT invariant 10)."""
        return self.epoch, self.step


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A checkpoint of which nobody can say what it is: nothing counts it, and only `delete` removes it.

    Attributes:
        step: training step, by its prefix.
        epoch: incarnation of the job that saved it, by its prefix.
        url: its prefix.
        error: why its manifest cannot be read: it is damaged, or the store refuses it (archived, no rights).
    """

    step: int
    epoch: int
    url: str
    error: ManifestError | StorageError

    @property
    def order(self) -> tuple[int, int]:
        """(epoch, step)."""
        return self.epoch, self.step


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What stands below a root, each part oldest first by (epoch, step).

    Attributes:
        checkpoints: committed, and read.
        unreadable: those of which nobody can say what they are.
        undecided: prefixes under which nothing was committed when they were looked at.
    """

    checkpoints: Sequence[Checkpoint]
    unreadable: Sequence[Unreadable]
    undecided: Sequence[str] = ()

    @classmethod
    def of(cls, found: Iterable[Checkpoint | Unreadable | None], undecided: Sequence[str] = ()) -> Self:
        """Put what was found in order; None is nothing."""
        there = sorted((one for one in found if one is not None), key=lambda one: one.order)
        return cls(
            checkpoints=tuple(one for one in there if isinstance(one, Checkpoint)),
            unreadable=tuple(one for one in there if isinstance(one, Unreadable)),
            undecided=tuple(undecided),
        )


def prefix_of(found: Checkpoint | ManifestError) -> str:
    """Return where a checkpoint stands below its root, of one that cannot be read by its error."""
    return found.prefix if isinstance(found, Checkpoint) else f"{found.key.partition('/')[0]}/"


def best_first(checkpoints: Sequence[Checkpoint], metric: str, mode: Literal["min", "max"]) -> list[Checkpoint]:
    """Return those that have the metric, best first; of equal ones the newer first. NaN counts as absent.

    Raises:
        OptionsError: the metric has no name, or the mode is neither `min` nor `max`.
    """
    check_metric(metric, mode)
    sign = 1 if mode == "min" else -1
    scored = [one for one in checkpoints if not math.isnan(one.metrics.get(metric, math.nan))]
    newest_first = sorted(scored, key=lambda one: one.order, reverse=True)
    return sorted(newest_first, key=lambda one: sign * one.metrics[metric])


def check_metric(metric: str, mode: str) -> None:
    """Raise `OptionsError` for a metric without a name, or a mode that is none."""
    if not isinstance(metric, str) or not metric:
        raise OptionsError(f"the metric is {metric!r}; give the name under which `save` gets it")
    if mode not in ("min", "max"):
        raise OptionsError(f"mode is {mode!r}; 'min' keeps the smallest {metric}, 'max' the largest")
