"""Turn cloudckpt into peers: the free functions and the manager, each engine, signed, and without durability."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

from benchmarks.peers.kinds import LOCAL, REMOTE, S3, Peer, Place
from benchmarks.shared.states import State

__all__ = ["MANAGED", "OURS"]

MANAGED = "-manager"


@dataclass(frozen=True, slots=True)
class _Functions:
    """The free functions: one URL, and one store opened, per call."""

    place: Place
    engine: str = "auto"
    is_signed: bool = False
    is_durable: bool = True

    def save(self, state: State, step: int) -> Mapping[str, float]:
        # Imported when used: the other peers must not pay for it.
        import cloudckpt

        options = cloudckpt.Options(signed_payload=self.is_signed)
        with nullcontext() if self.is_durable else _fsync_off():
            saved = cloudckpt.save(dict(state), self._url(step), options=options, **self._how)
        return saved.manifest.summary

    def load(self, state: State, step: int) -> State:
        import cloudckpt

        cloudckpt.load(dict(state), self._url(step), **self._how)
        return state

    def close(self) -> None:
        """Nothing stays open between calls."""

    def _url(self, step: int) -> str:
        return f"{self.place.url}/step-{step}"

    @property
    def _how(self) -> dict[str, Any]:
        return {"storage_options": self.place.storage_options, "engine": self.engine}


@dataclass(slots=True)
class _Managed:
    """One manager for all saves of the process; the first save pays for the claim of the root."""

    place: Place
    engine: str = "auto"
    _manager: Any = field(default=None)

    def save(self, state: State, step: int) -> Mapping[str, float]:
        summary: Mapping[str, float] = self._opened().save(step, dict(state)).manifest.summary
        return summary

    def load(self, state: State, step: int) -> State:
        if self._opened().restore(dict(state), step) is None:
            raise RuntimeError(f"the manager found no step {step} at {self.place.url}")
        return state

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()

    def _opened(self) -> Any:
        import cloudckpt

        if self._manager is None:
            self._manager = cloudckpt.CheckpointManager(
                self.place.url, storage_options=self.place.storage_options, engine=self.engine
            )
        return self._manager


@contextmanager
def _fsync_off() -> Iterator[None]:
    """Make `os.fsync` do nothing: cloudckpt has no such option, this only shows what durability costs."""
    with mock.patch.object(os, "fsync"), mock.patch.object(os, "fdatasync"):
        yield


def _functions(title: str, schemes: frozenset[str], **how: Any) -> Peer:
    return Peer(title=title, open=partial(_Functions, **how), schemes=schemes, has_ranks=True)


def _managed(title: str, schemes: frozenset[str], **how: Any) -> Peer:
    return Peer(title=f"{title}, manager", open=partial(_Managed, **how), schemes=schemes, has_ranks=True)


# Not on GCS here: without credentials, which servers of one's own have none of, obstore does not write there.
OURS: Mapping[str, Peer] = {
    "cloudckpt-obstore": _functions("cloudckpt, engine obstore", S3, engine="obstore"),
    "cloudckpt-obstore-manager": _managed("cloudckpt, engine obstore", S3, engine="obstore"),
    "cloudckpt-obstore-signed": _functions(
        "cloudckpt, engine obstore, signed payloads", S3, engine="obstore", is_signed=True
    ),
    "cloudckpt-fsspec": _functions("cloudckpt, engine fsspec", REMOTE, engine="fsspec"),
    "cloudckpt-fsspec-manager": _managed("cloudckpt, engine fsspec", REMOTE, engine="fsspec"),
    "cloudckpt": _functions("cloudckpt (fsync of every shard)", LOCAL),
    "cloudckpt-manager": _managed("cloudckpt (fsync of every shard)", LOCAL),
    "cloudckpt-nosync": _functions("cloudckpt with fsync patched away (not offered)", LOCAL, is_durable=False),
}
