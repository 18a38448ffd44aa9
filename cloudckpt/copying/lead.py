"""Lead a copy: which checkpoints, to which places, what stands in the way; one after the other, the oldest first.

    sources ──▶ checkpoints, their places in the target ──▶ all refusals, before the first byte
            ──▶ each: `Copier` ──▶ its pin            of a whole root, once something stands there: ──▶ claims and marks

A checkpoint keeps its bytes, its attempt, and below a root its prefix; so it is the same checkpoint in the target, and
has one place there. Knows catalogs; that one checkpoint is damaged keeps no other one of a root from its copy.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from urllib.parse import unquote_to_bytes

from cloudckpt.copying.copier import Copied, Copier
from cloudckpt.copying.places import Place, is_of_one_object, opened, split_step
from cloudckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CloudCkptError,
    FormatVersionError,
    IntegrityError,
    ManifestError,
    OptionsError,
    StorageError,
)
from cloudckpt.format import checkpoint_prefix, parse_checkpoint_prefix, step_number
from cloudckpt.options import Options
from cloudckpt.report import Progress, Show
from cloudckpt.root import Catalog, Checkpoint, Target, copy_pin, refuse_nested
from cloudckpt.saving import made
from cloudckpt.store import open_store, probe_create
from cloudckpt.transfer import Gauge, Slabs

__all__ = ["copy", "copy_places"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What of the sources is copied, and to what.

    Attributes:
        steps: of a root; none: its newest.
        is_all: all that is committed in a root, and its claims.
        takes_pins: what is pinned in the source is pinned in the target, too.
        is_own_url: the target becomes the one checkpoint itself.
        checks: what stands in the target is read back.
    """

    steps: tuple[int, ...] = ()
    is_all: bool = False
    takes_pins: bool = False
    is_own_url: bool = False
    checks: bool = False


def copy(  # noqa: PLR0913 (keyword-only, each of its own kind)
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    steps: Sequence[int] = (),
    every: bool = False,
    pins: bool | None = None,
    own_url: bool = False,
    check: bool = False,
    storage_options: Mapping[str, object] | None = None,
    target_storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    target_engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    progress: Show = "auto",
    every_s: float = math.inf,
    on_copied: Callable[[Copied], None] = lambda _: None,
) -> tuple[Copied, ...]:
    """Copy checkpoints between any two stores: the same bytes, verified on the way, the manifest last.

    May be repeated, also after a kill: what stands in the target with its size is not sent again, and a checkpoint that
    is committed there is not looked at. Until one is committed nobody sees anything of it; what is left of a copy that
    nobody repeats goes with the sweep of the target's root.

    Shards that another checkpoint of the source's root holds (`reuse_unchanged`) stay references where that stands in
    the target, too, and are sent once where several are copied together; a lone copy holds all of them itself.

    Args:
        sources: checkpoints, or roots, of which the newest is meant.
        target: a root: each checkpoint keeps its prefix there. What was saved outside of a root has none, and goes to
            the URL itself.
        steps: these steps of the source, which is a root.
        every: all that is committed in the source, oldest first, its names, and its claims, so that its history is the
            target's: there jobs go on, and rules count, as they would in the source. Without claims the target's jobs
            take what was copied for another line, of which their rules remove nothing. Repeated, it brings what is new.
            What stands there by its pin alone is committed there. One that is damaged is passed over, and raised at the
            end; so is one in whose place in the target stands what nobody can read, or what a sweep has decided.
        pins: pin in the target what is pinned in the source, by the same note and time; a pin that is there stays.
            None: where `every` is given, since what is pinned is a matter of a root, as claims are.
        own_url: make the target the checkpoint itself; it keeps step and epoch, which say where it was saved.
        check: read back what stands in the target, also of committed ones, and send what differs.
        storage_options: fsspec's own options for the sources.
        target_storage_options: the same for the target.
        engine: what moves the bytes of the sources, as for `save`.
        target_engine: the same for the target.
        options: sizes, parallelism, patience. Without `memory_budget_bytes` 512 MiB are held for what is in flight,
            by a target that takes a shard as fast as one is read a part of them.
        progress: `bar` or `auto` show a bar on a terminal.
        every_s: where no bar is shown, a line every so many seconds.
        on_copied: is told of each as soon as it is committed.

    Returns:
        What stands in the target now, in the order of the copies.

    Raises:
        OptionsError: what is asked for contradicts itself, or a checkpoint cannot stand where it is to go.
        CheckpointNotFoundError: nothing is committed there, or it was removed while it was copied.
        CheckpointExistsError: another checkpoint stands in its place; it was not changed.
        FencedError: its epoch is another job's in the target.
        IntegrityError: it is not whole in the source; so it is not in the target. Or, of a whole root: of one nobody
            can read what stands in its place.
        StorageError: a store could not be read or written. In each case what is committed in the target is whole.
    """
    chosen = Options.of(options)
    selection = Selection(
        steps=tuple(map(step_number, steps)),
        is_all=every,
        takes_pins=every if pins is None else pins,
        is_own_url=own_url,
        checks=check,
    )
    many = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not many:
        raise OptionsError("no source is given; give the URL of a checkpoint or of a root")
    if steps and every:
        raise OptionsError("steps and every are both given; give one of them")
    if pins and own_url:
        raise OptionsError("pins and own_url are both given, and a checkpoint at a URL of its own has no pin")
    root, prefix = split_step(target)
    with ExitStack() as stack:
        places = [
            stack.enter_context(opened(url, storage_options=storage_options, engine=engine, options=chosen))
            for url in many
        ]
        store = stack.enter_context(
            open_store(root, storage_options=target_storage_options, engine=target_engine, options=chosen)
        )
        bar = stack.enter_context(Progress(progress).bar("copying", rank=0, every_s=every_s))
        return copy_places(places, Place(Catalog(store), prefix), selection, chosen, bar, on_copied)


