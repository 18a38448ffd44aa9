"""Find the checkpoint of a root that a caller means: the newest good one, the best, that of a step, or this one.

Reads manifests, and only as many as are asked for. On one rank, which tells the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cloudckpt.errors import IntegrityError, OptionsError
from cloudckpt.format import step_number
from cloudckpt.root.checkpoint import Checkpoint
from cloudckpt.root.retention import KeepBest, RetentionRule
from cloudckpt.root.roots import Roots

__all__ = ["Candidate", "Choice", "Wanted"]

Candidate = Checkpoint | IntegrityError
"""A checkpoint to be tried, or why one that is there cannot be."""

Wanted = int | Literal["latest", "best"] | Checkpoint
"""What a caller may ask for."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is asked for, of the roots of one job.

    Attributes:
        roots: where it may be.
        wanted: `latest`, `best` by the first `KeepBest` of `rules`, a step, or a checkpoint.
        rules: the root's retention rules.
    """

    roots: Roots
    wanted: Wanted
    rules: Sequence[RetentionRule] = ()

    def __str__(self) -> str:
        return self.wanted.url if isinstance(self.wanted, Checkpoint) else str(self.wanted)

    def candidates(self) -> Iterator[Candidate]:
        """Yield what may be restored, best first: for `latest` one after another, else the one that is meant.

        Raises:
            CheckpointNotFoundError: no commit of that step.
            OptionsError: what is asked for says nothing here.
            StorageError: the store cannot be read.
        """
        if self.wanted == "latest":
            is_empty = True
            for candidate in self.roots.newest_first():
                is_empty = False
                yield candidate
            if is_empty and self.roots.catalogs[0].is_taken(""):
                raise OptionsError(
                    f"{self.roots.url} is one checkpoint, not a root of checkpoints; load it with "
                    "cloudckpt.load, or give the URL of the root"
                )
        elif isinstance(self.wanted, Checkpoint):
            yield self.wanted
        elif isinstance(self.wanted, str):
            yield from self._best()
        else:
            yield self.roots.find(step_number(self.wanted))

    def _best(self) -> Iterator[Checkpoint]:
        rule = next((rule for rule in self.rules if isinstance(rule, KeepBest)), None)
        if self.wanted != "best" or rule is None:
            raise OptionsError(
                f"step {self.wanted!r} says nothing here; give 'latest', a step, manager.best('name'), or 'best' with "
                "a KeepBest rule in retention"
            )
        best = self.roots.best(rule.metric, rule.mode)
        if best is not None:
            yield best
