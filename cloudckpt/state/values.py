"""Save and restore what stands in a state by itself: a tensor, a container, a plain value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, MutableMapping, MutableSequence
from typing import cast

from cloudckpt.state.entry import Entry, Place
from cloudckpt.state.rng import set_generator

__all__ = ["ValueEntry"]


class ValueEntry(Entry):
    """A tensor, a container or a plain value: put back where it stands, in place where it can be."""

    is_itself = True

    def __init__(self, place: Place, shared: Collection[int]) -> None:
        """Restore the value at `place`; `shared` are ids of containers that stand in several places of the state."""
        super().__init__(place)
        self._shared = shared
        self._holder = cast("MutableMapping[object, object]", place.holder)
        self._key = place.key
        self.is_bound = not isinstance(place.holder, MutableMapping | MutableSequence)

    def current(self) -> object:
        return self._holder[self._key]

    def takes(self, name: str) -> bool:
        return False

    def load(self, restored: object, live: object) -> None:
        if not self._put_into(live, restored) and restored is not live:
            self._holder[self._key] = restored

    def _put_into(self, live: object, restored: object) -> bool:
        """Make what is live like what was restored, so that whoever holds it sees it; tell whether that was done."""
        if type(live) is not type(restored) or id(live) in self._shared:
            return False
        if isinstance(live, dict) and isinstance(restored, dict):
            merged = {key: self._merged(live.get(key), value) for key, value in restored.items()}
            live.clear()
            live.update(merged)
            if isinstance(live, defaultdict) and isinstance(restored, defaultdict):
                live.default_factory = restored.default_factory
            _vars_of(live).update(_vars_of(restored))
            return True
        if isinstance(live, list) and isinstance(restored, list):
            now = [*live, *[None] * len(restored)]
            live[:] = [self._merged(now[place], value) for place, value in enumerate(restored)]
            return True
        return set_generator(live, restored)

    def _merged(self, live: object, restored: object) -> object:
        return live if self._put_into(live, restored) else restored


def _vars_of(value: object) -> dict[str, object]:
    """Return the attributes of a container that may have some (`_metadata` of a state_dict)."""
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else {}
