"""Turn each way to write and read a checkpoint into the same two calls, so that all are measured alike.

A load restores *into the given tensors*, as a training job that resumes needs it; a peer that makes new tensors has
them copied over (`torch.load` alone is a peer of its own: `torch-new`). Knows nothing of clocks or counters.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import torch
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.shared.states import State

__all__ = ["PEERS", "Peer", "PeerKind", "Place"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one peer writes: an empty prefix or directory, and how to reach it."""

    url: str
    storage_options: Mapping[str, Any]

    @property
    def is_local(self) -> bool:
        """Whether the URL is a path."""
        return "://" not in self.url


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerKind:
    """What the tables call a peer, where it writes, and what it needs.

    Attributes:
        is_for_local: whether it writes to a directory.
        is_for_s3: whether it writes to S3.
        package: what has to be installed for it, beside what the benchmark itself imports.
    """

    title: str
    is_for_local: bool = False
    is_for_s3: bool = False
    package: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether it can be measured here."""
        return not self.package or find_spec(self.package) is not None

    @property
    def row_title(self) -> str:
        """Its title, with what stands in the place of numbers."""
        return self.title if self.is_installed else f"{self.title}; not installed: {self.package}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer(PeerKind):
    """One way to save and load.

    Attributes:
        save: writes a state to an empty place.
        load: restores a state in place; or returns new tensors, where that is what the peer measures.
        is_load_only: its save is another peer's, so only its load is a result.
    """

    save: Callable[[State, Place], None]
    load: Callable[[State, Place], State]
    is_load_only: bool = False


def _cloudckpt(engine: str, *, signed: bool = False, durable: bool = True, title: str, **where: bool) -> Peer:
    # Imported when used: the other peers must not pay for it.
    def save(state: State, place: Place) -> None:
        import cloudckpt

        options = cloudckpt.Options(signed_payload=signed)
        with nullcontext() if durable else _fsync_off():
            cloudckpt.save(
                dict(state), place.url, storage_options=place.storage_options, engine=engine, options=options
            )

    def load(state: State, place: Place) -> State:
        import cloudckpt

        cloudckpt.load(dict(state), place.url, storage_options=place.storage_options, engine=engine)
        return state

    return Peer(title=title, save=save, load=load, **where)


@contextmanager
def _fsync_off() -> Iterator[None]:
    """Make `os.fsync` do nothing: cloudckpt has no such option, this only shows what durability costs."""
    with mock.patch.object(os, "fsync"), mock.patch.object(os, "fdatasync"):
        yield


def _fsspec_dcp_save(state: State, place: Place, options: Mapping[str, Any]) -> None:
    dcp_save(dict(state), storage_writer=FsspecWriter(place.url, **options))


def _fsspec_dcp_load(state: State, place: Place, options: Mapping[str, Any]) -> State:
    dcp_load(dict(state), storage_reader=FsspecReader(place.url, **options))
    return state


def _stock_save(state: State, place: Place) -> None:
    if place.is_local:
        dcp_save(dict(state), storage_writer=FileSystemWriter(place.url))
    else:
        _fsspec_dcp_save(state, place, place.storage_options)


def _stock_load(state: State, place: Place) -> State:
    if place.is_local:
        dcp_load(dict(state), storage_reader=FileSystemReader(place.url))
        return state
    return _fsspec_dcp_load(state, place, place.storage_options)


def _unsigned(storage_options: Mapping[str, Any]) -> dict[str, Any]:
    """Have s3fs send UNSIGNED-PAYLOAD, as cloudckpt does."""
    options = copy.deepcopy(dict(storage_options))
    options["config_kwargs"] = {
        "s3": {"payload_signing_enabled": False},
        "request_checksum_calculation": "when_required",
    }
    return options


def _torch_save(state: State, place: Place) -> None:
    torch.save(state, _file(place))


def _torch_save_durably(state: State, place: Place) -> None:
    torch.save(state, _file(place))
    _fsync(_file(place))


def _torch_load(state: State, place: Place) -> State:
    return _copied(state, torch.load(_file(place)))


def _torch_load_mapped(state: State, place: Place) -> State:
    return _copied(state, torch.load(_file(place), mmap=True))


def _torch_load_new(_: State, place: Place) -> State:
    loaded: State = torch.load(_file(place))
    return loaded


def _torch_fsspec_save(state: State, place: Place) -> None:
    with fsspec.open(f"{place.url}/state.pt", "wb", **place.storage_options) as stream:
        torch.save(state, stream)


def _torch_fsspec_load(state: State, place: Place) -> State:
    with fsspec.open(f"{place.url}/state.pt", "rb", **place.storage_options) as stream:
        return _copied(state, torch.load(stream))


def _safetensors_save(state: State, place: Place) -> None:
    from safetensors.torch import save_file

    save_file(state, _file(place))


def _safetensors_save_durably(state: State, place: Place) -> None:
    _safetensors_save(state, place)
    _fsync(_file(place))


def _safetensors_load(state: State, place: Place) -> State:
    from safetensors.torch import load_file

    return _copied(state, load_file(_file(place)))


def _file(place: Place) -> Path:
    directory = Path(place.url)
    directory.mkdir(parents=True, exist_ok=True)
    return directory / "state"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copied(state: State, loaded: State) -> State:
    for name, tensor in state.items():
        tensor.copy_(loaded[name])
    return state


PEERS: Mapping[str, Peer] = {
    "cloudckpt-obstore": _cloudckpt("obstore", title="cloudckpt, engine obstore", is_for_s3=True),
    "cloudckpt-fsspec": _cloudckpt("fsspec", title="cloudckpt, engine fsspec (s3fs)", is_for_s3=True),
    "cloudckpt-obstore-signed": _cloudckpt(
        "obstore", signed=True, title="cloudckpt, engine obstore, signed payloads", is_for_s3=True
    ),
    "cloudckpt": _cloudckpt("auto", title="cloudckpt (fsync of every shard)", is_for_local=True),
    "cloudckpt-nosync": _cloudckpt(
        "auto", durable=False, title="cloudckpt with fsync patched away (not offered)", is_for_local=True
    ),
    "dcp": Peer(title="stock DCP", save=_stock_save, load=_stock_load, is_for_local=True, is_for_s3=True),
    "dcp-unsigned": Peer(
        title="DCP + s3fs, unsigned payloads",
        save=lambda state, place: _fsspec_dcp_save(state, place, _unsigned(place.storage_options)),
        load=lambda state, place: _fsspec_dcp_load(state, place, _unsigned(place.storage_options)),
        is_for_s3=True,
    ),
    "torch-fsspec": Peer(
        title="torch.save / torch.load over s3fs", save=_torch_fsspec_save, load=_torch_fsspec_load, is_for_s3=True
    ),
    "torch": Peer(title="torch.save / torch.load + copy", save=_torch_save, load=_torch_load, is_for_local=True),
    "torch-fsync": Peer(
        title="torch.save + fsync / torch.load + copy", save=_torch_save_durably, load=_torch_load, is_for_local=True
    ),
    "torch-new": Peer(
        title="torch.load alone (new tensors)",
        save=_torch_save,
        load=_torch_load_new,
        is_for_local=True,
        is_load_only=True,
    ),
    "torch-mmap": Peer(
        title="torch.load(mmap=True) + copy",
        save=_torch_save,
        load=_torch_load_mapped,
        is_for_local=True,
        is_load_only=True,
    ),
    "safetensors": Peer(
        title="safetensors save_file / load_file + copy",
        save=_safetensors_save,
        load=_safetensors_load,
        is_for_local=True,
        package="safetensors",
    ),
    "safetensors-fsync": Peer(
        title="safetensors save_file + fsync / load_file + copy",
        save=_safetensors_save_durably,
        load=_safetensors_load,
        is_for_local=True,
        package="safetensors",
    ),
}
