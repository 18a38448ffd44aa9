"""Turn each way to save from several ranks into the same two calls, made by every rank at once.

A load restores *into the given tensors*. `open` is called once per process, so that a peer keeps what a job would
keep from save to save: connections, a manager. Knows nothing of clocks, process groups or counters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.one_process.peers import PeerKind, Place
from benchmarks.shared.states import State

__all__ = ["CONNECTOR", "MANAGED", "RANK_PEERS", "RankPeer", "RankPeerKind"]

CONNECTOR = "s3torchconnector"
MANAGED = "-manager"
MIB = 1 << 20


class RankPeer(Protocol):
    """One way to save and load, open at one place, in one rank."""

    def save(self, state: State, step: int) -> Mapping[str, float]:
        """Save under `step`, a number of its own; return what the peer itself tells about the save."""
        ...

    def load(self, state: State, step: int) -> None:
        """Restore in place what was saved under `step`."""
        ...

    def close(self) -> None:
        """Let go of what is open; every rank calls it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPeerKind(PeerKind):
    """And how it is opened."""

    open: Callable[[Place], RankPeer]


@dataclass(frozen=True, slots=True)
class _Dcp:
    """Stock `torch.distributed.checkpoint` over somebody's storage classes."""

    url: str
    writer: Callable[[str], Any]
    reader: Callable[[str], Any]

    def save(self, state: State, step: int) -> Mapping[str, float]:
        dcp_save(dict(state), storage_writer=self.writer(f"{self.url}/step-{step}"))
        return {}

    def load(self, state: State, step: int) -> None:
        dcp_load(dict(state), storage_reader=self.reader(f"{self.url}/step-{step}"))

    def close(self) -> None:
        """Nothing stays open between calls."""


@dataclass(frozen=True, slots=True)
class _CloudCkpt:
    """The free functions: one URL, and one store opened, per call."""

    place: Place
    engine: str

    def save(self, state: State, step: int) -> Mapping[str, float]:
        import cloudckpt

        return cloudckpt.save(dict(state), self._url(step), **self._how).manifest.summary

    def load(self, state: State, step: int) -> None:
        import cloudckpt

        cloudckpt.load(dict(state), self._url(step), **self._how)

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
    engine: str
    _manager: Any = field(default=None)

    def save(self, state: State, step: int) -> Mapping[str, float]:
        return self._opened().save(step, dict(state)).manifest.summary

    def load(self, state: State, step: int) -> None:
        if self._opened().restore(dict(state), step) is None:
            raise RuntimeError(f"the manager found no step {step} at {self.place.url}")

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


def _stock(place: Place, *, own_options: Mapping[str, Any] | None = None) -> RankPeer:
    if place.is_local:
        return _Dcp(place.url, FileSystemWriter, FileSystemReader)
    options = {**place.storage_options, **(own_options or {})}
    return _Dcp(place.url, partial(FsspecWriter, **options), partial(FsspecReader, **options))


def _connector(place: Place, *, thread_count: int, part_bytes: int) -> RankPeer:
    """Open s3torchconnector's DCP classes on the endpoint of `place`.

    They take a region and no endpoint, so the client class that they instantiate gets it beforehand.
    """
    from s3torchconnector import S3ClientConfig
    from s3torchconnector._s3client import S3Client
    from s3torchconnector.dcp import S3StorageReader, S3StorageWriter, s3_file_system

    options = place.storage_options
    os.environ |= {"AWS_ACCESS_KEY_ID": options["key"], "AWS_SECRET_ACCESS_KEY": options["secret"]}
    setattr(s3_file_system, "S3Client", partial(S3Client, endpoint=options["endpoint_url"]))  # noqa: B010 (a patch)
    config = S3ClientConfig(part_size=part_bytes, force_path_style=True)
    region = options["client_kwargs"]["region_name"]
    return _Dcp(
        place.url,
        lambda url: S3StorageWriter(region, url, s3client_config=config, thread_count=thread_count),
        lambda url: S3StorageReader(region, url, s3client_config=config),
    )


def _connector_kind(title: str, *, thread_count: int = 1, part_bytes: int = 8 * MIB) -> RankPeerKind:
    opened = partial(_connector, thread_count=thread_count, part_bytes=part_bytes)
    return RankPeerKind(title=f"s3torchconnector DCP, {title}", open=opened, is_for_s3=True, package=CONNECTOR)


def _ours(engine: str, title: str, **where: bool) -> RankPeerKind:
    return RankPeerKind(title=title, open=partial(_CloudCkpt, engine=engine), **where)


def _managed(engine: str, title: str, **where: bool) -> RankPeerKind:
    return RankPeerKind(title=f"{title}, manager", open=partial(_Managed, engine=engine), **where)


_UNSIGNED = {
    "config_kwargs": {"s3": {"payload_signing_enabled": False}, "request_checksum_calculation": "when_required"}
}

RANK_PEERS: Mapping[str, RankPeerKind] = {
    "cloudckpt-obstore": _ours("obstore", "cloudckpt, engine obstore", is_for_s3=True),
    "cloudckpt-obstore-manager": _managed("obstore", "cloudckpt, engine obstore", is_for_s3=True),
    "cloudckpt-fsspec": _ours("fsspec", "cloudckpt, engine fsspec (s3fs)", is_for_s3=True),
    "cloudckpt-fsspec-manager": _managed("fsspec", "cloudckpt, engine fsspec (s3fs)", is_for_s3=True),
    "cloudckpt": _ours("auto", "cloudckpt (fsync of every shard)", is_for_local=True),
    "cloudckpt-manager": _managed("auto", "cloudckpt (fsync of every shard)", is_for_local=True),
    "dcp": RankPeerKind(title="stock DCP", open=_stock, is_for_local=True, is_for_s3=True),
    "dcp-unsigned": RankPeerKind(
        title="DCP + s3fs, unsigned payloads", open=partial(_stock, own_options=_UNSIGNED), is_for_s3=True
    ),
    CONNECTOR: _connector_kind("defaults"),
    f"{CONNECTOR}-t2-p64": _connector_kind("2 threads, parts of 64 MiB", thread_count=2, part_bytes=64 * MIB),
    f"{CONNECTOR}-t4": _connector_kind("4 threads", thread_count=4),
}
