"""Turn one save into a time line: what it was at until its first byte, while bytes moved, and after the last of them.

    opening  the store, the plan, the layout          shards   between the first put's begin and the last one's end
    gather   from there to the index                  index    its put, and the listing beside it
    commit   the fence and the create of the manifest rest     until the call returned

`busy` is how many puts of shards were in flight on average while there was one, `digest` the thread seconds that went
into digests of blocks. Watches verbs of the retry layer and the digests from outside; knows nothing else of us.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest import mock

from cloudckpt.store.retrying import RetryingStore

__all__ = ["Timeline", "watched"]

T = TypeVar("T")

# By name: the package hands out a function of the module's name.
_UPLOAD = importlib.import_module("cloudckpt.transfer.upload")
_SHARD = ".safetensors"
_VERBS = ("put", "create", "list", "head", "read")
_MS = 1e3


@dataclass(slots=True)
class Timeline:
    """Calls of one save: what, its key, and when it began and ended, in seconds of `time.perf_counter`."""

    began_s: float = 0.0
    ended_s: float = 0.0
    calls: list[tuple[str, str, float, float]] = field(default_factory=list)

    def text(self) -> str:
        """Write the phases in milliseconds."""
        shards = [(start, stop) for verb, key, start, stop in self.calls if verb == "put" and key.endswith(_SHARD)]
        digests = [(start, stop) for verb, _, start, stop in self.calls if verb == "digest"]
        index = [(start, stop) for verb, key, start, stop in self.calls if verb == "put" and key.endswith("index.bin")]
        creates = [stop for verb, key, _, stop in self.calls if verb == "create" and key.endswith("manifest.json")]
        if not (shards and digests and index and creates):
            return "no whole save was seen"
        first, last = min(start for start, _ in shards), max(stop for _, stop in shards)
        marks = {
            "opening": first,
            "shards": last,
            "gather": min(start for start, _ in index),
            "index": max(stop for _, stop in index),
            "commit": max(creates),
            "rest": self.ended_s,
        }
        before_s, words = self.began_s, list[str]()
        for name, at_s in marks.items():
            words.append(f"{name} {(at_s - before_s) * _MS:.1f}")
            before_s = at_s
        busy = sum(stop - start for start, stop in shards) / (last - first)
        digest_s = sum(stop - start for start, stop in digests)
        return f"{', '.join(words)} ms; busy {busy:.1f}, digest {digest_s * _MS:.0f} ms, {len(shards)} shards"


@contextmanager
def watched() -> Iterator[Timeline]:
    """Write down what a save in the block does."""
    found = Timeline()

    def noted(verb: str, call: Callable[..., T], key_at: int) -> Callable[..., T]:
        def watching(*given: Any, **named: Any) -> T:
            start_s = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                key = str(given[key_at]) if len(given) > key_at else ""
                found.calls.append((verb, key, start_s, time.perf_counter()))

        return watching

    patches = [mock.patch.object(RetryingStore, verb, noted(verb, getattr(RetryingStore, verb), 1)) for verb in _VERBS]
    patches.append(mock.patch.object(_UPLOAD, "block_digests", noted("digest", _UPLOAD.block_digests, 99)))
    for patch in patches:
        patch.start()
    try:
        found.began_s = time.perf_counter()
        yield found
        found.ended_s = time.perf_counter()
    finally:
        for patch in patches:
            patch.stop()