@dataclass(frozen=True, slots=True)
class _Job:
    """One checkpoint that is to be copied.

    Attributes:
        source: the catalog that has it.
        checkpoint: which.
        prefix: where it goes in the target.
        is_there: whether it is committed there already.
        is_pinned: whether its pin goes there, too, and is not there already.
    """

    source: Catalog
    checkpoint: Checkpoint
    prefix: str
    is_there: bool
    is_pinned: bool


def copy_places(
    places: Sequence[Place],
    target: Place,
    selection: Selection,
    options: Options,
    gauge: Gauge,
    on_copied: Callable[[Copied], None] = lambda _: None,
) -> tuple[Copied, ...]:
    """Copy from places that are open to one that is; as `copy`, which opens them."""
    chosen = _found(places, selection)
    damaged = chosen.errors
    jobs, blocked = _planned(chosen, target, selection)
    gauge.begin(sum(job.checkpoint.total_bytes for job in jobs))
    done: list[Copied] = []
    at: _Job | None = None
    kept = Slabs()
    try:
        if not all(job.is_there for job in jobs):
            probe_create(target.catalog.store, single_writer=options.single_writer)
        for job in jobs:
            copier = Copier(
                source=job.source,
                target=target.catalog,
                options=options,
                checks=selection.checks,
                gauge=gauge,
                # What is read back takes the memory that slabs would keep.
                slabs=Slabs() if selection.checks else kept,
                is_one_of_several=len(jobs) > 1,
            )
            at = job
            try:
                copied = _copied(copier, job)
            except (IntegrityError, CheckpointNotFoundError) as exc:
                if not selection.is_all:
                    raise
                logger.warning("%s; the others are copied all the same", exc)
                if isinstance(exc, IntegrityError):
                    damaged.append(exc)
                continue
            done.append(copied)
            at = None
            on_copied(copied)
        if selection.is_all and done:
            for place in places:
                target.catalog.claims.copy_from(place.catalog.claims)
                _copy_names(place.catalog, target.catalog, {job.prefix for job in jobs})
    except (CloudCkptError, KeyboardInterrupt) as exc:
        is_there = isinstance(exc, KeyboardInterrupt) and at is not None and _is_made(target, at, options)
        exc.add_note(
            f"{len(done) + is_there} of {len(jobs)} checkpoints are in the target; what else was sent stays there, "
            "and the same command goes on from it"
        )
        raise
    if damaged or blocked:
        raise _lacking(len(done), damaged, blocked)
    return tuple(done)


def _is_made(target: Place, job: _Job, options: Options) -> bool:
    """Tell by a look whether a checkpoint stands that was being copied when a person interrupted."""
    goal = Target(catalog=target.catalog, prefix=job.prefix)
    return job.is_there or made(goal, job.checkpoint.attempt, options) is not None


def _lacking(done: int, damaged: Sequence[CloudCkptError], blocked: Sequence[CloudCkptError]) -> CloudCkptError:
    """Return the error that says which checkpoints of a root are not in the target."""
    whys = (
        (damaged, "they are not whole in the source, or cannot be read there"),
        (blocked, "of what stands in their place in the target"),
    )
    told = [f"{len(errors)} are not, because {why}; the first: {errors[0]}" for errors, why in whys if errors]
    text, first = "; ".join([f"{done} checkpoints are in the target", *told]), [*damaged, *blocked][0]
    is_taken = all(isinstance(one, CheckpointExistsError) for one in (*damaged, *blocked))
    error = CheckpointExistsError(text) if is_taken else IntegrityError(text, key=getattr(first, "key", ""))
    error.__cause__ = first
    return error


