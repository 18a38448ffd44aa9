"""Say whose turn an export to a place is, which files there are whose, and what became of one that ended early.

    a mark with a nonce (create) ──▶ files, each once the mark is seen to be ours still ──▶ the deciding one
                                          ──▶ the mark once more ──▶ what is left of an older export, then the mark

Who finds another's mark is refused; or takes it over, if it may replace, and the other one ends before its next file.
That one may still be at work, and its last file under way: so all but the last of several files have names that no
other export ever has, and none removes those of one that may be alive. Whichever last file comes last then names files
that are there. A mark and the file after it are two requests, and between them a store knows no order. Any thread may
enter.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from cloudckpt.convert.places import LEAVING_S, info_of, objects_in
from cloudckpt.convert.planned import Plan
from cloudckpt.deadline import Deadline
from cloudckpt.errors import (
    CommitUnknownError,
    ConflictError,
    CreateNotEnforcedError,
    ObjectExistsError,
    ObjectNotFoundError,
    OptionsError,
    RetryExhaustedError,
    StorageError,
    TransientError,
)
from cloudckpt.format import SUMS_SUFFIX, moment_of
from cloudckpt.store import ObjectInfo, RetryingStore
from cloudckpt.transfer import AbandonedError

__all__ = ["MARK", "Hold", "held"]

logger = logging.getLogger(__name__)

MARK = ".cloudckpt-export"
"""How the name of a mark ends; a folder's has no other part."""

# A mark names its owner, and, below, those that it took the place of, which may still be at work: the last of them.
_NONCES = 64
_NONCE = re.compile(r"[0-9a-f]{32}")
_LIMIT_BYTES = 4096
_TAG_DIGITS = 8
_SHOWN = 4
_OVER = "(overwrite=True, --force)"


def held(url: str, mark: str, info: ObjectInfo | None) -> OptionsError:
    """Return the error for a place with a mark of another export; without `info` it has just gone."""
    since = "" if info is None else moment_of(info.modified_s).isoformat(" ", timespec="seconds")
    return OptionsError(
        f"another export to {url} is under way, or was killed, and nothing was written: its mark {mark} is there"
        f"{since and f' since {since}'}. Wait for it; or where nobody writes there any more, take its place "
        f'{_OVER[:-1]}, exists="replace" of a CloudHFWriter)'
    )


