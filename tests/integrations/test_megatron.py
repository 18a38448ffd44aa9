from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="make integrations installs the frameworks")

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from cloudckpt import CheckpointExistsError, OptionsError
from cloudckpt import save as save_plain
from cloudckpt.integrations.megatron import load, newest, save
from raw_access import FreshPrefix
from tests.integrations.interrupted import Run, assert_same_losses, run_program

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_that_is_killed_has_the_losses_of_one_left_alone(s3_url: FreshPrefix, ranks: int) -> None:
    def run(name: str, **how: object) -> Run:
        root = FreshPrefix(url=f"{s3_url.url}/{name}", server=s3_url.server)
        return run_program("megatron_loop.py", root, ranks=ranks, **how)  # type: ignore[arg-type]

    alone = run("a")
    between = run("b", after=6)
    in_save = run("b", in_save=2)
    last = run("b")

    assert (alone.code, between.code, in_save.code, last.code) == (0, -9, -9, 0)
    assert (min(in_save.losses), min(last.losses)) == (5, 9)
    assert_same_losses([between, in_save, last], alone)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_what_is_common_and_objects_and_tensors_come_back_from_one_commit(s3_url: FreshPrefix) -> None:
    def state(weight: torch.Tensor, generator: object) -> dict[str, object]:
        return {
            "weight": ShardedTensor.from_rank_offsets("weight", weight),
            "generator": ShardedObject("generator", generator, (1,), (0,)),
        }

    weight, target, drawn = torch.randn(3, 4), torch.zeros(3, 4), torch.get_rng_state()
    url = f"{s3_url.url}/iter_0000012"
    given = {**state(weight.clone(), drawn), "args": {"lr": 0.1, "dtype": torch.bfloat16}}
    save(given, url, content_metadata={"kind": "model"}, storage_options=s3_url.storage_options)

    found = load(state(target, None), url, storage_options=s3_url.storage_options)

    assert torch.equal(target, weight)
    assert torch.equal(found["weight"], weight)
    assert torch.equal(found["generator"], drawn)
    assert found["args"] == {"lr": 0.1, "dtype": torch.bfloat16}
    assert found["content_metadata"] == {"kind": "model"}
    assert newest(s3_url.url, storage_options=s3_url.storage_options) == (12, url)
    with pytest.raises(CheckpointExistsError):
        save(state(weight, drawn), url, storage_options=s3_url.storage_options)


@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_of_another_kind_is_refused_and_nothing_is_newest_where_nothing_is(tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert newest(root) is None

    save_plain({"weight": torch.zeros(2)}, root / "iter_1", progress="off")

    with pytest.raises(OptionsError, match=r"integrations\.megatron"):
        load({"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(2))}, root / "iter_1")


def test_a_call_without_a_process_group_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="init_process_group"):
        save({}, tmp_path / "iter_1")
