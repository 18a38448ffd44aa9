"""Say who writes to a root, and which of its checkpoints are one job's line of history.

    claim     epochs/NNN.json created, above every claim and every prefix   ──▶ older epochs are fenced
    fence     one listing: nobody claimed a newer epoch, and our own claim is still there and still ours
    mark      beside the claims: this root has held a checkpoint; or all up to an epoch was deleted on purpose
    Line      what a job committed itself, and the checkpoints that led to the one that it went on from

A line may lead through two roots of one job, whose epochs grow over both. Any thread may enter.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self, get_args

import msgspec

from cloudckpt.errors import (
    FencedError,
    ManifestError,
    ObjectExistsError,
    ObjectNotFoundError,
    OptionsError,
    StorageError,
)
from cloudckpt.format import (
    EPOCH_LIMIT,
    EPOCHS_PREFIX,
    FORMAT_VERSION,
    EpochClaim,
    EpochMark,
    decode_claim,
    epoch_key,
    mark_key,
    marked_epoch,
    parse_epoch_key,
)
from cloudckpt.store import ObjectInfo, Store, one_deadline

__all__ = ["Claims", "Line", "highest_claim", "leading_to"]

logger = logging.getLogger(__name__)

_CLAIM_LIMIT_BYTES = 64 << 10
# So that a claim keeps below its limit, whatever a root holds.
_LINKS = 1_000


@dataclass(frozen=True, slots=True)
class Line:
    """A line of history: of each epoch in it, the checkpoints up to a step.

    Attributes:
        steps: epoch → the last step of it that belongs to the line.
    """

    steps: Mapping[int, int] = field(default_factory=dict)

    def holds(self, order: tuple[int, int]) -> bool:
        """Tell whether the checkpoint of that (epoch, step) is one of the line."""
        epoch, step = order
        return step <= self.steps.get(epoch, -1)

    def joined(self, other: Line) -> Line:
        """Return both lines as one."""
        epochs = {*self.steps, *other.steps}
        return Line({epoch: max(self.steps.get(epoch, -1), other.steps.get(epoch, -1)) for epoch in epochs})

    def links(self, epochs: Collection[int] | None) -> list[tuple[int, int]]:
        """Return (step, epoch) of the newest of those epochs (None: of all), the newest first, as a claim has them."""
        known = self.steps if epochs is None else self.steps.keys() & set(epochs)
        return [(self.steps[epoch], epoch) for epoch in sorted(known, reverse=True)[:_LINKS]]

    @classmethod
    def of(cls, links: Collection[tuple[int, int]]) -> Self:
        """Return the line of what a claim has, as (step, epoch)."""
        return cls({epoch: step for step, epoch in links})


@dataclass(slots=True)
class _Own:
    """A claim of ours: its bytes, and when the store wrote it, by its listings; None before one was compared."""

    data: bytes
    nonce: str
    seen_s: float | None = None


@dataclass(slots=True)
class _Known:
    """What a job knows of the epochs of one root.

    Attributes:
        own: the claims of its own.
        nonces: of claims that were looked for.
        seen: the highest epoch that it has seen there, claimed or in a prefix, and whether it has looked for all.
        marked: the highest epoch of which it is marked that it has committed something.
        emptied: the highest epoch of which it is marked that nothing was left up to it.
    """

    own: dict[int, _Own] = field(default_factory=dict)
    nonces: dict[int, str] = field(default_factory=dict)
    seen: tuple[int, bool] = (0, False)
    marked: int = 0
    emptied: int = 0


class Claims:
    """The epochs of one root."""

    def __init__(self, store: Store) -> None:
        """Wrap `store`, which stays the caller's to close."""
        self._store = store
        self._known = _Known()

    def with_store(self, store: Store) -> Claims:
        """Return these over another way to the same objects; what is claimed or seen by one, both know."""
        other = Claims(store)
        other._known = self._known
        return other

    @property
    def seen(self) -> int:
        """The highest epoch that was ever seen here, also if it is gone since; 0 if none was. No request.

        A root may be out of reach when a new epoch has to be above all of its own.
        """
        return self._known.seen[0]

    @property
    def has_looked(self) -> bool:
        """Whether all epochs were looked for, at some time."""
        return self._known.seen[1]

    def note(self, epochs: Iterable[int], *, are_all: bool = False) -> None:
        """Note of which epochs something stands here; all of which anything does, if that is so."""
        self._known.seen = max([self.seen, *epochs]), self.has_looked or are_all

    @property
    def marked(self) -> int:
        """The highest epoch of which a mark says that it has committed something, by the last listing; 0 if none."""
        return self._known.marked

    @property
    def emptied(self) -> int:
        """The highest epoch up to which everything was deleted by `delete`, by the last listing; 0 if it never was."""
        return self._known.emptied

    def mark_committed(self, epoch: int) -> None:
        """Mark, once for the root, that something was committed: its absence is a loss from then on, no fresh start.

        No request where a listing has shown such a mark, as that of the fence before a commit does.
        """
        if self.marked <= self.emptied:
            self._mark("committed", epoch)
            self._known.marked = max(self.marked, epoch)

    def mark_emptied(self) -> None:
        """Mark that all that was committed so far is deleted on purpose. Where nobody has claimed, nothing is."""
        if highest := self.highest():
            self._mark("emptied", highest)
            self._known.emptied = highest

    def _mark(self, mark: EpochMark, epoch: int) -> None:
        with suppress(ObjectExistsError):
            self._store.create(mark_key(mark, epoch), b"\n")

    def highest(self) -> int:
        """Return the highest epoch that anybody claimed, 0 if nobody did. One listing."""
        return highest_claim(self._listed())

    def epochs(self) -> list[int]:
        """Return all epochs that are claimed, the newest first. One listing."""
        return sorted(filter(None, map(parse_epoch_key, self._listed())), reverse=True)

    def claim(
        self, *, above: int = 0, resumed_from: tuple[int, int] | None = None, links: Sequence[tuple[int, int]] = ()
    ) -> int:
        """Claim the next epoch, so that every older writer is fenced, and return it.

        Two jobs that claim at once get different epochs; the higher one wins.

        Args:
            above: what is taken though nobody claimed it here, and all below.
            resumed_from: (step, epoch) of the checkpoint that the job went on from.
            links: its line of history.

        Raises:
            OptionsError: the highest epoch that keys can hold is taken.
        """
        highest = self.highest()
        epoch = max(highest, above) + 1
        while True:
            if epoch >= EPOCH_LIMIT:
                what = epoch_key(highest) if highest >= above else f"step-…-e{above}/"
                raise OptionsError(
                    f"no epoch is left for this job: {what} stands at {self._store.url}, which no job has claimed; see "
                    "what it is and remove it, or choose another root"
                )
            claim = EpochClaim(
                format_version=FORMAT_VERSION,
                epoch=epoch,
                nonce=secrets.token_hex(8),
                created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                host=platform.node(),
                pid=os.getpid(),
                resumed_from=resumed_from,
                line=list(links) or msgspec.UNSET,
            )
            data = claim.encode()
            try:
                self._store.create(epoch_key(epoch), data)
            except ObjectExistsError:
                epoch += 1
                continue
            self._known.own[epoch] = _Own(data, claim.nonce)
            self.note([epoch])
            logger.info("claimed epoch %d of %s", epoch, self._store.url)
            return epoch

    @one_deadline()
    def fence(self, epoch: int) -> None:
        """Raise `FencedError` if a newer epoch than `epoch` was claimed, or if a claim of ours is gone. One listing.

        Without a claim nobody knows of this job, and another one would take the same epoch.
        """
        found = self._listed()
        highest = highest_claim(found)
        if highest > epoch:
            raise FencedError(
                f"epoch {highest} has claimed {self._store.url}{self._claimed_by(highest)}, and this job writes as "
                f"epoch {epoch}; stop this job, or start it again to take over: a new manager does, a restore with "
                "this one does not"
            )
        own = self._known.own.get(epoch)
        if own is not None:
            self._check_own(epoch, own, found.get(epoch_key(epoch)))

    def _check_own(self, epoch: int, own: _Own, info: ObjectInfo | None) -> None:
        if info is not None and info.modified_s == own.seen_s:
            return
        key = epoch_key(epoch)
        try:
            data = self._store.read(key, limit_bytes=_CLAIM_LIMIT_BYTES)
        except ObjectNotFoundError as exc:
            raise FencedError(
                f"the claim of this job, {key}, is gone from {self._store.url}, so that it may not write there any "
                f"more; see what removes objects below {EPOCHS_PREFIX} (a lifecycle rule?), and start this job again"
            ) from exc
        if data != own.data:
            raise FencedError(
                f"epoch {epoch} of {self._store.url} is another job's{self._claimed_by(epoch)}: the claim of this one "
                f"was removed; see what removes objects below {EPOCHS_PREFIX}, and stop this job, or start it again to "
                "take over"
            )
        if info is not None:
            own.seen_s = info.modified_s

    def _listed(self) -> Mapping[str, ObjectInfo]:
        found = {info.key: info for info in self._store.list(EPOCHS_PREFIX).objects}
        self.note([highest_claim(found)], are_all=True)
        self._known.marked = max(self.marked, marked_epoch("committed", found))
        self._known.emptied = max(self.emptied, marked_epoch("emptied", found))
        return found

    def _claimed_by(self, epoch: int) -> str:
        """Describe the claimer for people; a claim that cannot be read does not hide the fence."""
        claim = self.read(epoch)
        return "" if claim is None else f" (host {claim.host!r}, process {claim.pid}, at {claim.created_at})"

    def own_nonce(self, epoch: int) -> str:
        """Return the nonce of our own claim of an epoch; "" if it is not ours. No request."""
        own = self._known.own.get(epoch)
        return "" if own is None else own.nonce

    def nonce_of(self, epoch: int) -> str:
        """Return the nonce of an epoch's claim, "" if none can be read. One request for each that is not ours, once.

        It tells what was saved below this root in that epoch from what was copied there.
        """
        if epoch not in self._known.nonces:
            claim = None if self.own_nonce(epoch) else self.read(epoch)
            self._known.nonces[epoch] = self.own_nonce(epoch) if claim is None else claim.nonce
        return self._known.nonces[epoch]

    def copy_from(self, other: Claims) -> None:
        """Create the claims and marks of another root here, byte for byte, the oldest first; what is here stays.

        Its history is this one's from then on. Call when what it holds was copied here: a claim tells of checkpoints,
        and where it is before them they count as lost.

        Raises:
            FencedError: an epoch is another job's here.
        """
        here, there = self._listed(), other._listed()
        for epoch in sorted(filter(None, map(parse_epoch_key, there))):
            key = epoch_key(epoch)
            data = other._store.read(key, limit_bytes=_CLAIM_LIMIT_BYTES)
            if key not in here:
                with suppress(ObjectExistsError):
                    self._store.create(key, data)
                    self._known.nonces.pop(epoch, None)
                    continue
            self.refuse_conflict(epoch, [decode_claim(data, key=key).nonce])
        for mark in get_args(EpochMark):
            epoch = marked_epoch(mark, there)
            if epoch and mark_key(mark, epoch) not in here:
                self._mark(mark, epoch)
        self._listed()

    def refuse_conflict(self, epoch: int, nonces: Collection[str]) -> None:
        """Refuse to take checkpoints in of an epoch that is another job's here. One request.

        Args:
            epoch: of the checkpoints.
            nonces: of the claims by which they were written, where they come from.

        Raises:
            FencedError: it is: they would hide what that job saves, and nobody could tell the two histories apart.
        """
        claim = self.read(epoch)
        if claim is not None and claim.nonce not in nonces:
            raise FencedError(
                f"epoch {epoch} of {self._store.url} is another job's{self._claimed_by(epoch)}, and checkpoints of the "
                "same epoch of another root would be mixed with its own; copy them to another root"
            )

    def read(self, epoch: int) -> EpochClaim | None:
        """Return the claim of an epoch; None if there is none, or none that can be read."""
        if not epoch:
            return None
        key = epoch_key(epoch)
        try:
            return decode_claim(self._store.read(key, limit_bytes=_CLAIM_LIMIT_BYTES), key=key)
        except ObjectNotFoundError:
            return None
        except (StorageError, ManifestError) as exc:
            logger.warning("the claim %s of %s cannot be read: %s", key, self._store.url, exc)
            return None


def leading_to(link: tuple[int, int], claims: Sequence[Claims], *, since: int) -> Line:
    """Return the line that leads to a checkpoint, from epoch `since` on; it ends where no claim can be read.

    A claim tells the whole of it; one of before that was so tells one link.

    Args:
        link: (step, epoch) of the checkpoint.
        claims: of all roots that the line may lead through.
        since: the oldest epoch of which anything stands.
    """
    steps: dict[int, int] = {}
    following: tuple[int, int] | None = link
    while following is not None and following[1] >= since:
        step, epoch = following
        steps[epoch] = step
        claim = next((found for one in claims if (found := one.read(epoch)) is not None), None)
        if claim is None:
            break
        if claim.line:
            return Line(steps).joined(Line.of(claim.line))
        following = claim.resumed_from if claim.resumed_from and claim.resumed_from[1] < epoch else None
    return Line(steps)


def highest_claim(keys: Collection[str]) -> int:
    """Return the highest epoch that is claimed by any of these keys, 0 if none is."""
    return max((parse_epoch_key(key) or 0 for key in keys), default=0)
