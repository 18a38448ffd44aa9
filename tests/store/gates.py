"""Hold back, delay or fail what a manager asks of its store, at the seam below the retries."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Self

from cloudckpt import CheckpointManager

PATIENCE_S = 30.0


def is_shard(key: str) -> bool:
    return key.endswith(".safetensors")


def anything(key: str) -> bool:
    return True


def before(
    manager: CheckpointManager, act: Callable[[str], object], *, verb: str = "put", when: Callable[[str], bool]
) -> None:
    """Call `act(key)` before each request of a kind."""
    inner: Any = manager._store.inner  # type: ignore[attr-defined]
    real = getattr(inner, verb)

    def request(key: str, *args: Any, **kwargs: Any) -> Any:
        if when(key):
            act(key)
        return real(key, *args, **kwargs)

    setattr(inner, verb, request)


class Gate:
    """Requests of a kind wait here until it is opened; a test that fails opens it, so that nothing hangs."""

    def __init__(
        self, manager: CheckpointManager, *, verb: str = "put", when: Callable[[str], bool] = is_shard, left: int = 0
    ) -> None:
        """Let the first `left` requests through."""
        self.keys: list[str] = []
        self._left = left
        self._reached = threading.Event()
        self._opened = threading.Event()
        before(manager, self._pass, verb=verb, when=when)

    def _pass(self, key: str) -> None:
        self.keys.append(key)
        if len(self.keys) > self._left:
            self._reached.set()
            self._opened.wait()

    def await_request(self) -> None:
        """Wait until a request is held back."""
        assert self._reached.wait(PATIENCE_S), "no request came"

    def open(self) -> None:
        self._opened.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()


def slow(manager: CheckpointManager, seconds: float, *, when: Callable[[str], bool] = is_shard) -> None:
    """Let each put take so long, at least."""
    before(manager, lambda key: time.sleep(seconds), when=when)


class Failure:
    """Puts of a kind raise as long as it is on."""

    def __init__(self, manager: CheckpointManager, error: Exception, *, when: Callable[[str], bool] = is_shard) -> None:
        self.is_on = True
        self._error = error
        before(manager, self._raise, when=when)

    def _raise(self, key: str) -> None:
        if self.is_on:
            raise self._error


def wait_for(is_so: Callable[[], object]) -> None:
    stop_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < stop_s, "it did not come about"
        time.sleep(0.005)
