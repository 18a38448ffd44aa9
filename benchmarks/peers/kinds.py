"""Say what a peer is: a way to save and load, opened at a place once per process, on one rank or on several at once.

A load restores *into the given tensors*, as a job that resumes needs it; a peer that makes new tensors has them copied
over, unless making new ones is what it measures. Knows nothing of clocks, process groups or counters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

from benchmarks.peers.install import NOT_INSTALLED
from benchmarks.shared.states import State

__all__ = ["ANYWHERE", "LOCAL", "REMOTE", "S3", "Calls", "Opened", "Peer", "Place", "copied"]

LOCAL = frozenset({""})
S3 = frozenset({"s3"})
REMOTE = frozenset({"s3", "gs"})
ANYWHERE = LOCAL | REMOTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one peer writes: an empty prefix or directory, and how to reach it."""

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Whether the URL is a path."""
        return "://" not in self.url


class Opened(Protocol):
    """One way to save and load, open at one place, in one process."""

    def save(self, state: State, step: int) -> Mapping[str, float]:
        """Save under `step`, a number of its own; return what the peer itself tells about the save."""
        ...

    def load(self, state: State, step: int) -> State:
        """Restore in place what was saved under `step`; return it, or the new tensors that the peer makes."""
        ...

    def close(self) -> None:
        """Let go of what is open; every rank calls it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What the tables call a way to save, where it writes, and how it is opened.

    Attributes:
        schemes: of the URLs that it writes to; "" is a directory.
        package: what has to be importable for it, beside what the benchmark itself imports.
        has_ranks: whether several ranks save one checkpoint together.
        is_load_only: its save is another peer's, so only its load is a result.
        is_limit: whether it is no checkpoint but bytes alone, to show what a client can do.
    """

    title: str
    open: Callable[[Place], Opened]
    schemes: frozenset[str]
    package: str = ""
    has_ranks: bool = False
    is_load_only: bool = False
    is_limit: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether it can be measured here."""
        return not self.package or find_spec(self.package) is not None

    @property
    def row_title(self) -> str:
        """Its title, with what stands in the place of numbers."""
        if self.is_installed:
            return self.title
        why = _reasons().get(self.package.replace("_", "-"), "")
        return f"{self.title}; not installed: {self.package}{f' ({why})' if why else ''}"

    def fits(self, scheme: str, ranks: int) -> bool:
        """Tell whether it can write to such a URL from so many ranks."""
        return scheme in self.schemes and (ranks == 1 or self.has_ranks)


@dataclass(frozen=True, slots=True)
class Calls:
    """A peer that keeps nothing open: two functions of a state and a place."""

    place: Place
    saving: Callable[[State, Place], None]
    loading: Callable[[State, Place], State]

    def save(self, state: State, step: int) -> Mapping[str, float]:
        self.saving(state, self._at(step))
        return {}

    def load(self, state: State, step: int) -> State:
        return self.loading(state, self._at(step))

    def close(self) -> None:
        """Nothing stays open between calls."""

    def _at(self, step: int) -> Place:
        return Place(url=f"{self.place.url}/step-{step}", storage_options=self.place.storage_options)


def copied(state: State, loaded: Mapping[str, Any]) -> State:
    """Copy what was loaded into the tensors that exist."""
    for name, tensor in state.items():
        tensor.copy_(loaded[name])
    return state


def _reasons() -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(NOT_INSTALLED.read_text())
    except OSError:
        return {}
    return found