def _copy_names(source: Catalog, target: Catalog, prefixes: Collection[str]) -> None:
    """Give the names in the target that checkpoints have in the source; of one that is not there it says nothing."""
    for one in source.pins.held().names:
        if one.prefix in prefixes:
            target.pins.give(one)


def _copied(copier: Copier, job: _Job) -> Copied:
    copied = copier.copy(job.checkpoint, job.prefix, is_there=job.is_there)
    if not job.is_pinned:
        return copied
    # Beside its checkpoint, and not after all of them: from now on rules of a job at work there may see it.
    return replace(copied, is_pinned=copy_pin(job.source, copier.target, job.checkpoint))


# -- what goes where, and what stands in the way --------------------------------------------------------------------


_Goals = list[tuple[Catalog, Checkpoint]]


@dataclass(frozen=True, slots=True)
class _Sources:
    """What the sources have.

    Attributes:
        found: what is to be copied.
        errors: why what should be cannot.
        pinned: the prefixes of all that is pinned, of each source, where that matters.
    """

    found: _Goals
    errors: list[IntegrityError | StorageError]
    pinned: dict[Catalog, set[str]]


def _found(places: Sequence[Place], selection: Selection) -> _Sources:
    chosen = _Sources([], [], {})
    for place in places:
        catalog = place.catalog
        if selection.is_all:
            _add_all(place, chosen)
            continue
        several = place.steps(selection.steps) if selection.steps else [place.one()]
        chosen.found.extend((catalog, one) for one in several)
        if selection.takes_pins:
            chosen.pinned[catalog] = catalog.pins.prefixes()
    return chosen


def _add_all(place: Place, chosen: _Sources) -> None:
    catalog, there = place.catalog, place.all()
    if not (there.checkpoints or there.unreadable):
        lost = None if place.prefix else catalog.lost()
        raise lost or OptionsError(
            f"{catalog.store.url.removesuffix('/')}/{place.prefix} is no root with checkpoints, so that there is no "
            "whole of it to copy; give the URL of a root, or leave that out"
        )
    chosen.pinned[catalog] = set(there.pinned)
    chosen.found.extend((catalog, one) for one in there.checkpoints)
    chosen.errors.extend(one.error for one in there.unreadable)


def _planned(chosen: _Sources, target: Place, selection: Selection) -> tuple[list[_Job], list[CloudCkptError]]:
    """Return what goes where, and of a whole root, why others have no way to their place.

    Every refusal comes from here, before anything is written.
    """
    is_alone = len(chosen.found) == 1
    goals = [(source, one, _place_of(one, target, selection, is_alone=is_alone)) for source, one in chosen.found]
    listed = {"", *target.catalog.places()}
    _refuse_target(target, {goal for _, _, goal in goals}, has_steps=len(listed) > 1)
    survey = target.catalog.survey().checkpoints if len(goals) > 1 else ()
    known = {one.prefix: one for one in survey if not target.catalog.stands_by_pin(one.prefix)}
    pinned = chosen.pinned if selection.takes_pins else {}
    if any(pinned.values()):
        pinned_there = target.catalog.pins.prefixes()
        pinned = {source: prefixes - pinned_there for source, prefixes in pinned.items()}
    jobs: dict[str, _Job] = {}
    blocked: dict[str, CloudCkptError] = {}
    for source, checkpoint, goal in goals:
        _refuse_itself(source, checkpoint, target.catalog, goal)
        before = jobs.get(goal)
        if before is not None and before.checkpoint.digest != checkpoint.digest:
            raise OptionsError(
                f"{before.checkpoint.url} and {checkpoint.url} are two checkpoints of one place; copy them to two roots"
            )
        if before is not None and before.is_pinned:
            continue
        try:
            there = known.get(goal) or (_standing(target.catalog, goal) if goal in listed else None)
        except (CheckpointExistsError, ManifestError, StorageError) as exc:
            if not selection.is_all or (isinstance(exc, StorageError) and not is_of_one_object(exc)):
                raise
            if goal not in blocked:
                logger.warning("%s; the others are copied all the same", exc)
            blocked.setdefault(goal, exc)
            continue
        is_there = there is not None
        if there is None and goal and goal in listed and (by_pin := target.catalog.pinned(goal)) is not None:
            # It has lost its manifest; the copy of another one would take its place.
            there = by_pin[0]
        if there is not None and there.digest != checkpoint.digest:
            raise CheckpointExistsError(
                f"another checkpoint is committed at {there.url} (attempt {there.attempt}, {there.created_at:%F %T} "
                f"UTC), and nothing was copied; it was not changed. Copy {checkpoint.url} to another place, or remove "
                "that one first"
            )
        jobs[goal] = _Job(source, checkpoint, goal, is_there, goal in pinned.get(source, ()))
    _refuse_conflicts([job for job in jobs.values() if job.prefix and not job.is_there], target.catalog)
    return list(jobs.values()), list(blocked.values())


