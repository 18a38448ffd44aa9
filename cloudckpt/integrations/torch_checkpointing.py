"""Save and load the payloads of PyTorch's torch_checkpointing in a root of cloudckpt.

```python
manager = CloudPayloads("s3://bucket/run-7")  # in the place of torch_checkpointing.CheckpointManager(…)
manager.save("step_1000", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1000})
manager.load(manager.latest(), into={"model": model.state_dict(), "optimizer": optimizer.state_dict()})
```

    {item: value} ──save──▶ a copy ──in the background──▶ one commit, which knows its id ──load──▶ into the same tensors

**What is saved**: what the mapping holds, on all ranks together. A DTensor is one tensor, and is loaded over any mesh
without a resharder or a schema. What each rank has for itself stands in `cloudckpt.PerRank`.
**What torch_checkpointing still does itself**: nothing of a save or a load; its stager, its helper process, its barrier
and its TCP store are not made. Its checkpoints of before are loaded with its own manager, or by `cloudckpt convert`.
**Limits**: an id ends with the number of its step, and stands for one checkpoint. A plain tensor that differs by rank
is refused, where torch_checkpointing writes a file for each rank. Layouts, callbacks and its `Storage` are not served:
that commits by the rename of a directory, which no object store has.

Run with torch_checkpointing 0.1.1 and torch 2.13.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self

from cloudckpt import Checkpoint, CheckpointManager, CheckpointNotFoundError, OptionsError, SaveHandle
from cloudckpt.integrations.framework import framework

with framework("torch_checkpointing", lowest="0.1.1", extra="torch-checkpointing"):
    from torch_checkpointing.types import ItemKey

__all__ = ["CloudPayloads"]

_ID = "torch_checkpointing_id"
_NUMBER = re.compile(r"(\d+)/*$")


class CloudPayloads:
    """torch_checkpointing's manager, `save(id, mapping)` and `load(id, into)`, over a `CheckpointManager`.

    With several ranks each has one, and calls the same of it.

    Attributes:
        manager: what saves and loads, for its retention, preemption and reports.
    """

    def __init__(self, checkpoints: str | os.PathLike[str] | CheckpointManager, *, background: bool = True) -> None:
        """Open a root.

        Args:
            checkpoints: its URL, or a manager with whatever else is to be chosen; who made that closes it, too.
            background: return from a save when all is copied; else when it is committed.
        """
        self._owns = not isinstance(checkpoints, CheckpointManager)
        self.manager = (
            checkpoints
            if isinstance(checkpoints, CheckpointManager)
            else CheckpointManager(checkpoints, save_rng=False)
        )
        self._background = background

    def save(self, checkpoint_id: str, checkpoint: Mapping[ItemKey, Any]) -> SaveHandle | None:
        """Save a payload; an earlier save under way is waited for.

        Args:
            checkpoint_id: what it is called, with the number of its step at the end, as `step_1000`.
            checkpoint: item → tensor, container of them, plain value, or object with state_dict.

        Returns:
            The save in the background, which is asked as a Future is; None if it is committed.

        Raises:
            OptionsError: an id without a number.
            CheckpointExistsError: this job has saved that step.
            CloudCkptError: as `CheckpointManager.async_save` raises.
        """
        step, metadata = _step_of(checkpoint_id), {_ID: _plain(checkpoint_id)}
        if self._background:
            return self.manager.async_save(step, dict(checkpoint), metadata=metadata)
        self.manager.save(step, dict(checkpoint), metadata=metadata)
        return None

    def load(
        self, checkpoint_id: str, into: Mapping[ItemKey, Any] | None = None, *, strict: bool = True
    ) -> dict[ItemKey, Any]:
        """Load a payload into the tensors of `into`, or into new ones; what else it holds is not read.

        Args:
            checkpoint_id: as it was saved.
            into: item → live value, as for `save`; None for all items in new host tensors, on each rank.
            strict: refuse a checkpoint that lacks something of `into`; torch_checkpointing does not, unless told to.

        Returns:
            The items: those of `into` with their tensors filled and their plain values replaced.

        Raises:
            CheckpointNotFoundError: nothing is committed under that id; says which ids there are.
            CloudCkptError: as `CheckpointManager.restore` raises.
        """
        found = self._found(checkpoint_id)
        if into is None:
            return self.manager.read(found)
        state = dict(into)
        self.manager.restore(state, found, strict=strict, only=list(state))
        return state

    def ids(self) -> list[str]:
        """Return the ids of all that is committed, oldest first."""
        return [str(found.metadata[_ID]) for found in self._all()]

    def latest(self) -> str | None:
        """Return the id of the newest payload, None if nothing was ever saved."""
        return next(reversed(self.ids()), None)

    def _all(self) -> list[Checkpoint]:
        return [found for found in self.manager.checkpoints() if _ID in found.metadata]

    def _found(self, checkpoint_id: str) -> Checkpoint:
        wanted, known = _plain(checkpoint_id), self._all()
        for found in reversed(known):
            if found.metadata[_ID] == wanted:
                return found
        there = ", ".join(str(found.metadata[_ID]) for found in known[-5:]) or "nothing"
        raise CheckpointNotFoundError(f"no checkpoint {wanted!r} in {self.manager.url}; there is {there}")

    def prewarm_staging(self, checkpoint: Mapping[ItemKey, Any]) -> None:
        """Make the memory ready that a save in the background copies to."""
        self.manager.prepare(dict(checkpoint))

    def lock(self) -> AbstractContextManager[None]:
        """Return what need not be waited for: `save` returns when all is copied."""
        return nullcontext()

    def close(self) -> None:
        """Wait for a save under way; close the manager, unless it was given.

        Raises:
            SaveFailedError: a save failed and nobody was told.
        """
        if self._owns:
            self.manager.close()
        else:
            self.manager.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owns:
            self.manager.__exit__(kind, error, trace)


def _plain(checkpoint_id: str) -> str:
    return os.fspath(checkpoint_id).rstrip("/")


def _step_of(checkpoint_id: str) -> int:
    found = _NUMBER.search(os.fspath(checkpoint_id))
    if found is None:
        raise OptionsError(f"the id {checkpoint_id!r} names no step: let it end with the number of one, as step_1000")
    return int(found[1])
