"""Turn `torch.save`, safetensors and what reads their files into peers of one process, on a disk and over fsspec."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import fsspec
import torch

from benchmarks.peers.kinds import LOCAL, REMOTE, S3, Calls, Peer, Place, copied
from benchmarks.shared.states import State

__all__ = ["FILES"]

_Save = Callable[[State, Place], None]
_Load = Callable[[State, Place], State]

_TORCH = "state.pt"
_SAFE = "state.safetensors"  # what torch.load reads as such, whatever is in it


def _file(place: Place, name: str) -> Path:
    directory = Path(place.url)
    directory.mkdir(parents=True, exist_ok=True)
    return directory / name


def _durable(save: _Save, name: str) -> _Save:
    def saved(state: State, place: Place) -> None:
        save(state, place)
        descriptor = os.open(_file(place, name), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    return saved


# ---- torch ----------------------------------------------------------------------------------------------------------


def _torch_save(state: State, place: Place) -> None:
    torch.save(state, _file(place, _TORCH))


def _torch_load(state: State, place: Place) -> State:
    return copied(state, torch.load(_file(place, _TORCH)))


def _torch_load_mapped(state: State, place: Place) -> State:
    return copied(state, torch.load(_file(place, _TORCH), mmap=True))


def _torch_load_new(_: State, place: Place) -> State:
    loaded: State = torch.load(_file(place, _TORCH))
    return loaded


def _fsspec_save(state: State, place: Place) -> None:
    with fsspec.open(f"{place.url}/{_TORCH}", "wb", **place.storage_options) as stream:
        torch.save(state, stream)


def _fsspec_load(state: State, place: Place) -> State:
    with fsspec.open(f"{place.url}/{_TORCH}", "rb", **place.storage_options) as stream:
        return copied(state, torch.load(stream))


def _connector_save(state: State, place: Place) -> None:
    with _connector(place).writer(f"{place.url}/{_TORCH}") as stream:
        torch.save(state, stream)


def _connector_load(state: State, place: Place) -> State:
    with _connector(place).reader(f"{place.url}/{_TORCH}") as stream:
        return copied(state, torch.load(stream))


def _connector(place: Place) -> object:
    from s3torchconnector import S3Checkpoint, S3ClientConfig

    options = place.storage_options
    config = S3ClientConfig(force_path_style=True)
    return S3Checkpoint(options["client_kwargs"]["region_name"], options["endpoint_url"], config)


def _lightning_save(state: State, place: Place) -> None:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

    TorchCheckpointIO().save_checkpoint(state, f"{place.url}/state.ckpt")


def _lightning_load(state: State, place: Place) -> State:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

    return copied(state, TorchCheckpointIO().load_checkpoint(f"{place.url}/state.ckpt"))


# ---- safetensors ----------------------------------------------------------------------------------------------------


def _safetensors_save(state: State, place: Place) -> None:
    from safetensors.torch import save, save_file

    if place.is_local:
        save_file(state, _file(place, _SAFE))
        return
    filesystem, path = fsspec.url_to_fs(f"{place.url}/{_SAFE}", **place.storage_options)
    filesystem.pipe_file(path, save(state))


def _safetensors_load(state: State, place: Place) -> State:
    from safetensors.torch import load, load_file

    if place.is_local:
        return copied(state, load_file(_file(place, _SAFE)))
    filesystem, path = fsspec.url_to_fs(f"{place.url}/{_SAFE}", **place.storage_options)
    return copied(state, load(filesystem.cat_file(path)))


def _streamer_load(state: State, place: Place) -> State:
    from runai_model_streamer import SafetensorsStreamer

    path = str(_file(place, _SAFE)) if place.is_local else f"{place.url}/{_SAFE}"
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([path])
        for name, tensor in streamer.get_tensors():
            state[name].copy_(tensor)
    return state


def _fast_load(state: State, place: Place) -> State:
    from fastsafetensors import fastsafe_open

    with fastsafe_open(str(_file(place, _SAFE)), device="cpu", nogds=True) as file:
        return copied(state, {name: file.get_tensor(name) for name in state})


def _peer(title: str, save: _Save, load: _Load, schemes: frozenset[str] = LOCAL, *, package: str = "") -> Peer:
    return Peer(title=title, open=partial(Calls, saving=save, loading=load), schemes=schemes, package=package)


def _load_only(title: str, save: _Save, load: _Load, schemes: frozenset[str] = LOCAL, *, package: str = "") -> Peer:
    opened = partial(Calls, saving=save, loading=load)
    return Peer(title=title, open=opened, schemes=schemes, package=package, is_load_only=True)


FILES: Mapping[str, Peer] = {
    "torch-fsspec": _peer("torch.save / torch.load over fsspec", _fsspec_save, _fsspec_load, REMOTE),
    "torch": _peer("torch.save / torch.load + copy", _torch_save, _torch_load),
    "torch-fsync": _peer("torch.save + fsync / torch.load + copy", _durable(_torch_save, _TORCH), _torch_load),
    "torch-new": _load_only("torch.load alone (new tensors)", _torch_save, _torch_load_new),
    "torch-mmap": _load_only("torch.load(mmap=True) + copy", _torch_save, _torch_load_mapped),
    "torch-s3torchconnector": _peer(
        "torch.save / torch.load over s3torchconnector",
        _connector_save,
        _connector_load,
        S3,
        package="s3torchconnector",
    ),
    "lightning": _peer(
        "Lightning's TorchCheckpointIO", _lightning_save, _lightning_load, LOCAL | REMOTE, package="lightning"
    ),
    "safetensors": _peer(
        "safetensors save_file / load_file + copy", _safetensors_save, _safetensors_load, package="safetensors"
    ),
    "safetensors-fsync": _peer(
        "safetensors save_file + fsync / load_file + copy",
        _durable(_safetensors_save, _SAFE),
        _safetensors_load,
        package="safetensors",
    ),
    "safetensors-fsspec": _peer(
        "safetensors save / load, one object by fsspec",
        _safetensors_save,
        _safetensors_load,
        REMOTE,
        package="safetensors",
    ),
    "runai": _load_only(
        "runai-model-streamer of safetensors + copy",
        _safetensors_save,
        _streamer_load,
        LOCAL | S3,
        package="runai_model_streamer",
    ),
    "fastsafetensors": _load_only(
        "fastsafetensors of safetensors + copy", _safetensors_save, _fast_load, package="fastsafetensors"
    ),
}