def _place_of(checkpoint: Checkpoint, target: Place, selection: Selection, *, is_alone: bool) -> str:
    """Return the prefix that a checkpoint has in the target."""
    step = checkpoint.manifest.step
    own = "" if step is None else checkpoint_prefix(step, checkpoint.epoch)
    if target.prefix and own != target.prefix:
        raise OptionsError(
            f"{checkpoint.url} is {f'step {step} of epoch {checkpoint.epoch}' if own else 'of no step'}, and at "
            f"{target.prefix.rstrip('/')} every reader would refuse it; give the target's root"
        )
    if (selection.is_own_url or not own) and not target.prefix:
        if not is_alone:
            raise OptionsError(
                f"several checkpoints cannot become one URL ({target.catalog.store.url}): copy them one by one"
                if selection.is_own_url
                else f"{checkpoint.url} was saved outside of a root, so that it has no place in one; copy it by itself"
            )
        return ""
    return own


def _refuse_target(target: Place, goals: set[str], *, has_steps: bool) -> None:
    """Refuse a root that is a checkpoint, a checkpoint that would be a root, and what is below a step."""
    url = target.catalog.store.url
    refuse_nested(url, is_root="" not in goals)
    is_taken = target.catalog.is_taken("")
    if is_taken and has_steps:
        raise CheckpointExistsError(
            f"{url} is a checkpoint itself, and a root with steps as well, of which readers take the one or the other; "
            "it was not changed. Give another URL, and copy from there what you need"
        )
    if "" not in goals and is_taken:
        raise CheckpointExistsError(
            f"{url} is a checkpoint itself, and no root; it was not changed. Give the URL of a root, or for one "
            "checkpoint a URL of its own (own_url=True, --own-url)"
        )
    if "" in goals and has_steps:
        raise CheckpointExistsError(
            f"{url} is a root with steps, and cannot become a checkpoint itself; give a URL of its own"
        )


def _standing(target: Catalog, prefix: str) -> Checkpoint | None:
    """Return what is committed in the target's place.

    Raises:
        CheckpointExistsError: a sweep has decided that nothing ever is.
        ManifestError: what stands there cannot be read.
    """
    try:
        return target.open(prefix)
    except FormatVersionError:
        raise
    except ManifestError as exc:
        # Whose it was, nobody can say any more; so it is not for a copy to take it away.
        url = target.store.url
        place, advice = url, "give another URL, or remove what stands there first"
        if prefix:
            place = f"{url.removesuffix('/')}/{prefix.rstrip('/')}"
            step = (parse_checkpoint_prefix(prefix) or (-1, 0))[0]
            advice = f"remove it there (`cloudckpt rm {url} {step}`), and copy again"
        raise ManifestError(
            f"what stands at {place}, in the target, cannot be read and was not changed ({exc}); {advice}",
            key=exc.key,
        ) from exc
    except CheckpointNotFoundError:
        if prefix and target.is_void(prefix):
            raise CheckpointExistsError(
                f"a sweep of {target.store.url} has decided that {prefix} is never committed, because a copy or save "
                f"there was cut off long ago; copy to another root, or remove {prefix} first"
            ) from None
        return None


def _refuse_itself(source: Catalog, checkpoint: Checkpoint, target: Catalog, prefix: str) -> None:
    there = f"{target.store.url.removesuffix('/')}/{prefix}".rstrip("/")
    if source.store.endpoint == target.store.endpoint and _real(checkpoint.url) == _real(there):
        raise OptionsError(f"{checkpoint.url} would be copied to itself; give another target")


def _real(url: str) -> str | bytes:
    """Return what two URLs of one place have in common: on a disk links may lead there."""
    path = url.removeprefix("file://")
    return url.rstrip("/") if path == url else os.path.realpath(unquote_to_bytes(path))


def _refuse_conflicts(jobs: Sequence[_Job], target: Catalog) -> None:
    """Refuse checkpoints of epochs that other jobs have in the target."""
    for epoch, source, claims in _by_epoch(jobs):
        target.claims.refuse_conflict(epoch, [*claims, source.claims.nonce_of(epoch)])


def _by_epoch(jobs: Sequence[_Job]) -> Iterator[tuple[int, Catalog, list[str]]]:
    for key in dict.fromkeys((job.checkpoint.epoch, job.source) for job in jobs):
        claims = [job.checkpoint.manifest.claim for job in jobs if (job.checkpoint.epoch, job.source) == key]
        yield key[0], key[1], claims
