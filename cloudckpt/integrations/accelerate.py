"""Save what an `accelerate.Accelerator` knows of, straight to a URL, and go on from it.

```python
manager = CheckpointManager("s3://bucket/run-7", retention=KeepLast(3))
resumed = load_state(accelerator, manager)  # instead of accelerator.load_state(folder)
for epoch in range(resumed.step // len(loader), epochs):
    loader.set_epoch(epoch)
    for batch in resumed.batches(loader, skip=…):
        …
        save_state(accelerator, manager, step)  # instead of accelerator.save_state(folder)
```

**What is saved**: all that was prepared or registered: models (any wrapper), optimizers, schedulers, stateful loaders
(each rank's own), the gradient scaler, objects of `register_for_checkpointing` (rank 0's, as accelerate does), the
accelerator's `step` and `iteration`, and the generators of every rank.
**What accelerate still does itself**: preparing, skipping batches, `save_model`.
**Limits**: DeepSpeed, Megatron-LM and XLA, which save by themselves, and hooks that write into a folder, are refused.
An epoch has its order again with `DataLoaderConfiguration(use_seedable_sampler=True)` and `set_epoch`; else the log
warns. Data that draws numbers while it is read is one batch ahead.

Run with accelerate 1.15.0 and torch 2.13.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import RandomSampler

from cloudckpt import Checkpoint, CheckpointManager, PerRank, RandomState, RankZero
from cloudckpt.errors import OptionsError
from cloudckpt.integrations.framework import framework
from cloudckpt.root import Wanted

with framework("accelerate", lowest="1.15", extra="accelerate"):
    from accelerate import Accelerator
    from accelerate.data_loader import get_sampler
    from accelerate.utils import DistributedType

__all__ = ["Resumed", "load_state", "save_state", "state_of"]

logger = logging.getLogger(__name__)

_SAVES_ITSELF = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


def state_of(accelerator: Accelerator) -> dict[str, object]:
    """Return all that the accelerator saves, as the state of a manager: names → its own objects, not copied.

    The first of a kind has its plain name (`model`, `optimizer`, `scheduler`, `loader`, `custom`), further ones a
    number: `model_1`. Give it more before it is saved, and the same before it is restored.

    Raises:
        OptionsError: the accelerator is of a kind that saves by itself, or has hooks that write into a folder.
    """
    if accelerator.distributed_type in _SAVES_ITSELF:
        raise OptionsError(
            f"{accelerator.distributed_type.value} keeps its state by itself; call accelerator.save_state(folder) there"
        )
    loaders = [loader for loader in accelerator._dataloaders if getattr(loader, "use_stateful_dataloader", False)]
    return {
        **_numbered("model", accelerator._models),
        **_numbered("optimizer", (_inner(one, "optimizer") for one in accelerator._optimizers)),
        **_numbered("scheduler", (_inner(one, "scheduler") for one in accelerator._schedulers)),
        **_numbered("loader", map(PerRank, loaders)),
        **_numbered("custom", map(_of_first, accelerator._custom_objects)),
        **({} if accelerator.scaler is None else {"scaler": accelerator.scaler}),
        "accelerator": RankZero(_Counts(accelerator)),
    }


def save_state(
    accelerator: Accelerator,
    manager: CheckpointManager,
    step: int | None = None,
    *,
    metrics: Mapping[str, float] | None = None,
    in_background: bool = False,
    exists: Literal["raise", "skip"] = "raise",
) -> None:
    """Save what the accelerator knows of as the checkpoint of `step`; every process calls it.

    Args:
        accelerator: the job's.
        manager: of the root; its `retention` says what stays.
        step: how many steps were trained. None with `automatic_checkpoint_naming`: the accelerator's own number, as
            accelerate counts its folders; older ones beyond `total_limit` go then, once the new one is committed, as
            by the manager's `retention`: what is pinned or named, and other lines of history, stay.
        metrics: as for `manager.save`.
        in_background: copy the state, return, and upload it meanwhile (`manager.async_save`).
        exists: as for `manager.save`.

    Raises:
        OptionsError: what cannot be saved (`state_of`), no step, or a `total_limit` beside a save in the background.
        CloudCkptError: what `manager.save` raises.
    """
    project = accelerator.project_configuration
    if is_automatic := step is None:
        if not project.automatic_checkpoint_naming:
            raise OptionsError("no step is given; give one, or ProjectConfiguration(automatic_checkpoint_naming=True)")
        if in_background and project.total_limit is not None:
            raise OptionsError("total_limit waits for the commit; give the manager retention=KeepLast(…) instead")
        step = accelerator.save_iteration
    if accelerator._save_model_state_pre_hook:
        raise OptionsError(
            "a hook of register_save_state_pre_hook writes into a folder, and there is none; remove it, and give what "
            "it saves to accelerator.register_for_checkpointing, or save state_of(accelerator) with more in it"
        )
    project.iteration += 1  # before the state is taken, so that a job that resumes counts on
    try:
        save = manager.async_save if in_background else manager.save
        save(step, {**state_of(accelerator), "generators": RandomState()}, metrics, exists=exists)
    except BaseException:
        project.iteration -= 1
        raise
    if is_automatic and project.total_limit is not None:
        manager.prune(max(1, project.total_limit))


class Resumed:
    """What `load_state` found.

    Attributes:
        checkpoint: what the state came from; None after a fresh start.
    """

    def __init__(self, accelerator: Accelerator, checkpoint: Checkpoint | None, generators: RandomState) -> None:
        """Made by `load_state`."""
        self.checkpoint = checkpoint
        self._accelerator = accelerator
        self._generators = generators

    @property
    def step(self) -> int:
        """The step of the checkpoint; 0 after a fresh start."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    def batches(self, loader: Iterable[Any], *, skip: int = 0) -> Iterator[Any]:
        """Go through a loader without its first `skip` batches, which were trained before.

        A stateful loader knows where it stands, and skips nothing. Skipping moves the random number generators: they
        are what they were at the save when the first batch comes out. Later calls, of later epochs, only go through
        the loader.
        """
        if skip and not getattr(loader, "use_stateful_dataloader", False):
            loader = self._accelerator.skip_first_batches(loader, skip)
        for batch in loader:
            self._generators.apply()
            yield batch