class Hold:
    """One export's hold on a place."""

    def __init__(self, store: RetryingStore, name: str, mark: str, *, is_replacing: bool) -> None:
        """Hold nothing yet.

        Args:
            store: of the folder.
            name: of the file in it, "" for all of it.
            mark: the name of the mark, the same for all exports that could write or remove one of each other's files.
            is_replacing: whether what is there may be replaced, and another one's place taken over.
        """
        self._store, self._is_replacing = store, is_replacing
        self._url = f"{store.url}/{name}" if name else store.url
        self._mark, self._nonce = mark, secrets.token_hex(16)
        self._is_ended = self._is_lost = False
        self._why: BaseException | None = None  # it ended, where one file failed
        self._at_work = 0
        self._changed = threading.Condition()
        # Names of another export that stand there; of ours those that may stand there, with the text of the short ones,
        # and those that do; the nonces of exports whose place was taken over.
        self._old: Sequence[str] = ()
        self._begun: dict[str, bytes | None] = {}
        self._stood: set[str] = set()
        self._rivals: Sequence[str] = ()
        # The file that makes the export, and names that would; what stood there before.
        self._last, self._deciding, self._beginning = "", frozenset[str](), ""
        self._before: ObjectInfo | None = None

    @property
    def tag(self) -> str:
        """What is in the names of files that this export alone may have: eight hexadecimal digits."""
        return _tag_of(self._nonce)

    @contextmanager
    def of(self, plan: Plan) -> Iterator[None]:
        """Hold the place while what is planned is written.

        What was there before goes once the block has ended without an error. One that is raised gets a note of what is
        there then.

        Raises:
            OptionsError: the place has an export, or another one is under way; nothing was written.
            ConflictError: another one has taken over.
        """
        self._last, self._deciding, self._beginning = plan.files[-1], plan.deciding, plan.beginning
        self._refuse_taken(plan, is_held=False)
        try:
            self._take()
            self._old = self._refuse_taken(plan, is_held=True)
            yield
            self._refuse_lost()
            self._remove_old(plan)
            self._let_go()
            self._tell_left(plan)
        except BaseException as exc:
            told, is_settled = self._end(plan)
            exc.add_note(told)
            if is_settled:
                self._let_go(self._rivals)  # who had the place may be at work still, and has it again
            raise

    def _refuse_taken(self, plan: Plan, *, is_held: bool) -> list[str]:
        """Return which files of an export, or their sums, are there and of nobody at work, if they may be replaced."""
        there = objects_in(self._store, plan.beginning)
        names = [name for name in there if _is_of(plan, name.removesuffix(SUMS_SUFFIX)) and not self._is_rivals(name)]
        if names and not self._is_replacing:
            info = None if is_held else info_of(self._store, self._mark)
            raise taken(self._store.url, names) if info is None else held(self._url, self._mark, info)
        return names

    def _take(self) -> None:
        """Put the mark there."""
        nonces = [self._nonce]
        try:
            self._store.create(self._mark, self._nonce.encode())
        except ObjectExistsError as exc:
            if not self._is_replacing:
                raise held(self._url, self._mark, info_of(self._store, self._mark)) from exc
            logger.warning("another export to %s, which has not ended, is taken over", self._url)
            nonces += [one for one in self._marked(self._store) if _NONCE.fullmatch(one)]
            self._rivals = nonces[1:]
            self._put_mark(nonces[:_NONCES])
        except CreateNotEnforcedError:  # as good as it can be there
            self._put_mark(nonces)

    def _put_mark(self, nonces: Sequence[str], store: RetryingStore | None = None) -> None:
        (store or self._store).put(self._mark, [memoryview("\n".join(nonces).encode())])

    def _marked(self, store: RetryingStore) -> list[str]:
        """Return the nonces in the mark that is there, its owner's first."""
        try:
            return store.read(self._mark, limit_bytes=_LIMIT_BYTES).decode(errors="replace").splitlines()
        except ObjectNotFoundError:
            return []

    def _is_ours(self, store: RetryingStore) -> bool:
        return self._marked(store)[:1] == [self._nonce]

    def _refuse_lost(self) -> None:
        self._is_lost = not self._is_ours(self._store)
        if self._is_lost:
            raise self._taken_over("while the last file of this one was put")

    def _is_rivals(self, name: str) -> bool:
        return any(_has(_tag_of(nonce), name) for nonce in self._rivals)

    def _taken_over(self, when: str) -> ConflictError:
        return ConflictError(
            f"another export to {self._url} has taken over {when} (its mark was replaced or removed), so that this one "
            "ended; give each a place of its own"
        )

    # -- files ----------------------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Raise why the export has ended, where it has: whichever file is asked about first, that is what is told."""
        if self._is_ended:
            raise self._why or AbandonedError(f"the export to {self._url} has ended")

    @contextmanager
    def standing(self, name: str, text: bytes | None = None) -> Iterator[Callable[[], None]]:
        """Yield what is to be called right before a file comes to stand; the block ends when it does.

        `text` is all of the file, where it is short.
        """
        with self._changed:
            self.go_on()
            self._at_work += 1
        try:
            yield lambda: self._begin(name, text)
            self._stood.add(name)
        except BaseException as exc:
            with self._changed:
                self._why = exc if self._why is None else self._why
                self._is_ended = True  # for the others at work
            raise
        finally:
            with self._changed:
                self._at_work -= 1
                self._changed.notify_all()

    def put(self, name: str, text: bytes) -> None:
        """Put one short file."""
        with self.standing(name, text) as begin:
            begin()
            if self._is_replacing:
                self._store.put(name, [memoryview(text)])
                return
            try:
                self._store.create(name, text)
            except ObjectExistsError as exc:
                raise self._others([name]) from exc
            except CreateNotEnforcedError:  # as good as it can be there
                self._store.put(name, [memoryview(text)])

    def _begin(self, name: str, text: bytes | None) -> None:
        self.go_on()
        if not self._is_ours(self._store):
            raise self._taken_over("while this one was under way")
        if name == self._last or text is not None:  # names that others have, too
            there = objects_in(self._store, self._beginning).keys() & {name, *self._deciding}
            if there and not self._is_replacing:
                raise self._others(there)
        if name == self._last:
            self._before = info_of(self._store, name)
        self._begun[name] = text

    def _others(self, names: Iterable[str]) -> ConflictError:
        return ConflictError(
            f"another program has written {', '.join(sorted(names))} in {self._store.url} while an export "
            f"to it was under way, which ended; choose another target, or replace that {_OVER}"
        )

    # -- the end --------------------------------------------------------------------------------------------------

    def _remove_old(self, plan: Plan) -> None:
        """Remove what is left of the export that was replaced, first what makes it one, and sums of other bytes."""
        names = [name for name in self._old if name not in plan.files]
        first = [name for name in names if name in plan.deciding or name.endswith(SUMS_SUFFIX)]
        self._store.delete(first)
        self._store.delete([name for name in names if name not in first])

    def _tell_left(self, plan: Plan) -> None:
        """Say what an export that was taken over has left: if it is at work still, it may need that."""
        if self._rivals:
            left = [name for name in objects_in(self._store, plan.beginning) if self._is_rivals(name)]
            if left:
                logger.warning(
                    "files of an export to %s that was taken over stay there, because it may be at work still: %s; "
                    "once it is not, remove them, or replace the export once more %s",
                    *(self._url, _some(left), _OVER),
                )

    def _end(self, plan: Plan) -> tuple[str, bool]:
        """Wait for what is under way, remove what was written in vain; say what is there, and if it stays so."""
        self._is_ended = True
        with self._changed:
            self._changed.wait_for(lambda: not self._at_work, timeout=LEAVING_S)
            is_moving = bool(self._at_work)
        store, is_settled = self._hurried(), True
        try:
            if self._is_whole(store):
                told = self._told_whole(store, plan)
            elif self._last in self._begun and _may_come(self._why):
                is_moving, is_settled = True, len(plan.files) == 1
                told = self._told_unknown()
            else:
                told = self._told(store, plan)
        except StorageError as exc:
            told = (
                f"whether an export is in {self._url} is not known, and files of this one may stay there ({exc}); "
                f"replace them by the next one {_OVER}"
            )
        return f"{told}; what was under way may still come to stand there" if is_moving else told, is_settled

    def _told_whole(self, store: RetryingStore, plan: Plan) -> str:
        there = objects_in(store, self._beginning).keys()
        gone = sorted(self._begun.keys() - there)
        if self._is_lost and self._begun[self._last] is None:
            return f"{self._url} is whole, by this export or by the one that has taken over"
        if gone:
            return f"the last file of this export is at {self._url}, but {_some(gone)} of it were removed; export again"
        left = sorted(there & set(self._old).difference(plan.files))
        beside = f", and beside it of the one before {_some(left)}: remove that" if left else ""
        return f"the export is whole at {self._url}{beside}"

    def _told_unknown(self) -> str:
        before = f"no export is in {self._url} yet" if not self._old else "the export before it is there as it was"
        stays = [name for name in self._begun if name != self._last]
        also = f", so that {_some(stays)} and the mark {self._mark} stay, for the next one to replace {_OVER}"
        return f"{before}{also if stays else ''}"

    def _told(self, store: RetryingStore, plan: Plan) -> str:
        is_ours = self._is_ours(store)
        is_old = is_ours and bool(self._old)
        before = "the export before it is there as it was" if is_old else f"nothing of this export is in {self._url}"
        replaced = [name for name in self._begun if name in self._old and name != self._last]
        also = f", but for {_some(replaced)}, which may be of the new one" if replaced else ""
        mine = [
            name
            for name, text in self._begun.items()
            # A name that others may have goes only as long as nobody else can have written it.
            if _has(self.tag, name)
            or (name not in (*self._old, self._last) and is_ours and self._is_like(store, name, text))
        ]
        if not mine:
            return f"no file was written{also}{f', and {before}' if is_old else ''}"
        store.delete(mine[::-1])
        return f"{before}{also}, and the files that were written were removed"

    def _is_whole(self, store: RetryingStore) -> bool:
        """Tell whether the deciding file stands there by us."""
        if self._last not in self._begun or (self._last in self._stood and not self._is_lost):
            return self._last in self._stood
        text = self._begun[self._last]
        return info_of(store, self._last) not in (None, self._before) and self._is_like(store, self._last, text)

    def _is_like(self, store: RetryingStore, name: str, text: bytes | None) -> bool:
        """Tell whether a short file is what we have put there; of others nobody knows."""
        there = info_of(store, name)
        if text is None or there is None or there.size_bytes != len(text):
            return text is None and there is not None
        return store.read(name, limit_bytes=len(text)) == text

    def _let_go(self, others: Sequence[str] = ()) -> None:
        """Remove the mark, or leave it to others."""
        store = self._hurried()
        try:
            if self._is_ours(store):
                self._put_mark(others, store) if others else store.delete([self._mark])
        except StorageError as exc:
            logger.warning(
                "%s stays in %s, though the export has ended, so that the next one there has to replace it %s: %s",
                *(self._mark, self._store.url, _OVER, exc),
            )

    def _hurried(self) -> RetryingStore:
        return self._store.within(Deadline.after(LEAVING_S, "the removal of what an export has written in vain"))


def taken(url: str, names: Sequence[str]) -> OptionsError:
    """Return the error for a place that holds an export."""
    return OptionsError(
        f"{url} holds {', '.join(names[:_SHOWN])} already, and nothing was written; choose another target, or replace "
        f'them {_OVER[:-1]}, exists="replace" of a CloudHFWriter)'
    )


def _tag_of(nonce: str) -> str:
    return nonce[:_TAG_DIGITS]


def _has(tag: str, name: str) -> bool:
    """Tell whether a file's name has an export's tag."""
    return f"-{tag}-" in name or f"-{tag}." in name


def _is_of(plan: Plan, name: str) -> bool:
    return name in plan.files or plan.ours.fullmatch(name) is not None


def _may_come(why: BaseException | None) -> bool:
    """Tell whether a put that has ended so may still be under way: an interrupt leaves it, and so does a deadline."""
    if isinstance(why, CommitUnknownError | RetryExhaustedError | TransientError):
        return why.may_have_landed
    return not isinstance(why, Exception)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
