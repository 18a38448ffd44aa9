"""Remove checkpoints because a person says so: planned and shown first, manifests next, objects a grace time later.

    by_rules, by_steps ──▶ Plan ──shown, confirmed──▶ uncommit ──▶ finish: waits, then the objects go

No job is needed, and none is disturbed: nothing is claimed. What a plan does not name stays, however long it was looked
at; what it names stays, too, if it is pinned or kept by then. Keeps FORMAT invariants 7 and 8.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cloudckpt.errors import (
    FormatVersionError,
    ManifestError,
    OptionsError,
)
from cloudckpt.format import parse_checkpoint_prefix
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint, Survey, Unreadable, prefix_of
from cloudckpt.root.cleaning import Cleaner
from cloudckpt.root.naming import names_given
from cloudckpt.root.pinning import refuse_pinned
from cloudckpt.root.pruning import delete_unpinned, uncommit_each, what_goes
from cloudckpt.root.retention import RetentionRule, kept_by, why_kept
from cloudckpt.root.roots import Roots

__all__ = ["Plan", "Thinning"]

Order = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to go from a root, and what that means.

    Attributes:
        going: oldest first.
        unreadable: those among what was asked for by name whose manifest cannot be read; all that stands there goes.
        staying: what else is committed, oldest first.
        kept: (epoch, step) → what keeps each of those, as `why_kept` says it.
        warnings: what a person should know before, in words: that one is the newest, the only, or in use.
    """

    going: Sequence[Checkpoint]
    unreadable: Sequence[Unreadable] = ()
    staying: Sequence[Checkpoint] = ()
    kept: Mapping[Order, Sequence[str]]
    warnings: Sequence[str] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of the shards that they hold, as far as that is known; those that others share will stay."""
        return sum(one.manifest.sent_bytes for one in self.going)


class Thinning:
    """The removal of checkpoints of one root by hand."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        grace_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Thin out the root of `catalog`.

        Args:
            catalog: the root's.
            grace_s: seconds between the end of a checkpoint and that of its objects, for readers of it.
            clock: monotonic seconds.
            sleep: pauses for so many.

        Raises:
            OptionsError: `grace_s` is no number of seconds.
        """
        self._catalog = catalog
        self._cleaner = Cleaner(catalog, grace_s=grace_s, sweep_after_s=None, clock=clock)
        self._rules: Sequence[RetentionRule] | None = None
        self._sleep = sleep

    # -- plans: nothing is written -----------------------------------------------------------------------------

    def by_rules(self, rules: Sequence[RetentionRule]) -> Plan:
        """Plan to remove what no rule keeps, of all lines of history; the newest, pinned and used ones stay.

        Raises:
            OptionsError: there are no rules; or one keeps nothing of what is there, which is more likely a mistake.
            CloudCkptError: what `Roots.all` raises.
        """
        if not rules:
            raise OptionsError("no rule says what is to stay, so nothing is removed; give one, such as --keep-last 3")
        found = Roots([self._catalog]).all()
        idle = next((rule for rule in rules if found and not kept_by(rule, found)), None)
        if idle is not None:
            metrics = ", ".join(sorted({name for one in found for name in one.metrics})) or "none"
            raise OptionsError(
                f"{idle!r} keeps none of the {len(found)} checkpoints at {self._catalog.store.url} (their metrics: "
                f"{metrics}), so nothing is removed; leave it out, or mend it"
            )
        self._rules = rules
        held, in_use = self._catalog.pins.held(), self._in_use(found)
        pinned_orders = {one.order for one in found if one.prefix in held.pinned}
        kept = why_kept(found, rules, pinned=pinned_orders, names=names_given(held, found), in_use=in_use)
        going = what_goes(self._catalog, rules, found, protected=in_use, put_back=lambda _: True)
        return Plan(going=going, staying=_others(found, going), kept=kept)

    def by_steps(self, steps: Sequence[int]) -> Plan:
        """Plan to remove the checkpoints of these steps, of each the newest; also those that nobody can read.

        Raises:
            CheckpointNotFoundError: no commit of a step.
            PinnedError: one of them is pinned.
            FormatVersionError: a newer release has saved one of them.
            CloudCkptError: what `Roots.survey` raises.
        """
        self._rules = None
        asked = [self._catalog.what_is(step) for step in dict.fromkeys(steps)]
        for one in asked:
            if isinstance(one, FormatVersionError):
                raise one
            refuse_pinned(self._catalog, prefix_of(one))
        survey = self._catalog.survey()
        unreadable = sorted((self._unreadable(one) for one in asked if isinstance(one, ManifestError)), key=_order_of)
        going = sorted((one for one in asked if isinstance(one, Checkpoint)), key=lambda one: one.order)
        staying = _others(survey.checkpoints, going)
        held = self._catalog.pins.held()
        in_use = self._in_use(survey.checkpoints)
        kept = why_kept(
            survey.checkpoints,
            (),
            in_use=in_use,
            pinned=[one.order for one in staying if one.prefix in held.pinned],
            names=names_given(held, staying),
        )
        return Plan(
            going=going,
            unreadable=unreadable,
            staying=staying,
            kept=kept,
            warnings=_warnings(going, unreadable, survey, in_use),
        )

    def _unreadable(self, error: ManifestError) -> Unreadable:
        prefix = prefix_of(error)
        step, epoch = parse_checkpoint_prefix(prefix) or (-1, 0)
        url = f"{self._catalog.store.url.removesuffix('/')}/{prefix.rstrip('/')}"
        return Unreadable(step=step, epoch=epoch, url=url, error=error)

    def _in_use(self, found: Sequence[Checkpoint]) -> set[Order]:
        """Return what the job of the newest epoch went on from, if it has committed nothing since."""
        epoch = next(iter(self._catalog.claims.epochs()), 0)
        claim = None if any(one.epoch >= epoch for one in found) else self._catalog.claims.read(epoch)
        return set() if claim is None or claim.resumed_from is None else {claim.resumed_from[::-1]}

    # -- removal -----------------------------------------------------------------------------------------------

    def uncommit(self, plan: Plan) -> list[Checkpoint | Unreadable]:
        """Let what is planned exist no more; return what is gone. The store is asked again what is pinned and kept.

        Raises:
            PinnedError: one that was asked for by name is pinned by now. So says a note which are gone all the same.
            StorageError: the store refuses; as before.
            KeyboardInterrupt: as before.
        """
        gone: list[Checkpoint | Unreadable] = []
        try:
            if self._rules is None:
                self._delete(plan, gone)
            else:
                self._prune(plan, self._rules, gone)
        except BaseException as exc:
            exc.add_note(self.left(gone) if gone else "nothing was removed")
            raise
        return gone

    def _prune(self, plan: Plan, rules: Sequence[RetentionRule], gone: list[Checkpoint | Unreadable]) -> None:
        planned = {one.digest for one in plan.going}
        found = Roots([self._catalog]).all()
        going = what_goes(self._catalog, rules, found, protected=self._in_use(found), put_back=self._put_back)
        due = [one for one in going if one.digest in planned]
        _, refused = uncommit_each(self._catalog, self._cleaner, due, gone.append)
        if refused:
            raise next(iter(refused.values()))

    def _put_back(self, prefix: str) -> bool:
        return self._cleaner.put_back(prefix, by=self._catalog)

    def _delete(self, plan: Plan, gone: list[Checkpoint | Unreadable]) -> None:
        def delete(one: Checkpoint | Unreadable, found: Checkpoint | ManifestError) -> None:
            def tell(_: Checkpoint | ManifestError) -> None:
                gone.append(one)

            delete_unpinned(self._catalog, self._cleaner, found, tell)

        for one in plan.going:
            delete(one, one)
        for other in plan.unreadable:
            if isinstance(other.error, ManifestError):
                delete(other, other.error)
        Roots([self._catalog]).mark_if_emptied()

    def finish(self, told: Callable[[float], None] = lambda _: None) -> int:
        """Wait for the end of the grace time, then remove the objects of what is gone; return how many they were.

        Args:
            told: is told about once a second how many seconds are left, and 0 when the removal begins.

        Raises:
            StorageError: the store refuses, or is away.
            KeyboardInterrupt: a note says what is left, and what removes it.
        """
        gone = self._cleaner.uncommitted()
        try:
            while (left_s := self._cleaner.seconds_left()) > 0:
                told(left_s)
                self._sleep(min(1.0, left_s))
            told(0.0)
            return self._cleaner.remove_due()
        except BaseException as exc:
            exc.add_note(_left(self._catalog.store.url, gone, "are removed"))
            raise

    def left(self, gone: Sequence[Checkpoint | Unreadable]) -> str:
        """Say what is gone, and what of it is still there."""
        steps = ", ".join(str(one.step) for one in gone)
        return _left(self._catalog.store.url, len(gone), f"are removed (steps {steps})")


def _left(url: str, count: int, what: str) -> str:
    return (
        f"{count} checkpoints {what}; objects of theirs may be left, which `cloudckpt sweep {url}` removes (those of "
        "the newest job once another one has begun there)"
    )


def _others(found: Sequence[Checkpoint], going: Sequence[Checkpoint]) -> list[Checkpoint]:
    gone = {one.order for one in going}
    return [one for one in found if one.order not in gone]


def _order_of(one: Unreadable) -> Order:
    return one.order


def _warnings(
    going: Sequence[Checkpoint], unreadable: Sequence[Unreadable], survey: Survey, in_use: set[Order]
) -> list[str]:
    """Say what it means that the newest goes, all go, or one that a job went on from."""
    said: list[str] = []
    staying = _others(survey.checkpoints, going)
    lost = {one.order for one in unreadable}
    newest = max([one.order for one in survey.checkpoints] + [one.order for one in survey.unreadable], default=(0, 0))
    if not staying and lost >= {one.order for one in survey.unreadable}:
        said.append("nothing is left after that: no job can go on from here, and the next one begins at its first step")
    elif not staying:
        said.append("nothing that can be read is left after that: no job can go on from here")
    elif going and going[-1].order == survey.checkpoints[-1].order:
        said.append(
            f"step {going[-1].step} is the newest: the next restore goes back to step {staying[-1].step}, and the work "
            "since then is lost"
        )
    elif newest in lost:
        said.append(
            f"step {newest[1]} is the newest, and its objects may be whole: a backup of its manifest has it back"
        )
    said += [
        f"the job that runs now went on from step {one.step}, and has saved nothing since: stopped before its first "
        "save, it cannot go on from there again"
        for one in going
        if one.order in in_use
    ]
    return said
