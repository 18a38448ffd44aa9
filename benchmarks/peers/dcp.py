"""Turn `torch.distributed.checkpoint` over the storage classes that there are for it into peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.peers.kinds import ANYWHERE, LOCAL, S3, Peer, Place
from benchmarks.shared.states import State

__all__ = ["CONNECTOR", "DCP", "STOCK"]

STOCK = "dcp"
CONNECTOR = "s3torchconnector"
MIB = 1 << 20
_THREADS = 4


@dataclass(frozen=True, slots=True)
class _Dcp:
    """DCP over somebody's storage classes."""

    url: str
    writer: Callable[[str], Any]
    reader: Callable[[str], Any]

    def save(self, state: State, step: int) -> Mapping[str, float]:
        dcp_save(dict(state), storage_writer=self.writer(f"{self.url}/step-{step}"))
        return {}

    def load(self, state: State, step: int) -> State:
        dcp_load(dict(state), storage_reader=self.reader(f"{self.url}/step-{step}"))
        return state

    def close(self) -> None:
        """Nothing stays open between calls."""


def _stock(place: Place, *, is_signed: bool = True, thread_count: int = 1) -> _Dcp:
    if place.is_local:
        return _Dcp(place.url, partial(FileSystemWriter, thread_count=thread_count), FileSystemReader)
    # Unsigned: s3fs sends UNSIGNED-PAYLOAD, as cloudckpt does.
    unsigned = {"s3": {"payload_signing_enabled": False}, "request_checksum_calculation": "when_required"}
    is_unsigned = not is_signed and place.url.startswith("s3://")
    options = {**place.storage_options, **({"config_kwargs": unsigned} if is_unsigned else {})}
    return _Dcp(
        place.url, partial(FsspecWriter, thread_count=thread_count, **options), partial(FsspecReader, **options)
    )


def _hugging_face(place: Place) -> _Dcp:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

    return _Dcp(place.url, partial(HuggingFaceStorageWriter, save_distributed=True), HuggingFaceStorageReader)


def _connector(place: Place, *, thread_count: int, part_bytes: int) -> _Dcp:
    """Open s3torchconnector's DCP classes on the endpoint of `place`.

    They take a region and no endpoint, so the client class that they instantiate gets it beforehand.
    """
    from s3torchconnector import S3ClientConfig
    from s3torchconnector._s3client import S3Client
    from s3torchconnector.dcp import S3StorageReader, S3StorageWriter, s3_file_system

    options = place.storage_options
    setattr(s3_file_system, "S3Client", partial(S3Client, endpoint=options["endpoint_url"]))  # noqa: B010 (a patch)
    config = S3ClientConfig(part_size=part_bytes, force_path_style=True)
    region = options["client_kwargs"]["region_name"]
    return _Dcp(
        place.url,
        lambda url: S3StorageWriter(region, url, s3client_config=config, thread_count=thread_count),
        lambda url: S3StorageReader(region, url, s3client_config=config),
    )


def _connected(title: str, *, thread_count: int = 1, part_bytes: int = 8 * MIB) -> Peer:
    opened = partial(_connector, thread_count=thread_count, part_bytes=part_bytes)
    return Peer(title=f"s3torchconnector DCP, {title}", open=opened, schemes=S3, package=CONNECTOR, has_ranks=True)


DCP: Mapping[str, Peer] = {
    STOCK: Peer(title="stock DCP", open=_stock, schemes=ANYWHERE, has_ranks=True),
    "dcp-unsigned": Peer(
        title="DCP + s3fs, unsigned payloads", open=partial(_stock, is_signed=False), schemes=S3, has_ranks=True
    ),
    "dcp-threads": Peer(
        title=f"DCP, {_THREADS} threads (S3: unsigned)",
        open=partial(_stock, is_signed=False, thread_count=_THREADS),
        schemes=ANYWHERE,
        has_ranks=True,
    ),
    "dcp-hf": Peer(
        title="DCP, HuggingFaceStorageWriter",
        open=_hugging_face,
        schemes=LOCAL,
        package="safetensors",
        has_ranks=True,
    ),
    CONNECTOR: _connected("defaults"),
    f"{CONNECTOR}-t2-p64": _connected("2 threads, parts of 64 MiB", thread_count=2, part_bytes=64 * MIB),
    f"{CONNECTOR}-t4": _connected("4 threads", thread_count=4),
}
