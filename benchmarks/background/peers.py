"""Turn each way to save in the background into the same calls: save and go on, ask whether it is done, load back.

`save` returns as soon as the caller may change the state again: a peer that stages in the background is waited for,
because a step that changes half of what is being copied makes a checkpoint that never was. `open` is called once per
process, so that a peer keeps from save to save what a job would keep: a manager, a stager with its buffers. Knows
nothing of clocks or counters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save

from benchmarks.peers import STOCK, Place
from benchmarks.shared.states import State

__all__ = ["ASYNC_PEERS", "AsyncPeer", "AsyncPeerKind", "Pending"]


class Pending(Protocol):
    """A save that goes on in the background."""

    def done(self) -> bool:
        """Whether it has ended, well or badly."""
        ...

    def result(self, timeout: float | None = None) -> object:
        """Wait for its end; raise what it failed with."""
        ...


class AsyncPeer(Protocol):
    """One way to save in the background, open at one place."""

    def prepare(self, state: State) -> None:
        """Let the peer make ready in the background what the first save will need, if it can."""
        ...

    def save(self, step: int, state: State) -> Pending:
        """Begin to save under `step`; return when the caller may change the state."""
        ...

    def load(self, step: int, state: State) -> None:
        """Restore in place what was saved under `step`."""
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncPeerKind:
    """What the tables call a peer, where it writes, and how it is opened.

    Attributes:
        open: makes the peer, with the memory in bytes that a save may take, where the peer knows such a limit.
        does_prepare: whether `prepare` does something.
        has_budget: whether it knows a limit of memory.
        needs_cuda: whether it stages through pinned memory.
    """

    title: str
    open: Callable[[Place, int], AsyncPeer]
    does_prepare: bool = False
    has_budget: bool = False
    needs_cuda: bool = False
    is_for_local: bool = False
    is_for_s3: bool = False


class _CloudCkpt:
    """A manager, as a job keeps it."""

    def __init__(self, place: Place, budget_bytes: int, *, engine: str, does_prepare: bool) -> None:
        import cloudckpt

        self._does_prepare = does_prepare
        self._manager: Any = cloudckpt.CheckpointManager(
            place.url,
            storage_options=place.storage_options,
            engine=engine,
            options=cloudckpt.Options(memory_budget_bytes=budget_bytes),
        )

    def prepare(self, state: State) -> None:
        if self._does_prepare:
            self._manager.prepare(dict(state))

    def save(self, step: int, state: State) -> Pending:
        handle: Pending = self._manager.async_save(step, dict(state))
        return handle

    def load(self, step: int, state: State) -> None:
        self._manager.wait()
        if self._manager.restore(dict(state), step) is None:
            raise RuntimeError(f"the manager found no step {step} at {self._manager.url}")

    def close(self) -> None:
        self._manager.close()


class _Dcp:
    """`dcp.async_save` over its own storage classes; without a stager it takes the one that it takes by default."""

    def __init__(self, place: Place, budget_bytes: int, *, staging: StagingOptions | None = None) -> None:
        self._place = place
        self._stager = DefaultStager(staging) if staging else None

    def prepare(self, state: State) -> None:
        """Nothing: its buffers are made by the first save."""

    def save(self, step: int, state: State) -> Pending:
        writer = self._class(FileSystemWriter, FsspecWriter)(self._url(step), **self._place.storage_options)
        begun = dcp_async_save(dict(state), storage_writer=writer, async_stager=self._stager)
        if not isinstance(begun, AsyncSaveResponse):
            return begun
        begun.staging_completion.result()
        return begun.upload_completion

    def load(self, step: int, state: State) -> None:
        reader = self._class(FileSystemReader, FsspecReader)(self._url(step), **self._place.storage_options)
        dcp_load(dict(state), storage_reader=reader)

    def close(self) -> None:
        if self._stager:
            self._stager.close()

    def _class(self, local: Any, remote: Any) -> Any:
        return local if self._place.is_local else remote

    def _url(self, step: int) -> str:
        return f"{self._place.url}/step-{step}"


def _cloudckpt(engine: str, *, does_prepare: bool = True, title: str, **where: bool) -> AsyncPeerKind:
    return AsyncPeerKind(
        title=title,
        open=partial(_CloudCkpt, engine=engine, does_prepare=does_prepare),
        does_prepare=does_prepare,
        has_budget=True,
        **where,
    )


_PAGEABLE = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)
_PINNED = StagingOptions(
    use_pinned_memory=True, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=True
)
_BOTH = {"is_for_local": True, "is_for_s3": True}

ASYNC_PEERS: Mapping[str, AsyncPeerKind] = {
    "cloudckpt-obstore": _cloudckpt("obstore", title="cloudckpt, engine obstore", is_for_s3=True),
    "cloudckpt-fsspec": _cloudckpt("fsspec", title="cloudckpt, engine fsspec (s3fs)", is_for_s3=True),
    "cloudckpt-obstore-unprepared": _cloudckpt(
        "obstore", does_prepare=False, title="cloudckpt, engine obstore, without `prepare`", is_for_s3=True
    ),
    "cloudckpt": _cloudckpt("auto", title="cloudckpt", is_for_local=True),
    "cloudckpt-unprepared": _cloudckpt(
        "auto", does_prepare=False, title="cloudckpt, without `prepare`", is_for_local=True
    ),
    STOCK: AsyncPeerKind(title="stock dcp.async_save", open=_Dcp, **_BOTH),
    "dcp-kept": AsyncPeerKind(
        title="dcp.async_save, one DefaultStager kept", open=partial(_Dcp, staging=_PAGEABLE), **_BOTH
    ),
    "dcp-pinned": AsyncPeerKind(
        title="dcp.async_save, one pinned DefaultStager kept",
        open=partial(_Dcp, staging=_PINNED),
        needs_cuda=True,
        **_BOTH,
    ),
}
