"""Find the checkpoint of a root that a caller means: the newest good one, the best, that of a step, or this one.

Reads manifests, and only as many as are asked for. On one rank, which tells the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cloudckpt.errors import CheckpointNotFoundError, IntegrityError, OptionsError
from cloudckpt.format import check_name, step_number
from cloudckpt.root.absence import mistaken_for
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint, best_first
from cloudckpt.root.looking import LISTINGS
from cloudckpt.root.naming import named, no_name
from cloudckpt.root.retention import KeepBest, RetentionRule
from cloudckpt.root.roots import Roots

__all__ = ["Candidate", "Choice", "Wanted", "newest_or_the_one", "nothing_at", "the_one_at"]

Candidate = Checkpoint | IntegrityError
"""A checkpoint to be tried, or why one that is there cannot be."""

Wanted = int | str | Checkpoint
"""What a caller may ask for: a step, `latest`, `best`, a name, or a checkpoint."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is asked for, of the roots of one job.

    Attributes:
        roots: where it may be.
        wanted: `latest`, `best` by the first `KeepBest` of `rules`, a name, a step, or a checkpoint.
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
            CheckpointNotFoundError: no commit of that step; or none has that name, and there are some.
            ManifestError: nothing is committed, but something was.
            OptionsError: what is asked for says nothing here.
            StorageError: the store cannot be read.
        """
        if self.wanted == "latest":
            is_empty = True
            for candidate in self.roots.newest_first():
                is_empty = False
                yield candidate
            if is_empty:
                self._refuse_checkpoint()
        elif isinstance(self.wanted, Checkpoint):
            if not any(one.holds(self.wanted) for one in self.roots.catalogs):
                raise OptionsError(
                    f"{self.wanted.url} is no checkpoint of {self.roots.url}; load it with "
                    "cloudckpt.load(state, checkpoint.url), or restore it with a manager of its own root"
                )
            yield self.wanted
        elif self.wanted == "best":
            yield from self._best()
        elif isinstance(self.wanted, str):
            yield from self._named(check_name(self.wanted))
        else:
            yield self.roots.find(step_number(self.wanted))

    def _best(self) -> Iterator[Checkpoint]:
        rule = next((rule for rule in self.rules if isinstance(rule, KeepBest)), None)
        if rule is None:
            raise OptionsError(
                "step 'best' says nothing here; give 'latest', a step, manager.best('name'), or 'best' with a KeepBest "
                "rule in retention"
            )
        for _ in range(LISTINGS):
            found = self.roots.all()
            if not found:
                self._refuse_checkpoint()
                return
            best = next(iter(best_first(found, rule.metric, rule.mode)), None)
            if best is None:
                raise OptionsError(_no_best(found, rule.metric))
            yield best
            if self.roots.stands(best):
                return

    def _named(self, name: str) -> Iterator[Checkpoint]:
        for _ in range(LISTINGS):
            found = named(self.roots, name)
            if found is None:
                if self.roots.newest() is not None:
                    raise no_name(self.roots, name)
                self._refuse_checkpoint()
                return
            yield found
            if self.roots.stands(found):
                return

    def _refuse_checkpoint(self) -> None:
        """Refuse to call it a fresh start where no root is."""
        if self.roots.catalogs[0].is_taken(""):
            raise OptionsError(
                f"{self.roots.url} is one checkpoint, not a root of checkpoints; load it with "
                "cloudckpt.load, or give the URL of the root"
            )


def _no_best(found: Sequence[Checkpoint], metric: str) -> str:
    """Say why none of these is the best."""
    there = sorted({name for one in found for name in one.metrics})
    if metric in there:
        why = f"{metric!r} is nan wherever a checkpoint has it"
    else:
        why = f"no checkpoint has {metric!r}; they have {', '.join(map(repr, there)) or 'no metrics'}"
    return (
        f"none of the {len(found)} checkpoints is the best: {why}. Restore 'latest' or a step, or give the KeepBest "
        "rule a metric that `save` gets"
    )


def newest_or_the_one(catalog: Catalog) -> Checkpoint:
    """Return the newest checkpoint of a root, or the one that the URL itself is.

    Raises:
        CheckpointNotFoundError: neither.
    """
    found = Roots([catalog]).newest() or the_one_at(catalog)
    if found is None:
        raise nothing_at(catalog)
    return found


def the_one_at(catalog: Catalog) -> Checkpoint | None:
    """Return the checkpoint that the URL itself is, if it is one."""
    try:
        return catalog.open()
    except CheckpointNotFoundError:
        return None


def nothing_at(catalog: Catalog, *, undecided: int | None = None) -> CheckpointNotFoundError:
    """Say that nothing is committed, and what stands there in its place.

    A bucket cannot tell an empty root from a missing one, so nothing here does.

    Args:
        catalog: where.
        undecided: attempts without a commit; None: they are counted by a listing.
    """
    undecided = len(catalog.places()) if undecided is None else undecided
    if above := catalog.root_above():
        return CheckpointNotFoundError(above)
    if undecided:
        why = f"attempts without a commit: {undecided}; ask again when a save has ended"
    else:
        why = mistaken_for(catalog.store) or "check the URL"
    return CheckpointNotFoundError(f"no committed checkpoint at {catalog.store.url}; {why}")
