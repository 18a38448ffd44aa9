"""Save the checkpoints of a Hugging Face `Trainer`, and of TRL's, straight to a URL, and go on from it.

```python
class CloudTrainer(CloudCheckpoints, Trainer): ...  # or SFTTrainer, DPOTrainer, …


trainer = CloudTrainer(model=model, args=args, train_dataset=data, checkpoints="s3://bucket/run-7")
trainer.train(resume_from_checkpoint=True)  # the newest good one; from the start, where there is none
```

**What is saved**, whenever the Trainer saves: the model (of a PEFT model the adapters alone), optimizer, scheduler,
gradient scaler, each rank's generators, the Trainer's own state with its log and that of its callbacks; and beside the
tensors, as files, configurations and tokenizer (`manager.restore_files`).
**What the Trainer still does itself**: when to save (`save_strategy`, `save_steps`), which is the best, skipping of
batches, `save_model`. `save_total_limit`, `save_only_model` and `load_best_model_at_end` mean what they always mean.
**Limits**: DeepSpeed, SageMaker's model parallelism, XLA, a hyperparameter search, and pushing of checkpoints to the
Hub are refused. `output_dir` stays a local directory, for what is no checkpoint.

Run with transformers 5.24.0, accelerate 1.15.0, peft 0.21.2, trl 1.16.0 and torch 2.13.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cloudckpt import Checkpoint, CheckpointManager, RandomState, RankZero, SaveHandle, Trainable
from cloudckpt.errors import IntegrityError, OptionsError
from cloudckpt.integrations.framework import framework

with framework("transformers", lowest="5.24", extra="transformers"):
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState, TrainerControl
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

__all__ = ["CloudCheckpoints"]

logger = logging.getLogger(__name__)

_BEST, _BARE = "best_global_step", "save_only_model"


class CloudCheckpoints(Trainer):
    """A Trainer whose checkpoints are those of a `CheckpointManager`; put it before another Trainer to extend that.

    Saves are made in the background (`manager.async_save`). A notice that this machine goes (SIGTERM, or what the
    cloud says) saves the step it is at, without an evaluation, and `train` then exits with the manager's `exit_code`.

    Attributes:
        checkpoints: the manager.
    """

    def __init__(self, *args: Any, checkpoints: str | os.PathLike[str] | CheckpointManager, **kwargs: Any) -> None:
        """Make the Trainer.

        Args:
            args: the Trainer's.
            checkpoints: the root's URL, with credentials as ever; or a manager, for whatever else is to be chosen, as
                its retention, which `save_total_limit` is for a URL. With several processes, make it when the
                `TrainingArguments` are made. Who made the manager closes it.
            kwargs: the Trainer's.

        Raises:
            OptionsError: an argument of the Trainer that asks for what cannot be done here; with what to do.
        """
        super().__init__(*args, **kwargs)
        self._refuse_what_saves_elsewhere()
        if isinstance(checkpoints, CheckpointManager):
            if self.args.save_total_limit is not None:
                raise OptionsError("save_total_limit is the manager's affair: give it retention=[KeepLast(…)]")
            self.checkpoints = checkpoints
        else:
            self._limit = self.args.save_total_limit or 0
            rule = self._kept if self._limit > 0 else ()
            can_hear = threading.current_thread() is threading.main_thread()
            if not can_hear:
                logger.warning("SIGTERM gives no notice in a thread; give a manager with a Preemption(check=…)")
            self.checkpoints = CheckpointManager(checkpoints, retention=rule, preemption=can_hear)
        self._generators = RandomState()
        self._resumed: tuple[str, Checkpoint] | None = None
        # The newest save of this training that was the best.
        self._best: SaveHandle | None = None
        self._folder = ""
        self.add_callback(_Notices(self.checkpoints))

    def _refuse_what_saves_elsewhere(self) -> None:
        args = self.args
        if "://" in str(args.output_dir):
            raise OptionsError(
                f"output_dir={str(args.output_dir)!r} would be a local directory of that name: give the URL as "
                "checkpoints=…, and a local directory as output_dir"
            )
        if self.is_deepspeed_enabled or self.is_fsdp_xla_enabled:
            raise OptionsError("DeepSpeed and XLA save by themselves; leave CloudCheckpoints out there, or use FSDP")
        if args.push_to_hub and args.hub_strategy != "end":
            raise OptionsError("no checkpoint is in output_dir to be pushed: give hub_strategy='end'")
        if args.enable_jit_checkpoint:
            raise OptionsError("enable_jit_checkpoint would hear SIGTERM, too; leave it out: the manager saves then")
        if getattr(self, "use_adaptive_entropy", False):
            raise OptionsError("use_adaptive_entropy keeps a state in a folder that is not there; leave it out")

    # -- what is saved -------------------------------------------------------------------------------------

    def checkpoint_model(self) -> dict[str, object]:
        """Return the part of the state that a best model is loaded from; extend it for weights of your own."""
        model: nn.Module = self.model
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if not hasattr(inner, "peft_config"):
            return {"model": model}
        from cloudckpt.integrations.peft import Adapter

        # Adapters that are not trained may have been made at random; a new process would make others.
        active = inner.active_adapters  # a method, where a model of transformers itself has adapters
        idle = [name for name in inner.peft_config if name not in (active() if callable(active) else active)]
        return {"model": Trainable(model), **{f"adapter {name}": Adapter(inner, name) for name in idle}}

    def checkpoint_state(self) -> dict[str, object]:
        """Return all that a checkpoint holds beside its model and the Trainer's log; extend it for what you train by.

        ```python
        def checkpoint_state(self):
            return {**super().checkpoint_state(), "ema": self.ema}
        ```
        """
        scaler = getattr(self.accelerator, "scaler", None)
        return {
            "optimizer": getattr(self.optimizer, "optimizer", self.optimizer),
            "scheduler": self.lr_scheduler,
            **({} if scaler is None else {"scaler": scaler}),
            "generators": self._generators,
        }

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Save where the Trainer saves a folder."""
        self.store_flos()
        self._note_callbacks()
        state, step = self.state, self.state.global_step
        text = json.dumps({**dataclasses.asdict(state), "best_model_checkpoint": self._local_best()})
        handle = self.checkpoints.async_save(
            step,
            {
                **self.checkpoint_model(),
                **({} if self.args.save_only_model else self.checkpoint_state()),
                "trainer": RankZero(text),
            },
            metrics=_metrics(state.log_history, step),
            metadata={_BEST: state.best_global_step, _BARE: bool(self.args.save_only_model)},
            files=self._files(),
            exists="skip",
        )
        if state.best_global_step == step:
            self._best = handle
        if self.checkpoints.preempted:
            # Not before: the flag is a part of what is saved.
            self.control.should_training_stop = True

    def _files(self) -> dict[str, str]:
        """Return what makes weights a model that can be loaded: configurations and the tokenizer, written once."""
        folder = Path(self._folder, "model")
        if not folder.exists() and self.is_world_process_zero():
            folder.mkdir()
            inner = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            found = [getattr(inner, name, None) for name in ("config", "generation_config")]
            for one in (*found, self.processing_class):
                if hasattr(one, "save_pretrained"):
                    one.save_pretrained(folder)
            if isinstance(adapters := getattr(inner, "peft_config", None), dict):
                for name, one in adapters.items():
                    one.save_pretrained(folder if name == "default" else folder / name)
        return {"model/": os.fspath(folder)} if folder.exists() and any(folder.iterdir()) else {}

    def _note_callbacks(self) -> None:
        """Have the Trainer's state hold that of its callbacks, as they are now."""
        found: dict[str, list[object]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                found.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks.update({name: one if one[1:] else one[0] for name, one in found.items()})

    def _kept(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Keep as many as `save_total_limit` says, the newest, and the best that the newest knows of."""
        newest = checkpoints[-1]
        kept = [one for one in checkpoints[:-1] if one.step == newest.metadata.get(_BEST)][-1:]
        others = [one for one in reversed(checkpoints[:-1]) if one not in kept]
        return [newest, *kept, *others[: max(0, self._limit - 1 - len(kept))]]

    # -- going on ------------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> TrainOutput:
        """Train, from where a checkpoint stands.

        Args:
            resume_from_checkpoint: True or `latest` for the newest good checkpoint, or a fresh start where there never
                was one; `best`, by the manager's first `KeepBest` rule; a step; the URL of a checkpoint of this root;
                or a local folder of the Trainer's own, to go on from what was saved before. A training that goes on
                from no checkpoint of this root is a run of its own there: it leaves alone what other processes saved
                before, and `save_total_limit` counts what this one did.
            trial: as for the Trainer.
            ignore_keys_for_eval: as for the Trainer.

        Raises:
            OptionsError: no such checkpoint, or a hyperparameter search.
            SystemExit: this machine goes, and the step is saved.
            CloudCkptError: a save failed, or a checkpoint cannot be restored.
        """
        if trial is not None:
            raise OptionsError("a hyperparameter search has many runs, and this is the root of one; search without it")
        with tempfile.TemporaryDirectory(prefix="cloudckpt-") as folder:
            self._folder = folder
            result = self._train_from(resume_from_checkpoint, ignore_keys_for_eval)
            self.checkpoints.wait()
        if self.checkpoints.preempted:
            sys.exit(self.checkpoints.exit_code)
        return result

    def _train_from(self, wanted: Any, ignored: list[str] | None) -> TrainOutput:
        """Train from what is wanted; from an older checkpoint if the newest was wanted and turns out to be corrupt."""
        resume, corrupt = self._staged(wanted), None
        while True:
            try:
                return super().train(resume, None, ignored)
            except IntegrityError as exc:
                if wanted is not True or self._resumed is None or exc is corrupt:
                    raise
                bad, corrupt = self._resumed[1], exc
                older = [one for one in self.checkpoints.checkpoints() if one.order < bad.order]
                if not older:
                    raise
                logger.warning("%s is corrupt (%s); the next older one is taken", bad.url, exc)
                if getattr(self, "neftune_hook_handle", None) is not None:
                    self.neftune_hook_handle.remove()  # which `train` adds once more
                resume = self._staged(older[-1])

    def _staged(self, wanted: Any) -> str | None:
        """Put the Trainer's own state of a checkpoint into a folder, where the Trainer looks for it."""
        self._resumed = self._best = None
        if wanted is None or wanted is False:
            self.checkpoints.begin_anew()
            return None
        if isinstance(wanted, str | os.PathLike) and wanted not in ("latest", "best"):
            if Path(wanted).is_dir():
                self.checkpoints.begin_anew()
                return os.fspath(wanted)
            wanted = self._at(os.fspath(wanted))
        trainer = RankZero("")
        checkpoint = self.checkpoints.restore(
            {"trainer": trainer}, "latest" if wanted is True else wanted, only="trainer"
        )
        if checkpoint is None:
            return None
        Path(self._folder, "trainer_state.json").write_text(str(trainer.value), encoding="utf-8")
        self._resumed = self._folder, checkpoint
        return self._folder

    def _at(self, url: str) -> Checkpoint:
        """Return the checkpoint at a URL."""
        found = self.checkpoints.checkpoints()
        for checkpoint in found:
            if checkpoint.url == url.rstrip("/"):
                return checkpoint
        raise OptionsError(
            f"{url} is no checkpoint of {self.checkpoints.url}, and no folder; there are "
            f"{', '.join(one.url for one in found[-3:]) or 'none'}"
        )

    def _is_ours(self, folder: object) -> bool:
        return self._resumed is not None and folder == self._resumed[0]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Leave it to `_load_optimizer_and_scheduler`, when all is there that is restored at once."""
        if not self._is_ours(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is None or not self._is_ours(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        found = self._resumed[1]
        state = self.checkpoint_model()
        if found.metadata.get(_BARE):
            logger.warning("%s was saved by save_only_model: optimizer, scheduler and generators begin anew", found.url)
            self.checkpoints.restore(state, found, only=list(state))
        else:
            self.checkpoints.restore({**state, **self.checkpoint_state(), "trainer": RankZero("")}, found)
        self.state.best_model_checkpoint = self._best_place()

    def _load_scaler(self, checkpoint: str | None) -> None:
        if not self._is_ours(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Give the generators what was restored once more: batches were skipped meanwhile."""
        if self._is_ours(checkpoint):
            self._generators.apply()
        else:
            super()._load_rng_state(checkpoint)

    # -- the best one --------------------------------------------------------------------------------------

    def _best_checkpoint(self) -> Checkpoint | None:
        """Return that of the best step, of this training or of what it has gone on from; None if there is none."""
        step = self.state.best_global_step
        if not step:
            return None
        if self._best is not None and self._best.step == step:
            last = None if self._best.exception() else self._best.result()
        else:
            last = None if self._resumed is None else self._resumed[1]
        if last is None:
            return None
        found = reversed(self.checkpoints.checkpoints())
        return next((one for one in found if one.step == step and one.order <= last.order), None)

    def _local_best(self) -> str | None:
        """Return the Trainer's own folder of the best step, from which a training has gone on."""
        folder = self.state.best_model_checkpoint
        is_it = folder and folder.rstrip("/").endswith(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        return folder if is_it and Path(folder).is_dir() else None

    def _best_place(self) -> str | None:
        best = self._best_checkpoint()
        return self._local_best() if best is None else best.url

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.checkpoints.wait()
        self.state.best_model_checkpoint = place = self._best_place()
        if self.args.load_best_model_at_end and place is None:
            logger.warning(
                "the best model, of step %s, is not loaded: neither %s nor a local folder has it; the model is that of "
                "step %d",
                *(self.state.best_global_step, self.checkpoints.url, self.state.global_step),
            )
        # By it the Trainer would remove folders of its own that a training has gone on from.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        if self.checkpoints.preempted:
            return
        if (best := self._best_checkpoint()) is None:
            super()._load_best_model()
            return
        state = self.checkpoint_model()
        self.checkpoints.restore(state, best, only=list(state))


class _Notices(TrainerCallback):
    """Ask the manager after every step whether to save, and end training when this machine goes."""

    def __init__(self, checkpoints: CheckpointManager) -> None:
        self._checkpoints = checkpoints

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        is_due = self._checkpoints.should_save(state.global_step)
        if is_due:
            control.should_save = True
        if self._checkpoints.preempted:
            control.should_evaluate = False  # there is no time for it
            control.should_training_stop = control.should_training_stop or not is_due

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self._checkpoints.preempted:
            control.should_evaluate = control.should_save = False


def _metrics(history: Sequence[dict[str, object]], step: int) -> dict[str, float]:
    """Return what was logged at a step."""
    found: dict[str, float] = {}
    for entry in history:
        if entry.get("step") == step:
            found.update({name: float(value) for name, value in entry.items() if isinstance(value, int | float)})
    found.pop("step", None)
    return found
