"""Turn what the user asked for into a place on a store that no earlier demo has written to."""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from bucket import Bucket
from runs import DemoError

__all__ = ["Target", "seaweedfs_target", "target_at"]

_REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A prefix of one demo's own, with a root below it for each run.

    Attributes:
        description: the kind of store, for people.
        storage_options: fsspec's options; may hold credentials, so they stay out of the record.
    """

    url: str
    description: str
    storage_options: Mapping[str, object] = field(default_factory=dict, repr=False)

    def root(self, run_name: str) -> str:
        """Return the URL of one run's root."""
        return f"{self.url}/{run_name}"

    @property
    def environment(self) -> dict[str, str]:
        """Return how a child process learns the storage options: not by its command line, which anyone can read."""
        return {"CLOUDCKPT_STORAGE_OPTIONS": json.dumps(dict(self.storage_options))}

    def bucket(self, run_name: str) -> Bucket:
        """Look at one run's root from outside."""
        return Bucket(self.root(run_name), self.storage_options)


def target_at(url: str, storage_options: Mapping[str, object], *, description: str = "") -> Target:
    """Take a fresh prefix under `url`; a path without a scheme is a directory on local disk."""
    name = f"demo-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    scheme, separator, _ = url.partition("://")
    # The training processes have working directories of their own, so a relative path would mean another place there.
    base = url if separator else str(Path(url).resolve())
    return Target(
        url=f"{base.rstrip('/')}/{name}",
        description=description or (f"the given {scheme}:// URL" if separator else "local disk"),
        storage_options=storage_options,
    )


@contextmanager
def seaweedfs_target() -> Iterator[Target]:
    """Run SeaweedFS, a real S3 server, on loopback for as long as the demo takes.

    Raises:
        DemoError: the packages for it are not installed.
    """
    sys.path.insert(0, str(_REPOSITORY / "localstack"))
    try:
        from servers import seaweedfs
    except ImportError as exc:
        raise DemoError(f"SeaweedFS needs {exc.name}: pip install -e '.[demo]', or give --url") from exc

    with tempfile.TemporaryDirectory(prefix="cloudckpt-seaweedfs-") as directory, seaweedfs(Path(directory)) as server:
        url = server.make_bucket("cloudckpt-demo")
        yield target_at(url, server.storage_options, description="SeaweedFS (S3) on loopback")
