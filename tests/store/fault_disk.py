"""Fail any system call of the local store, and remember the calls, in front of a real directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from cloudckpt.store.disk import Disk

__all__ = ["FaultDisk"]

_CALLS = [name for name in vars(Disk) if not name.startswith("_")]


class FaultDisk(Disk):
    """A disk whose calls fail as told.

    Attributes:
        calls: the name of every call so far.
        before: called before each call with its name; to look, to race, or to die.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.before: Callable[[str], None] = lambda name: None
        self._faults: dict[str, tuple[int, int, int]] = {}
        for name in _CALLS:
            setattr(self, name, self._watched(name, getattr(super(), name)))

    def fail(self, name: str, code: int, *, skip: int = 0, times: int = 1) -> None:
        """Let a call raise the error of that number, after `skip` calls that work, so many times."""
        self._faults[name] = (code, skip, times)

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.before(name)
            self.calls.append(name)
            code, skip, times = self._faults.get(name, (0, 0, 0))
            if times and not skip:
                self._faults[name] = (code, 0, times - 1)
                raise OSError(code, os.strerror(code))
            if times:
                self._faults[name] = (code, skip - 1, times)
            return call(*args, **kwargs)

        return watched
