"""Turn a listing of a bucket into what stands there: attempts, and which of them is committed.

Looks at the store with fsspec and the names of the format alone, around cloudckpt, so that the demo does not ask the
library whether the library was right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import fsspec

__all__ = ["Attempt", "Bucket", "attempts_in"]

_OBJECT = re.compile(
    r"(?:\A|/)step-(?P<step>\d{10})-e(?P<epoch>\d{4,})/"
    r"(?:(?P<manifest>manifest\.json)|[0-9a-f]{16}/(?:index\.bin|r\d{5}-\d{4,}\.safetensors))\Z"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What stands under the prefix of one step and epoch.

    Attributes:
        object_count: shards and indexes.
        is_committed: whether the manifest is there.
    """

    step: int
    epoch: int
    object_count: int
    is_committed: bool

    @property
    def name(self) -> str:
        """The prefix below the root."""
        return f"step-{self.step:010d}-e{self.epoch:04d}"


def attempts_in(keys: Iterable[str]) -> list[Attempt]:
    """Sort the keys of a root's objects into attempts, ordered by epoch and step."""
    found: dict[tuple[int, int], list[bool]] = {}
    for match in filter(None, map(_OBJECT.search, keys)):
        place = (int(match["epoch"]), int(match["step"]))
        found.setdefault(place, []).append(match["manifest"] is not None)
    return [
        Attempt(step=step, epoch=epoch, object_count=is_manifest.count(False), is_committed=any(is_manifest))
        for (epoch, step), is_manifest in sorted(found.items())
    ]


class Bucket:
    """One root on a store, seen from outside; every look is a fresh listing."""

    def __init__(self, url: str, storage_options: Mapping[str, object]) -> None:
        options = {**storage_options, "use_listings_cache": False, "skip_instance_cache": True}
        self._fs, self._path = fsspec.core.url_to_fs(url, **options)

    def attempts(self) -> list[Attempt]:
        """List every attempt under the root."""
        return attempts_in(self._fs.find(self._path))

    def environment(self, attempt: Attempt) -> dict[str, str]:
        """Read the environment record out of a committed attempt's manifest."""
        manifest = json.loads(self._fs.cat_file(f"{self._path}/{attempt.name}/manifest.json"))
        return dict(manifest["environment"])
