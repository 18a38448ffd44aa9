"""Find at once where ranks were asked for different things, which would have them wait for each other in vain.

    compare   what this rank was asked for ──▶ store: the first to come sets it, each later one compares ──▶ differs?
    check     has another one found a difference since?

Through the key-value store of the process group: two requests of each rank, and nobody waits for anybody, because ranks
that differ do not meet. A store that does not answer is no reason to fail: then nothing is compared.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial

from cloudckpt.errors import OptionsError
from cloudckpt.ranks.calling import begun
from cloudckpt.ranks.world import KeyValueStore, store_of_our_own

__all__ = ["Accord"]

_ROOM = "cloudckpt/accord"
# How long the store may take.
_STORE_S = 2.0
_PERIOD_S = 0.25


class Accord:
    """What one rank was asked for, beside what others were. Ranks whose accords have one name are compared.

    Once ranks were found to differ they do so for good: some of them may have gone on. Any thread may `check`.
    """

    def __init__(self, name: str, *, rank: int, connect: Callable[[], KeyValueStore] = store_of_our_own) -> None:
        """Compare below `name`, which no other accord in this store has had."""
        self._room = f"{_ROOM}/{name}"
        self._rank = rank
        self._connect = connect
        self._store: KeyValueStore | None = None
        self._asking: Future[str] | None = None
        self._asked_s = 0.0

    def compare(self, call: str, mine: Mapping[str, str | int | None]) -> None:
        """Compare what all ranks are to be asked for alike, as far as others have come to `call`, each once.

        Raises:
            OptionsError: another rank has another value of a name that both have; or ranks differed before.
        """
        self._raise(self._result(begun(partial(self._compared, call, dict(mine)))))

    def check(self) -> None:
        """Raise if another rank has found a difference. Does not wait; for whoever waits for others, often."""
        now_s = time.monotonic()
        asking = self._asking
        if asking is not None and asking.done():
            self._asking = None
            self._raise(self._result(asking))
        if self._asking is None and now_s - self._asked_s > _PERIOD_S:
            self._asked_s = now_s
            self._asking = begun(self._difference)

    def _result(self, asking: Future[str]) -> str:
        try:
            return asking.result(timeout=_STORE_S)
        except (FutureTimeoutError, RuntimeError):  # torch's DistError: the store is gone, or does not answer
            return ""

    def _raise(self, difference: str) -> None:
        if difference:
            raise OptionsError(f"{difference}; give every rank the same, and start the job again")

    def _compared(self, call: str, mine: dict[str, str | int | None]) -> str:
        if difference := self._difference():
            return difference
        store = self._opened()
        text = json.dumps([self._rank, mine])
        rank, theirs = json.loads(store.compare_set(f"{self._room}/{call}", "", text))
        differing = [name for name in mine if name in theirs and theirs[name] != mine[name]]
        if not differing:
            # Another rank may have found a difference meanwhile, of which it will not tell this one again.
            return self._difference()
        pairs = sorted([(rank, theirs), (self._rank, mine)], key=lambda pair: pair[0])
        found = "; ".join(
            f"{name} is " + " and ".join(f"{said[name]!r} on rank {number}" for number, said in pairs)
            for name in differing
        )
        store.set(self._differs, found)
        return found

    def _difference(self) -> str:
        """Return what was found to differ, "" while nothing was."""
        store = self._opened()
        return store.get(self._differs).decode() if store.check([self._differs]) else ""

    @property
    def _differs(self) -> str:
        return f"{self._room}/differs"

    def forget(self, call: str) -> Future[bool]:
        """Let the store forget a call at which every rank has been; nobody need wait for that."""
        return begun(lambda: self._opened().delete_key(f"{self._room}/{call}"))

    def _opened(self) -> KeyValueStore:
        if self._store is None:
            self._store = self._connect()
        return self._store
