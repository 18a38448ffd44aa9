"""Let torchtitan keep its checkpoints in a root of cloudckpt.

```python
checkpoint = CloudCheckpointManager.Config(enable=True, folder="s3://bucket/run-7", interval=500, async_mode="async")
```

in the place of `CheckpointManager.Config(…)` in a function of the config registry.

    Trainer.train ──load──▶ _load ──▶ the newest good checkpoint of the root, else initial_load_path
        each step ──save──▶ _save ──▶ due, or told to end? ──▶ one commit ──▶ exit, if told to end

**What is saved**: the model, optimizers and learning-rate schedulers under torchtitan's own flat names, which reshard
over any mesh; each rank's position in the data and its generators; the trainer's step and token count. The last step
saves the model alone in `export_dtype`, unless `last_save_model_only=False`.
**What torchtitan still does itself**: when to save (`interval`, `enable_first_step_checkpoint`, `load_only`), seed
checkpoints, and loading an `initial_load_path` in its own or Hugging Face's format; for one of cloudckpt give the URL
of a checkpoint. `keep_latest_k` is the number that stays.
**Limits**: `last_save_in_hf` is refused. With another number of ranks than saved, put `dataloader` into
`exclude_from_loading`: torchtitan itself cannot divide that anew.

Run with torchtitan 0.3.0 and torch 2.13.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from cloudckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointNotFoundError,
    KeepLast,
    OptionsError,
    PerRank,
    SaveHandle,
    StateMismatchError,
    load,
)
from cloudckpt.integrations.framework import framework

with framework("torchtitan", lowest="0.3.0", extra="torchtitan"):
    from torchtitan.components.checkpointer import DATALOADER, MODEL, OPTIMIZER
    from torchtitan.components.checkpointer import CheckpointManager as TorchtitanManager

__all__ = ["CloudCheckpointManager"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_MODEL_ONLY = "torchtitan_model_only"


class CloudCheckpointManager(TorchtitanManager):
    """torchtitan's manager of checkpoints over a root of cloudckpt.

    A notice that this machine goes (SIGTERM, or what the cloud says) saves the step it is at; then `save` waits for the
    commit and raises SystemExit with 143.

    Attributes:
        manager: the `CheckpointManager` that does it, for reports, pins and the like.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TorchtitanManager.Config):
        """torchtitan's, for a root: `folder` is its URL, or a directory below the dump folder.

        Attributes:
            async_mode: `disabled` waits for the commit; both others copy the state and save that in the background.
            preemption: save when notice is given, and exit.
        """

        preemption: bool = True

    folder: str
    save_future: SaveHandle | None

    def __init__(self, config: Config, *, base_folder: str = "", **kwargs: Any) -> None:
        """Open the root; made by `Config.build`, after the process group.

        Args:
            config: see `Config`.
            base_folder: what a folder that is no URL is below.
            kwargs: what torchtitan gives its own manager.

        Raises:
            OptionsError: a choice that cannot be kept here; with what to do.
        """
        if config.enable and config.last_save_in_hf:
            raise OptionsError(
                "last_save_in_hf writes a local folder beside the root: leave it out, and convert the last checkpoint "
                "with `cloudckpt convert`, or with torchtitan's scripts from cloudckpt.CloudReader"
            )
        # Neither its thread that purges nor its process group for DCP is of use.
        theirs: Any = config
        super().__init__(replace(theirs, keep_latest_k=0, async_mode="disabled"), base_folder=base_folder, **kwargs)
        if not self.enable:
            return
        self._is_async = config.async_mode != "disabled"
        self.manager = CheckpointManager(
            self.folder,
            retention=[KeepLast(config.keep_latest_k)] if config.keep_latest_k else (),
            preemption=config.preemption and not config.load_only,
        )

    # -- saving ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _save(self, curr_step: int, last_step: bool = False) -> bool:  # noqa: FBT001, FBT002 (torchtitan's)
        if self.load_only:
            return False
        # At each step, since the ranks vote on notices.
        is_told = self.manager.should_save(curr_step)
        is_due = is_told or self._should_save(curr_step, last_step)
        if is_due:
            self.maybe_wait_for_saving()
            self._save_now(curr_step, is_last=last_step)
        if self.manager.preempted and not last_step:  # after the last step all is done
            self.maybe_wait_for_saving()
            self.close()
            raise SystemExit(self.manager.exit_code)
        return is_due

    def _save_now(self, step: int, *, is_last: bool) -> None:
        if is_last and self.last_save_model_only:
            self.manager.save(step, {MODEL: self._exported()}, metadata={_MODEL_ONLY: True})
        elif self._is_async and not is_last:
            self.save_future = self.manager.async_save(step, self._state())
        else:
            self.manager.save(step, self._state())

    def _state(self) -> dict[str, Any]:
        # The flat dicts, not their owners: each pipeline stage has other names, and what is loaded fills these tensors.
        own = self.states[OPTIMIZER].state_dict()
        optimizer = _with_values_of_all(own)
        self._is_staged = optimizer is not own
        loader = self.states[DATALOADER]
        return {
            **self.states,
            MODEL: self.states[MODEL].state_dict(),
            OPTIMIZER: optimizer,
            DATALOADER: None if loader is None else PerRank(loader),
        }

    def _exported(self) -> dict[str, Any]:
        return {
            name: value.to(self.export_dtype)
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for name, value in self.states[MODEL].state_dict().items()
        }

    def _maybe_wait_for_staging(self) -> None:
        """Do nothing: a save returns when all is copied."""

    def _wait_for_saving(self) -> None:
        handle: Any = self.save_future
        self.save_future = None
        handle.result()

    # -- loading -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _load(self, step: int = -1) -> bool:
        manager = self.manager
        if step == -1:
            meant = manager.latest()
        else:
            meant = next((found for found in reversed(manager.checkpoints()) if found.step == step), None)
        if meant is None and step == -1:
            return self._load_initial()
        is_model_only = meant is not None and bool(meant.metadata.get(_MODEL_ONLY))
        if meant is not None and is_model_only and meant.step > 0:
            raise OptionsError(
                f"the checkpoint of step {meant.step} in {manager.url} is the last of a training that has ended, and "
                "holds the model alone: to train on choose an earlier load_step; to begin anew from this model choose "
                f"another folder and initial_load_path={meant.url}; to have the last one hold everything, "
                "last_save_model_only=False"
            )
        if missing := set(self.exclude_from_loading) - set(self.states):
            raise OptionsError(f"exclude_from_loading names {sorted(missing)}; there are {sorted(self.states)}")
        only = [MODEL] if meant is not None and meant.step == 0 else self._included()
        wanted: Literal["latest"] | int = "latest" if step == -1 else step
        self._restored(lambda state, strict: manager.restore(state, wanted, only=only, strict=strict), only)
        return True

    def _included(self) -> list[str] | None:
        """Return what is to be loaded, None for everything, with each rank's generators."""
        if not self.exclude_from_loading:
            return None
        return [name for name in self.states if name not in self.exclude_from_loading]

    def _restored(
        self, restore: Callable[[dict[str, Any], bool], Checkpoint | None], only: Sequence[str] | None
    ) -> None:
        state = self._state()
        # Of other pipeline stages a rank has nothing; what it has must be there all the same.
        found = restore(state, not self._is_staged)
        if found is not None and found.fit is not None and found.fit.missing:
            raise StateMismatchError(f"{found.url} lacks {', '.join(found.fit.missing)}; all else was restored")
        for name in (MODEL, OPTIMIZER):
            if only is None or name in only:
                self.states[name].load_state_dict(state[name])

    def _load_initial(self) -> bool:
        path = self.initial_load_path
        if path is not None and not self.initial_load_in_hf:
            only = [MODEL] if self.initial_load_model_only else self._included()
            try:
                self._restored(lambda state, strict: load(state, path, only=only, strict=strict), only)
            except CheckpointNotFoundError:
                logger.info("%s holds no checkpoint of cloudckpt; torchtitan loads it", path)
            else:
                return True
        if path is None and not self.initial_load_in_hf:
            return False
        # A folder that nobody has sends torchtitan to what it loads initially.
        ours, self.folder = self.folder, f"{tempfile.gettempdir()}/{secrets.token_hex()}"
        try:
            return bool(super()._load())
        finally:
            self.folder = ours

    def _close(self) -> None:
        # Also called by the deleter of an object that was never made whole.
        if (manager := getattr(self, "manager", None)) is not None:
            manager.close()


def _with_values_of_all(flat: dict[str, Any]) -> dict[str, Any]:
    """Add the plain values of other pipeline stages, because a state has the same ones on all ranks."""
    values = {name: value for name, value in flat.items() if not isinstance(value, torch.Tensor)}
    names = hashlib.sha256("\0".join(sorted(values)).encode()).hexdigest()
    if len(set(_of_all(names))) == 1:
        return flat
    return {name: value for others in _of_all(values) for name, value in others.items()} | flat


def _of_all(mine: _T) -> list[_T]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
