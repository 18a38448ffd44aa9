"""Say whose turn an export to a place is, which files there are whose, and what became of one that ended early.

    a mark with a nonce (create) ──▶ files, each once the mark is seen to be ours still ──▶ the deciding one
                                                              ──▶ what is left of an older export, then the mark

Who finds another's mark is refused; or takes it over, if it may replace, and the other one ends before its next file.
Beside files of another export one's own have names of their own, so that neither replaces or removes the other's. A
mark and the file after it are two requests, and between them a store knows no order. Any thread may enter.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from cloudckpt.convert.places import LEAVING_S, info_of, objects_in
from cloudckpt.convert.planned import Plan
from cloudckpt.deadline import Deadline
from cloudckpt.errors import (
    CloudCkptError,
    ConflictError,
    CreateNotEnforcedError,
    ObjectExistsError,
    ObjectNotFoundError,
    OptionsError,
    StorageError,
)
from cloudckpt.store import ObjectInfo, RetryingStore
from cloudckpt.transfer import AbandonedError

__all__ = ["MARK", "Hold", "held"]

logger = logging.getLogger(__name__)

MARK = ".cloudckpt-export"
"""How the name of a mark ends; a folder's has no other part."""

_LIMIT_BYTES = 256
_SHOWN = 4
_OVER = "(overwrite=True, --force)"


def held(url: str, mark: str, info: ObjectInfo | None) -> OptionsError:
    """Return the error for a place with a mark of another export; without `info` it has just gone."""
    since = "" if info is None else datetime.fromtimestamp(info.modified_s, UTC).isoformat(" ", timespec="seconds")
    return OptionsError(
        f"another export to {url} is under way, or was killed, and nothing was written: its mark {mark} is there"
        f"{since and f' since {since}'}. Wait for it; or where nobody writes there any more, take its place "
        f'{_OVER[:-1]}, exists="replace" of a CloudHFWriter)'
    )


