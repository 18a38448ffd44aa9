"""Turn bare clients into peers that show the limit: bytes there and back, with no format, digests, commit or checks.

Tensors of a MiB and more are objects of their own, in pieces of 64 MiB at most; all smaller ones are one object.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import torch

from benchmarks.peers.kinds import LOCAL, REMOTE, S3, Calls, Peer, Place
from benchmarks.shared.states import State

__all__ = ["RAW"]

_PIECE_BYTES = 64 << 20
_SMALL_BYTES = 1 << 20
_AT_ONCE = 8
_SMALL = "small"


def _pieces(state: State) -> Iterator[tuple[str, memoryview]]:
    """Yield the memory of all large tensors, in pieces, each with the name of its object."""
    for number, tensor in enumerate(state.values()):
        memory = _memory(tensor)
        if len(memory) >= _SMALL_BYTES:
            for start in range(0, len(memory), _PIECE_BYTES):
                yield f"{number}-{start}", memory[start : start + _PIECE_BYTES]


def _small(state: State) -> list[memoryview]:
    return [memory for tensor in state.values() if len(memory := _memory(tensor)) < _SMALL_BYTES]


def _memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _spread(data: Any, into: list[memoryview]) -> None:
    view, at = memoryview(data), 0
    for memory in into:
        memory[:] = view[at : at + len(memory)]
        at += len(memory)


def _client(place: Place) -> tuple[Any, str]:
    from obstore.store import S3Store

    options = place.storage_options
    bucket, _, prefix = place.url.removeprefix("s3://").partition("/")
    endpoint_url = options["endpoint_url"]
    trusted = os.environ.get("AWS_CA_BUNDLE")
    client = {"allow_http": True, "timeout": "600s"}
    store = S3Store(
        bucket,
        config={
            "access_key_id": options["key"],
            "secret_access_key": options["secret"],
            "endpoint": endpoint_url,
            "region": options["client_kwargs"]["region_name"],
            "unsigned_payload": True,
        },
        client_options={**client, **({"root_certificate": Path(trusted).read_bytes()} if trusted else {})},
    )
    return store, prefix


def _obstore_save(state: State, place: Place) -> None:
    import obstore

    store, prefix = _client(place)
    bodies = [*_pieces(state), (_SMALL, memoryview(b"".join(_small(state))))]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda one: obstore.put(store, f"{prefix}/{one[0]}", one[1], use_multipart=False), bodies))


def _obstore_load(state: State, place: Place) -> State:
    import obstore

    store, prefix = _client(place)

    def fetch(one: tuple[str, memoryview]) -> None:
        name, memory = one
        memory[:] = memoryview(obstore.get_range(store, f"{prefix}/{name}", start=0, end=len(memory)))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fetch, _pieces(state)))
    small = _small(state)
    _spread(obstore.get(store, f"{prefix}/{_SMALL}").bytes(), small)
    return state


def _fsspec_save(state: State, place: Place) -> None:
    filesystem, path = fsspec.url_to_fs(place.url, **place.storage_options)
    bodies = {f"{path}/{name}": memory for name, memory in _pieces(state)}
    bodies[f"{path}/{_SMALL}"] = memoryview(b"".join(_small(state)))

    async def put_all() -> None:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def put(name: str, body: memoryview) -> None:
            async with gate:
                await filesystem._pipe_file(name, bytes(body))  # noqa: SLF001 (the public call keeps all copies at once)

        await asyncio.gather(*(put(name, body) for name, body in bodies.items()))

    fsspec.asyn.sync(filesystem.loop, put_all)


def _fsspec_load(state: State, place: Place) -> State:
    filesystem, path = fsspec.url_to_fs(place.url, **place.storage_options)

    async def get_all() -> None:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def get(name: str, into: memoryview) -> None:
            async with gate:
                into[:] = await filesystem._cat_file(f"{path}/{name}")  # noqa: SLF001 (as above)

        await asyncio.gather(*(get(name, memory) for name, memory in _pieces(state)))

    fsspec.asyn.sync(filesystem.loop, get_all)
    _spread(filesystem.cat_file(f"{path}/{_SMALL}"), _small(state))
    return state


def _disk_save(state: State, place: Place) -> None:
    directory = Path(place.url)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "bytes").open("wb", buffering=0) as file:
        for _, memory in _pieces(state):
            file.write(memory)
        file.write(b"".join(_small(state)))
        os.fdatasync(file.fileno())


def _disk_load(state: State, place: Place) -> State:
    with (Path(place.url) / "bytes").open("rb", buffering=0) as file:
        for _, memory in _pieces(state):
            file.readinto(memory)
        _spread(file.read(), _small(state))
    return state


def _limit(title: str, save: Any, load: Any, schemes: frozenset[str]) -> Peer:
    return Peer(title=title, open=partial(Calls, saving=save, loading=load), schemes=schemes, is_limit=True)


RAW: Mapping[str, Peer] = {
    "raw-obstore": _limit("limit: obstore puts and gets", _obstore_save, _obstore_load, S3),
    "raw-fsspec": _limit("limit: s3fs or gcsfs puts and gets", _fsspec_save, _fsspec_load, REMOTE),
    "raw-disk": _limit("limit: write + fdatasync, read, as dd does", _disk_save, _disk_load, LOCAL),
}
