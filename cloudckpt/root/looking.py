"""Look at what stands below a root while a job at work adds to it, and removes from it.

    listing ──▶ looked at, from the newest down ──▶ found: yielded
      ▲              ╰── nothing is committed there: never, or not any more?
      ╰── one newer than what was found: all of these are looked at again, and the root is listed again

Whoever removes a checkpoint has committed a newer one before. So where a prefix was listed and nothing is committed
there, that newer one may be one that was not committed yet when it was looked at, or not listed yet. Only if a second
look and a second listing show nothing new, what was found is the newest (FORMAT invariant 5). Knows prefixes; what a
look is, is its caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from cloudckpt.errors import StorageError

__all__ = ["LISTINGS", "Walk"]

LISTINGS = 20
"""How often a root is listed in one walk, each time because something has gone."""

_Found = TypeVar("_Found")
_Order = tuple[int, int]


class Walk(Generic[_Found]):
    """One walk over what stands below a root."""

    def __init__(
        self,
        url: str,
        places: Callable[[], Mapping[str, _Order]],
        look: Callable[[str], _Found | None],
        is_decided: Callable[[str], bool],
    ) -> None:
        """Begin; no request.

        Args:
            url: the root, for people.
            places: lists (epoch, step) of all attempts by their prefix.
            look: returns what is committed under a prefix.
            is_decided: whether nothing ever was, or will be, committed under a prefix; no request.
        """
        self._url = url
        self._places = places
        self._look = look
        self._is_decided = is_decided
        self._listing_count = 0
        self._known: set[str] = set()
        # Not passed yet, oldest first, and what a look at them found.
        self._ahead: list[tuple[_Order, str]] = []
        self._seen: dict[str, _Found | None] = {}
        # Passed, newest first: listed, and nothing is committed there.
        self._gone: list[tuple[_Order, str]] = []

    def newest_first(self, again: Callable[[str, _Found], _Found | None]) -> Iterator[_Found]:
        """Yield what is committed from the newest down, each looked at only when it is asked for.

        When the next one is asked for, the one before is looked at again: if it has gone, newer ones are yielded first.

        Args:
            again: looks again at what was found under a prefix; returns it if it is still the same.

        Raises:
            StorageError: whatever is listed has gone when it is looked at.
        """
        yielded: set[str] = set()
        self._list()
        while (found := self._settled()) is not None:
            order, prefix = self._ahead.pop()
            yield found
            yielded.add(prefix)
            now = again(prefix, found)
            if now is found:
                continue
            self._known, self._ahead, self._seen = set(yielded), [], {}
            if now is not None:
                self._put(order, prefix, now)
            self._list()

    def all(self, each: Callable[[Sequence[str]], Sequence[_Found | None]]) -> list[_Found]:
        """Return all that is committed, oldest first; `each` looks at several. Raises as `newest_first` does."""
        self._list()
        self._look_ahead(each)
        self._settled(lambda: self._look_ahead(each))
        return [found for _, prefix in self._ahead if (found := self._seen[prefix]) is not None]

    def _look_ahead(self, each: Callable[[Sequence[str]], Sequence[_Found | None]]) -> None:
        unseen = [prefix for _, prefix in self._ahead if prefix not in self._seen]
        self._seen.update(zip(unseen, each(unseen), strict=True))

    def _settled(self, look_ahead: Callable[[], None] = lambda: None) -> _Found | None:
        """Return the newest that is committed of what is ahead; it stays there."""
        while True:
            found = self._newest()
            if not self._gone or not self._has_changed():
                self._gone.clear()
                return found
            look_ahead()

    def _newest(self) -> _Found | None:
        while self._ahead:
            order, prefix = self._ahead[-1]
            if prefix not in self._seen:
                self._seen[prefix] = self._look(prefix)
            if (found := self._seen[prefix]) is not None:
                return found
            self._ahead.pop()
            if not self._is_decided(prefix):
                self._gone.append((order, prefix))
        return None

    def _has_changed(self) -> bool:
        """Look again, and list again; tell whether there is anything new."""
        self._gone.sort(reverse=True)
        for number, (order, prefix) in enumerate(self._gone):
            if (found := self._look(prefix)) is not None:
                # What is older than this one is passed once more, if anybody goes on that far.
                older, self._gone = self._gone[number + 1 :], self._gone[:number]
                for place in older:
                    self._seen.pop(place[1], None)
                self._ahead += older
                self._put(order, prefix, found)
                return True
        return self._list()

    def _put(self, order: _Order, prefix: str, found: _Found) -> None:
        self._seen[prefix] = found
        self._ahead.append((order, prefix))
        self._ahead.sort()

    def _list(self) -> bool:
        """List the root; tell whether it shows anything new."""
        self._listing_count += 1
        if self._listing_count > LISTINGS:
            raise StorageError(
                f"a job removes the checkpoints at {self._url} before they are read; try again, or let it keep them "
                "for longer (retention, prune_grace_s)"
            )
        new = {prefix: order for prefix, order in self._places().items() if prefix not in self._known}
        self._known.update(new)
        self._ahead = sorted([*self._ahead, *((order, prefix) for prefix, order in new.items())])
        return bool(new)