class Hold:
    """One export's hold on a place."""

    def __init__(self, store: RetryingStore, name: str, *, is_replacing: bool) -> None:
        """Hold nothing yet; `name` is that of the file in the store, "" for all of it."""
        self._store, self._is_replacing = store, is_replacing
        self._url = f"{store.url}/{name}" if name else store.url
        self._mark, self._nonce = f"{name}{MARK}", secrets.token_hex(16)
        self._is_ended = False
        self._why: BaseException | None = None  # it ended, where one file failed
        self._at_work = 0
        self._changed = threading.Condition()
        # Names of another export that stand there; of ours those that may stand there, and that do.
        self._old: Sequence[str] = ()
        self._begun: list[str] = []
        self._stood: set[str] = set()
        # The file that makes the export, and names that would; what stood there before, and by us, if that is short.
        self._last, self._deciding, self._beginning = "", frozenset[str](), ""
        self._before: ObjectInfo | None = None
        self._text: bytes | None = None

    @contextmanager
    def of(self, plan: Plan) -> Iterator[Plan]:
        """Hold the place while what is planned is written; yield the plan, perhaps under other names.

        What was there before goes once the block has ended without an error. One that is raised gets a note of what is
        there then.

        Raises:
            OptionsError: the place has an export, or another one is under way; nothing was written.
            ConflictError: another one has taken over.
        """
        self._know(plan)
        self._refuse_taken(plan, is_held=False)
        is_free = True
        try:
            is_free = self._take()
            self._old = self._refuse_taken(plan, is_held=True)
            if not is_free or any(plan.ours.fullmatch(name) for name in self._old):
                plan = plan.tagged(f"-{self._nonce[:8]}")
                self._know(plan)
                is_free = False
            yield plan
            self._remove_old(plan)
            self._let_go()
        except BaseException as exc:
            exc.add_note(self._end(plan, owns_names=not is_free))
            self._let_go()
            raise

    def _know(self, plan: Plan) -> None:
        self._last, self._deciding, self._beginning = plan.files[-1], plan.deciding, plan.beginning

    def _refuse_taken(self, plan: Plan, *, is_held: bool) -> list[str]:
        """Return which files of an export are there, if they may be replaced."""
        there = objects_in(self._store, plan.beginning)
        names = [name for name in there if name in plan.files or plan.ours.fullmatch(name)]
        if not self._is_replacing and not is_held and self._mark in there:
            raise held(self._url, self._mark, info_of(self._store, self._mark))
        if not self._is_replacing and names:
            raise taken(self._store.url, names)
        return names

    def _take(self) -> bool:
        """Put the mark there; tell whether there was none."""
        data = self._nonce.encode()
        try:
            self._store.create(self._mark, data)
        except ObjectExistsError as exc:
            if not self._is_replacing:
                raise held(self._url, self._mark, info_of(self._store, self._mark)) from exc
            logger.warning("another export to %s, which has not ended, is taken over", self._url)
            self._store.put(self._mark, [memoryview(data)])
            return False
        except CreateNotEnforcedError:  # as good as it can be there
            self._store.put(self._mark, [memoryview(data)])
        return True

    def _is_ours(self, store: RetryingStore) -> bool:
        try:
            return store.read(self._mark, limit_bytes=_LIMIT_BYTES) == self._nonce.encode()
        except ObjectNotFoundError:
            return False

    # -- files ----------------------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Raise `AbandonedError` where the export has ended, or why it did."""
        if self._is_ended:
            if isinstance(self._why, CloudCkptError):
                raise self._why  # else that of the first file is told, whichever failed
            raise AbandonedError(f"the export to {self._url} has ended")

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
            self._store.put(name, [memoryview(text)])

    def _begin(self, name: str, text: bytes | None) -> None:
        self.go_on()
        if not self._is_ours(self._store):
            raise ConflictError(
                f"another export to {self._url} has taken over while this one was under way (its mark was replaced or "
                "removed), so that this one ended; give each a place of its own"
            )
        if name == self._last:
            there = objects_in(self._store, self._beginning).keys() & {name, *self._deciding}
            if there and not self._is_replacing:
                raise ConflictError(
                    f"another program has written {', '.join(sorted(there))} in {self._store.url} while an export "
                    f"to it was under way, which ended; choose another target, or replace that {_OVER}"
                )
            self._before, self._text = info_of(self._store, name), text
        self._begun.append(name)

    # -- the end --------------------------------------------------------------------------------------------------

    def _remove_old(self, plan: Plan) -> None:
        """Remove what is left of the export that was replaced, first the files that make it one."""
        names = [name for name in self._old if name not in plan.files]
        if names and self._is_ours(self._store):
            self._store.delete([name for name in names if name in plan.deciding])
            self._store.delete([name for name in names if name not in plan.deciding])

    def _end(self, plan: Plan, *, owns_names: bool) -> str:
        """Wait for what is under way, remove what was written in vain, and say what is there."""
        self._is_ended = True
        with self._changed:
            self._changed.wait_for(lambda: not self._at_work, timeout=LEAVING_S)
            is_moving = bool(self._at_work)
        store = self._hurried()
        try:
            told = self._told(store, plan, owns_names=owns_names)
        except StorageError as exc:
            told = (
                f"whether an export is in {self._url} is not known, and files of this one may stay there ({exc}); "
                f"replace them by the next one {_OVER}"
            )
        return f"{told}; what was under way may still come to stand there" if is_moving else told

    def _told(self, store: RetryingStore, plan: Plan, *, owns_names: bool) -> str:
        if self._is_whole(store):
            left = sorted(objects_in(store, self._beginning).keys() & set(self._old).difference(plan.files))
            beside = f", and beside it of the one before {_some(left)}: remove that" if left else ""
            return f"the export is whole at {self._url}{beside}"
        before = "the export before it is there as it was" if self._old else f"no export is in {self._url}"
        mine = [name for name in self._begun if name not in self._old]
        if not self._begun or len(plan.files) == 1:
            return f"no file was written{f', and {before}' if self._old else ''}"
        replaced = [name for name in self._begun if name in self._old]
        also = f", but for {_some(replaced)}, which may be of the new one" if replaced else ""
        if not owns_names and not self._is_ours(store):
            return f"{before}{also}, but {_some(mine)} of this one, which another export may have as well"
        store.delete(mine[::-1])
        return f"{before}{also}, and the files that were written were removed"

    def _is_whole(self, store: RetryingStore) -> bool:
        """Tell whether the deciding file stands there by us."""
        if self._last in self._stood or self._last not in self._begun:
            return self._last in self._stood
        there, text = info_of(store, self._last), self._text
        if text is None:
            return there not in (None, self._before)
        is_like = there is not None and there.size_bytes == len(text)
        return is_like and store.read(self._last, limit_bytes=len(text)) == text

    def _let_go(self) -> None:
        store = self._hurried()
        try:
            if self._is_ours(store):
                store.delete([self._mark])
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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
