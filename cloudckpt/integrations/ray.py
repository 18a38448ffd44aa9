"""Save the state of a Ray Train run straight to a root of cloudckpt, and report to Ray a pointer to it.

```python
def train(config):  # on each worker
    with RayCheckpoints("s3://bucket/run-7", keep=KEEP) as checkpoints:
        restored = checkpoints.restore(state)
        for step in range(restored.step + 1 if restored else 1, total):
            loss = train_step()
            if step % 100 == 0 or checkpoints.is_preempted():
                checkpoints.report(step, state, {"loss": float(loss)})


KEEP = CheckpointConfig(num_to_keep=3)
TorchTrainer(train, run_config=RunConfig(checkpoint_config=KEEP, failure_config=FailureConfig(max_failures=3)), …).fit()
```

    all workers ──one commit──▶ root        worker 0 ──a file with its URL──▶ ray.train.report ──▶ Result.checkpoint
    a new group of workers ──restore──▶ the newest good checkpoint of the root, whether Ray was told of it or not

**What is saved**: a state as `CheckpointManager` takes it, once, by all workers together; from any number of workers to
any other.
**What Ray Train still does itself**: workers and their restarts, metrics, and its own list of checkpoints, each of them
a small file. `num_to_keep` of a `CheckpointConfig` that is given as `keep` holds for both lists: what Ray names stays
in the root until a save after Ray let go of it, so each `Result.checkpoint` leads to a state wherever a worker dies.
**Limits**: `Result.checkpoint` has the URL of the state, not the state (`url_of`). A report returns when its save is
committed. A root is of one run; give another run another one.

Run with ray 2.60.0 and torch 2.13.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import tempfile
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cloudckpt import (
    Checkpoint,
    CheckpointManager,
    IntegrityError,
    KeepBest,
    KeepLast,
    OptionsError,
    RetentionRule,
)
from cloudckpt.integrations.framework import framework

with framework("ray", lowest="2.60", extra="ray"):
    import ray.train
    from ray.train import CheckpointConfig, CheckpointConsistencyMode

__all__ = ["KeepReported", "RayCheckpoints", "rules_of", "url_of"]

logger = logging.getLogger(__name__)

_POINTER = "cloudckpt.json"
# Ray looks at what its workers report every second or so.
_PATIENCE_S = 10.0


def url_of(checkpoint: ray.train.Checkpoint) -> str:
    """Return the URL of the state that a checkpoint of Ray stands for, for `cloudckpt.load` and `cloudckpt.read`.

    Args:
        checkpoint: as `Result.checkpoint` or `ray.train.get_checkpoint()` return it.

    Raises:
        OptionsError: it was not made by `RayCheckpoints`.
        IntegrityError: its file cannot be read.
    """
    with checkpoint.as_directory() as folder:
        path = Path(folder, _POINTER)
        if not path.is_file():
            raise OptionsError(f"{checkpoint} holds no {_POINTER}: RayCheckpoints has not made it; load it with Ray")
        try:
            return str(json.loads(path.read_bytes())["url"])
        except (ValueError, KeyError, TypeError) as exc:
            raise IntegrityError(f"{_POINTER} of {checkpoint} is no pointer of RayCheckpoints") from exc


class RayCheckpoints:
    """The checkpoints of one run of Ray Train; each worker makes one in its training function, and calls the same.

    Attributes:
        manager: what saves and restores, for pins, reports and what else it can.
    """

    def __init__(
        self,
        checkpoints: str | os.PathLike[str] | CheckpointManager,
        *,
        keep: CheckpointConfig | None = None,
    ) -> None:
        """Open a root.

        Args:
            checkpoints: its URL; or a manager with whatever else is to be chosen, which who made it closes.
            keep: what Ray was given as `RunConfig(checkpoint_config=…)`, to be kept in the root as well; None for all.

        Raises:
            OptionsError: both a manager, which has rules of its own, and `keep`; or a relative path.
        """
        self._owns = not isinstance(checkpoints, CheckpointManager)
        if isinstance(checkpoints, CheckpointManager):
            if keep is not None:
                raise OptionsError("keep goes with a URL; give the manager retention=[KeepLast(…)] instead")
            self.manager = checkpoints
        else:
            if "://" not in os.fspath(checkpoints) and not Path(checkpoints).is_absolute():
                raise OptionsError(
                    f"{os.fspath(checkpoints)} is relative, and Ray gives each worker a working directory of its own, "
                    "which goes with the run; give an absolute path, or a URL"
                )
            self.manager = CheckpointManager(checkpoints, retention=rules_of(keep))
        self._is_noticed = False

    def restore(self, state: MutableMapping[str, object], **how: Any) -> Checkpoint | None:
        """Restore the newest good checkpoint of the root into a state; None where nothing was ever saved.

        Args:
            state: as for `CheckpointManager.restore`.
            how: as for that.

        Raises:
            CloudCkptError: as that raises.
        """
        return self.manager.restore(state, **how)

    def report(
        self, step: int, state: MutableMapping[str, object] | None, metrics: Mapping[str, Any]
    ) -> Checkpoint | None:
        """Save a state as that of a step, then report metrics and a pointer to it to Ray, on each worker.

        Ray is told of nothing that is not committed. Killed in between, the run goes on from what is committed.

        Args:
            step: the training step.
            state: as for `CheckpointManager.save`; None reports metrics alone.
            metrics: for Ray; those of worker 0 that are finite numbers go with the checkpoint, too.

        Raises:
            CloudCkptError: as `CheckpointManager.save` raises; nothing was reported.
        """
        if state is None:
            ray.train.report(dict(metrics))
            return None
        measured = {name: float(value) for name, value in metrics.items() if _is_number(value)}
        checkpoint = self.manager.save(step, state, metrics=measured)
        if checkpoint is None or ray.train.get_context().get_world_rank() != 0:
            ray.train.report(dict(metrics))
            return checkpoint
        with tempfile.TemporaryDirectory(prefix="cloudckpt-ray-") as folder:
            Path(folder, _POINTER).write_text(json.dumps({"url": checkpoint.url, "step": step}))
            ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(folder))
        return checkpoint

    def is_preempted(self) -> bool:
        """Tell whether Ray has newly said that a worker's machine goes: once for each time that it says so.

        It is a barrier of all workers, as Ray's own question is; so each asks at the same steps.
        """
        is_noticed = ray.train.get_preemption_info() is not None
        is_new, self._is_noticed = is_noticed and not self._is_noticed, is_noticed
        return is_new

    def close(self) -> None:
        """Close the manager, unless it was given."""
        if self._owns:
            self.manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owns:
            self.manager.__exit__(kind, error, trace)


def rules_of(keep: CheckpointConfig | None) -> list[RetentionRule]:
    """Return rules that keep what Ray does, which is the newest besides the best; for a manager of your own.

    What Ray still names stays as well (`KeepReported`), so the root may hold one more than Ray until the next save.

    Args:
        keep: as Ray is given it.
    """
    if keep is None or keep.num_to_keep is None:
        return []
    if keep.checkpoint_score_attribute is None:
        return [KeepLast(keep.num_to_keep), KeepReported()]
    best = KeepBest(keep.checkpoint_score_attribute, keep.num_to_keep, mode=keep.checkpoint_score_order)
    return [best, KeepLast(1), KeepReported()]


@dataclass(frozen=True, slots=True)
class KeepReported:
    """Keep what Ray names in its list of checkpoints, and what is newer than that, of which it may not have heard yet.

    A rule for managers in workers of Ray. It asks Ray each time that something is pruned; where Ray cannot be asked, or
    names nothing of the root, all stays.
    """

    _urls: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def keep(self, checkpoints: Sequence[Checkpoint]) -> set[tuple[int, int]]:
        everything = {one.order for one in checkpoints}
        try:
            named = self._named()
        except Exception as exc:  # noqa: BLE001 (whatever it is, what Ray names is not known, and must not go)
            logger.warning("Ray does not say which checkpoints it names, so all stay: %s: %s", type(exc).__name__, exc)
            return everything
        known = {one.order for one in checkpoints if one.url in named}
        return {order for order in everything if order in known or order > max(known)} if known else everything

    def _named(self) -> set[str]:
        found = ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED, _PATIENCE_S)
        pointers = {one.checkpoint.path: one.checkpoint for one in found}
        for path in self._urls.keys() - pointers.keys():
            del self._urls[path]
        for path in pointers.keys() - self._urls.keys():
            self._urls[path] = url_of(pointers[path])
        return set(self._urls.values())


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)
