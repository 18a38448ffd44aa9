from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

pytest.importorskip("torchtitan", minversion="0.3.0", reason="make integrations installs the frameworks")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw

from cloudckpt import CheckpointNotFoundError, OptionsError, StateMismatchError, read
from cloudckpt.integrations.torchtitan import CloudCheckpointManager
from raw_access import FreshPrefix
from tests.integrations.interrupted import assert_a_run_goes_on_from_a_bucket

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:To get the last learning rate:UserWarning"),  # torchtitan's schedulers ask so
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_that_is_killed_and_told_to_end_has_the_losses_of_one_left_alone(
    s3_url: FreshPrefix, ranks: int
) -> None:
    assert_a_run_goes_on_from_a_bucket("torchtitan_loop.py", s3_url, ranks=ranks)


class Counter:
    """What torchtitan's Trainer saves of itself."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class Job:
    """A model of torchtitan's parts, and its manager of checkpoints."""

    def __init__(self, folder: str, *, seed: int = 0, model: nn.Module | None = None, **choices: object) -> None:
        torch.manual_seed(seed)
        self.model, self.counter = model or nn.Linear(3, 2), Counter()
        self.optimizers = default_adamw(lr=0.1, fused=False).build(model_parts=[self.model])
        self.schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(
            optimizers=self.optimizers, training_steps=9
        )
        config = CloudCheckpointManager.Config(enable=True, folder=folder, interval=2, preemption=False, **choices)
        self.checkpointer = config.build(
            dataloader=None,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self.counter},
            sd_adapter=None,
        )

    def train(self, steps: int, last: int | None = None) -> None:
        for _ in range(steps):
            self.counter.step += 1
            self.optimizers.zero_grad()
            self.model(torch.ones(3)).square().sum().backward()
            self.optimizers.step()
            self.schedulers.step()
            self.checkpointer.save(self.counter.step, last_step=self.counter.step == last)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpointer.close()


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[str]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield str(tmp_path / "root")
    dist.destroy_process_group()


def test_an_interval_saves_and_as_many_stay_as_keep_latest_k_says(one_rank: str) -> None:
    with Job(one_rank, keep_latest_k=2) as job:
        job.train(7)

        assert job.checkpointer.manager.all_steps() == [4, 6]


def test_a_load_gives_back_model_optimizer_schedule_and_step(one_rank: str) -> None:
    with Job(one_rank, async_mode="async") as job:
        job.train(4)
    with Job(one_rank, seed=1) as other:
        assert other.checkpointer.load()

        assert other.counter.step == 4
        assert torch.equal(other.model.weight, job.model.weight)
        assert other.schedulers.state_dict() == job.schedulers.state_dict()
        job.checkpointer.enable = False
        job.train(3)
        other.checkpointer.enable = False
        other.train(3)
        assert torch.equal(other.model.weight, job.model.weight)


def test_a_load_of_a_step_that_is_not_there_is_refused_and_an_empty_root_is_a_fresh_start(one_rank: str) -> None:
    with Job(one_rank) as job:
        assert not job.checkpointer.load()
        with pytest.raises(CheckpointNotFoundError):
            job.checkpointer.load(step=3)


def test_the_last_step_holds_the_model_alone_and_cannot_be_trained_on(one_rank: str) -> None:
    with Job(one_rank, export_dtype="bfloat16") as job:
        job.train(3, last=3)
        newest = job.checkpointer.manager.latest()
    assert newest is not None
    assert read(newest.url)["model"]["weight"].dtype == torch.bfloat16
    with Job(one_rank) as other, pytest.raises(OptionsError, match="initial_load_path"):
        other.checkpointer.load()
    with Job(one_rank, seed=1) as other:
        other.checkpointer.load(step=2)
        assert other.counter.step == 2


def test_a_model_of_another_root_is_where_a_training_begins(one_rank: str) -> None:
    with Job(one_rank) as job:
        job.train(2)
        newest = job.checkpointer.manager.latest()
    assert newest is not None
    with Job(f"{one_rank}-2", seed=1, initial_load_path=newest.url) as other:
        assert other.checkpointer.load()

        assert torch.equal(other.model.weight, job.model.weight)
        assert other.counter.step == 0


def test_a_model_of_torchtitans_own_checkpoint_is_where_a_training_begins(one_rank: str) -> None:
    source = Job(f"{one_rank}-1")
    dcp.save(source.model.state_dict(), checkpoint_id=f"{one_rank}-dcp")
    with Job(one_rank, seed=1, initial_load_path=f"{one_rank}-dcp") as job:
        assert job.checkpointer.load()

        assert torch.equal(job.model.weight, source.model.weight)


def test_what_is_excluded_from_loading_stays_as_it_is(one_rank: str) -> None:
    with Job(one_rank) as job:
        job.train(2)
    with Job(one_rank, exclude_from_loading=["lr_scheduler"]) as other:
        other.checkpointer.load()

        assert other.counter.step == 2
        assert other.schedulers.state_dict() == {"last_epoch": 0}
    with Job(one_rank, exclude_from_loading=["schedule"]) as other, pytest.raises(OptionsError, match="schedule"):
        other.checkpointer.load()


def test_a_seed_checkpoint_gives_the_model_alone(one_rank: str) -> None:
    with Job(one_rank) as job:
        job.checkpointer.save(0, last_step=True)
    with Job(one_rank, seed=1) as other:
        assert other.checkpointer.load()

        assert torch.equal(other.model.weight, job.model.weight)


def test_a_manager_that_is_disabled_or_loads_only_saves_nothing(one_rank: str) -> None:
    with Job(one_rank, load_only=True) as job:
        job.train(2)

        assert job.checkpointer.manager.latest() is None


def test_a_last_save_in_the_layout_of_hugging_face_is_refused(one_rank: str) -> None:
    with pytest.raises(OptionsError, match="last_save_in_hf"):
        Job(one_rank, last_save_in_hf=True)


def _stage(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

    def stage(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        # The first stage has a layer more.
        return nn.Sequential(OrderedDict((f"layer{rank + 2 * one}", nn.Linear(3, 3)) for one in range(2 - rank)))

    with Job(f"{folder}/root", model=stage(0)) as job:
        job.train(2)
    with Job(f"{folder}/root", model=stage(1)) as other:
        assert other.checkpointer.load()

        assert all(map(torch.equal, other.model.parameters(), job.model.parameters()))
        mine, theirs = job.optimizers.state_dict(), other.optimizers.state_dict()
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=0)
    larger = nn.Sequential(OrderedDict([*stage(1).named_children(), (f"layer{rank + 8}", nn.Linear(3, 3))]))
    with Job(f"{folder}/root", model=larger) as other, pytest.raises(StateMismatchError, match=r"layer8|layer9"):
        other.checkpointer.load()
    dist.destroy_process_group()


def test_pipeline_stages_save_and_load_what_only_they_have(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_stage, args=(str(tmp_path),), nprocs=2)
