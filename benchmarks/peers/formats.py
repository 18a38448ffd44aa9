"""Turn other checkpoint libraries with a format of their own into peers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.kinds import LOCAL, S3, Calls, Peer, Place, copied
from benchmarks.shared.states import State

__all__ = ["FORMATS"]


def _snapshot_save(state: State, place: Place) -> None:
    from torchsnapshot import Snapshot, StateDict

    Snapshot.take(place.url, {"state": StateDict(**state)})


def _snapshot_load(state: State, place: Place) -> State:
    from torchsnapshot import Snapshot, StateDict

    restored = StateDict(**state)
    Snapshot(place.url).restore({"state": restored})
    return {name: restored[name] for name in state}


def _tensorizer_save(state: State, place: Place) -> None:
    from tensorizer import TensorSerializer

    with _tensorizer_stream(place, "wb+") as stream:
        serializer = TensorSerializer(stream)
        serializer.write_state_dict(state)
        serializer.close()


def _tensorizer_load(state: State, place: Place) -> State:
    from tensorizer import TensorDeserializer

    with _tensorizer_stream(place, "rb") as stream, TensorDeserializer(stream, device="cpu") as loaded:
        return copied(state, loaded)


def _tensorizer_stream(place: Place, mode: str) -> Any:
    from tensorizer import stream_io

    if place.is_local:
        Path(place.url).mkdir(parents=True, exist_ok=True)
        return stream_io.open_stream(f"{place.url}/state.tensors", mode)
    options = place.storage_options
    scheme, _, host = options["endpoint_url"].partition("://")
    return stream_io.open_stream(
        f"{place.url}/state.tensors",
        mode,
        s3_access_key_id=options["key"],
        s3_secret_access_key=options["secret"],
        s3_endpoint=host,
        s3_region_name=options["client_kwargs"]["region_name"],
        force_http=scheme == "http",
    )


def _checkpointing_manager() -> Any:
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.config import SyncCheckpointSaverConfig
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    return CheckpointManager.Config(
        save=SyncCheckpointSaverConfig(),
        # Its default, O_DIRECT without alignment, is refused by ext4 and xfs (EINVAL), and nothing is saved.
        storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
    ).build()


def _checkpointing_save(state: State, place: Place) -> None:
    manager = _checkpointing_manager()
    saved = manager.save(place.url, {"state": state})
    if saved is not None and hasattr(saved, "result"):
        saved.result()
    manager.close()


def _checkpointing_load(state: State, place: Place) -> State:
    manager = _checkpointing_manager()
    found: State = manager.load(place.url, into={"state": state})["state"]
    manager.close()
    return found


FORMATS: Mapping[str, Peer] = {
    "torchsnapshot": Peer(
        title="torchsnapshot",
        open=partial(Calls, saving=_snapshot_save, loading=_snapshot_load),
        schemes=LOCAL | S3,
        package="torchsnapshot",
    ),
    "tensorizer": Peer(
        title="tensorizer + copy",
        open=partial(Calls, saving=_tensorizer_save, loading=_tensorizer_load),
        schemes=LOCAL | S3,
        package="tensorizer",
    ),
    "torch-checkpointing": Peer(
        title="torch_checkpointing",
        open=partial(Calls, saving=_checkpointing_save, loading=_checkpointing_load),
        schemes=LOCAL,
        package="torch_checkpointing",
    ),
}