def load_state(accelerator: Accelerator, manager: CheckpointManager, step: Wanted = "latest") -> Resumed:
    """Put back what `save_state` saved, into what was prepared and registered since; every process calls it.

    Args:
        accelerator: the job's, with as many models, optimizers and so on as at the save.
        manager: of the root.
        step: `latest`, `best`, or a step.

    Returns:
        The checkpoint, if there is one: `latest` and `best` of an empty root are a fresh start.

    Raises:
        OptionsError: what cannot be restored (`state_of`), or a hook that reads from a folder.
        CloudCkptError: what `manager.restore` raises.
    """
    if accelerator._load_model_state_pre_hook:
        raise OptionsError(
            "a hook of register_load_state_pre_hook reads from a folder, and there is none; remove it, and give what "
            "it loads to accelerator.register_for_checkpointing"
        )
    generators = RandomState()
    checkpoint = manager.restore({**state_of(accelerator), "generators": generators}, step)
    if checkpoint is not None and any(type(get_sampler(one)) is RandomSampler for one in accelerator._dataloaders):
        logger.warning(
            "a loader shuffles without a seed of its own: the rest of an epoch is drawn anew, so that samples come "
            "twice or not at all; give DataLoaderConfiguration(use_seedable_sampler=True)"
        )
    return Resumed(accelerator, checkpoint, generators)


class _Counts:
    """What an accelerator counts."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, object]:
        return {"step": self._accelerator.step, "iteration": self._accelerator.save_iteration}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._accelerator.step = state_dict["step"]
        self._accelerator.project_configuration.iteration = state_dict["iteration"]


def _of_first(registered: object) -> object:
    """Return a registered object as a part of the state: what ranks may have each in their own way is rank 0's."""
    return registered if isinstance(registered, nn.Module | Optimizer | PerRank | RandomState) else RankZero(registered)


def _inner(prepared: object, name: str) -> object:
    """Return what the accelerator has wrapped."""
    return getattr(prepared, name, prepared)


def _numbered(name: str, objects: Iterable[object]) -> dict[str, object]:
    return {f"{name}_{number}" if number else name: one for number, one in enumerate(objects)}
