"""Writers and readers that are kept, sent to other processes, called by hand, or used by one process of several."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import cloudckpt
from cloudckpt import (
    CheckpointExistsError,
    CheckpointManager,
    CheckpointNotFoundError,
    CloudReader,
    CloudWriter,
    ManifestError,
    Options,
    OptionsError,
)
from servers import FreshPrefix
from tests.ranks.processes import run

# DCP says so in every process that has no group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")


def save(url: object, value: float, **options: Any) -> CloudWriter:
    writer = CloudWriter(str(url), **options)
    dcp.save({"t": torch.full((3,), value)}, storage_writer=writer)
    return writer


def load(reader: CloudReader, **how: Any) -> float:
    state = {"t": torch.zeros(3)}
    dcp.load(state, storage_reader=reader, **how)
    assert len(set(state["t"].tolist())) == 1
    return state["t"][0].item()


def failure(call: Callable[[], object]) -> BaseException:
    with pytest.raises(CheckpointException) as caught:
        call()
    error: BaseException = caught.value.failures[0][0]
    return error


# -- a kept reader -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_kept_reader_loads_what_is_committed_now(tmp_path: Path, is_reset: bool) -> None:
    url = tmp_path / "c"
    save(url, 1)
    reader = CloudReader(url)
    assert load(reader) == 1
    shutil.rmtree(url)
    save(url, 2)
    if is_reset:
        reader.reset()
    assert load(reader) == 2
    shutil.rmtree(url)
    assert isinstance(failure(lambda: load(reader)), CheckpointNotFoundError)


def _load_two_places(root: str) -> tuple[str, float]:
    rank = dist.get_rank()
    state = {"t": torch.zeros(3)}
    try:
        dcp.load(state, storage_reader=CloudReader(f"{root}/{rank}"))
    except CheckpointException as exc:
        return f"{type(exc.failures[0][0]).__name__}: {exc.failures[0][0]}", state["t"].sum().item()
    return "", state["t"].sum().item()


def test_ranks_that_find_different_checkpoints_read_none_of_them(tmp_path: Path) -> None:
    save(tmp_path / "0", 1)
    save(tmp_path / "1", 2)
    for found, total in run(2, _load_two_places, str(tmp_path)):
        assert found.startswith("IntegrityError: rank 1 found another checkpoint than the coordinator")
        assert total == 0


# -- calls by hand -----------------------------------------------------------------------------------------------


def test_read_metadata_by_hand_raises_what_it_met(tmp_path: Path) -> None:
    reader = CloudReader(tmp_path / "c")
    for _ in "12":
        with pytest.raises(CheckpointNotFoundError):
            reader.read_metadata()
    save(tmp_path / "c", 1)
    assert list(reader.read_metadata().state_dict_metadata) == ["t"]
    (tmp_path / "c/manifest.json").write_text("{}")
    with pytest.raises(ManifestError):
        reader.read_metadata()


def _load_nothing(url: str) -> list[str]:
    reader = CloudReader(url)
    found = []
    for _ in range(2):
        try:
            dcp.load({"t": torch.zeros(3)}, storage_reader=reader)
        except CheckpointException as exc:
            found.append(", ".join(type(error).__name__ for error, _ in exc.failures.values()))
    return found


def test_a_failure_to_read_metadata_reaches_every_rank_by_its_own_type(tmp_path: Path) -> None:
    assert run(2, _load_nothing, str(tmp_path / "c")) == [["CheckpointNotFoundError, CheckpointNotFoundError"] * 2] * 2


def test_a_planner_sees_no_state_where_nothing_could_be_read(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    error = failure(lambda: _load_state_dict_from_keys({"t"}, storage_reader=CloudReader(tmp_path / "c")))
    assert isinstance(error, CheckpointNotFoundError)


# -- what stands at the URL --------------------------------------------------------------------------------------


def test_a_checkpoint_of_dcp_s_own_format_is_named_with_the_way_to_import_it(tmp_path: Path) -> None:
    dcp.save({"t": torch.ones(3)}, checkpoint_id=tmp_path / "c")
    calls: list[Callable[[], object]] = [
        lambda: CloudReader(tmp_path / "c").read_metadata(),
        lambda: cloudckpt.load({"t": torch.zeros(3)}, tmp_path / "c"),
        lambda: cloudckpt.read(tmp_path / "c"),
    ]
    for call in calls:
        with pytest.raises(CheckpointNotFoundError, match=r"checkpoint's own format .*FileSystemReader"):
            call()


def test_a_root_is_named_with_the_url_of_one_of_its_steps(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        checkpoint = manager.save(3, {"t": torch.ones(3)})
    with pytest.raises(CheckpointNotFoundError, match="root of a CheckpointManager") as caught:
        cloudckpt.read(tmp_path)
    assert str(caught.value).endswith(checkpoint.url)


def test_an_attempt_that_did_not_commit_is_told_from_nothing(tmp_path: Path) -> None:
    save(tmp_path / "c", 1)
    (tmp_path / "c/manifest.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match="1 attempts to save there"):
        cloudckpt.read(tmp_path / "c")


# -- one process of several --------------------------------------------------------------------------------------


def test_each_process_may_read_without_a_process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "c", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load(CloudReader(tmp_path / "c"), no_dist=True) == 1
    assert load(CloudReader(tmp_path / "c")) == 1
    state: dict[str, Any] = {"t": torch.zeros(3, dtype=torch.int64)}
    cloudckpt.load(state, tmp_path / "c")
    assert torch.equal(state["t"], torch.ones(3, dtype=torch.int64))
    assert torch.equal(cloudckpt.read(tmp_path / "c")["t"], torch.ones(3, dtype=torch.int64))  # type: ignore[arg-type]


def test_one_process_of_several_saves_alone_only_by_the_user_s_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = failure(lambda: save(tmp_path / "c", 1))
    assert isinstance(error, OptionsError)
    assert "give options=Options(single_writer=True)" in str(error)
    assert not (tmp_path / "c").exists()
    with pytest.raises(OptionsError, match="init_process_group"):
        cloudckpt.save({"t": torch.ones(3)}, tmp_path / "c", options=Options(single_writer=True))
    save(tmp_path / "c", 1, options=Options(single_writer=True))
    assert load(CloudReader(tmp_path / "c")) == 1


class OlderTorchWriter(CloudWriter):
    """Has a signature to which no torch passes the rank, as older releases pass it to none."""

    def set_up_storage_writer(self, is_coordinator: bool) -> None:  # type: ignore[override]
        super().set_up_storage_writer(is_coordinator)


def _save_without_a_rank(url: str) -> list[float]:
    rank = dist.get_rank()
    own = {f"own{rank}": torch.full((3,), float(rank)), "all": torch.ones(5)}
    dcp.save(own, storage_writer=OlderTorchWriter(url))
    state: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    dcp.load(state, storage_reader=CloudReader(url))
    return [float(state[f"own{rank}"][0]), float(state["all"].sum())]


def test_a_writer_that_is_told_no_rank_takes_it_from_its_plan(tmp_path: Path) -> None:
    assert run(3, _save_without_a_rank, str(tmp_path / "c")) == [[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]]


# -- replacing ---------------------------------------------------------------------------------------------------


def _save_again(url: str) -> list[float]:
    found = []
    for value in (1.0, 2.0):
        state = {f"own{dist.get_rank()}": torch.full((3,), value), "all": torch.full((3,), value)}
        dcp.save(state, storage_writer=CloudWriter(url, exists="replace"))
        state = {name: torch.zeros(3) for name in state}
        dcp.load(state, storage_reader=CloudReader(url))
        found.append(sum(float(tensor.sum()) for tensor in state.values()))
    return found


def test_ranks_replace_a_checkpoint_and_leave_nothing_of_it(tmp_path: Path) -> None:
    url = tmp_path / "c"
    assert run(2, _save_again, str(url)) == [[6.0, 12.0]] * 2
    shards = list(url.rglob("*.safetensors"))
    assert len(shards) == 2
    assert len(list(url.rglob("index.bin"))) == 1


def test_an_unknown_word_for_a_url_that_is_taken_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="exists is 'overwrite'"):
        CloudWriter(tmp_path / "c", exists="overwrite")  # type: ignore[arg-type]


# -- other processes ---------------------------------------------------------------------------------------------


def test_a_used_writer_pickles(tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(save(tmp_path / "c", 1)))
    dcp.save({"t": torch.ones(3)}, storage_writer=again, checkpoint_id=tmp_path / "d")
    assert load(CloudReader(tmp_path / "d")) == 1


def test_a_used_reader_pickles(tmp_path: Path) -> None:
    save(tmp_path / "c", 1)
    reader = CloudReader(tmp_path / "c")
    reader.read_metadata()
    assert load(pickle.loads(pickle.dumps(reader))) == 1
    load(reader)
    assert load(pickle.loads(pickle.dumps(reader))) == 1


@pytest.mark.parametrize("kind", [CloudWriter, CloudReader])
def test_storage_options_cross_to_a_child_process_and_into_no_pickle_that_could_be_kept(
    kind: type[CloudWriter | CloudReader],
) -> None:
    one = kind("s3://bucket/x", storage_options={"key": "canary", "endpoint_url": "http://127.0.0.1:1"})
    with pytest.raises(OptionsError, match="send it through multiprocessing"):
        pickle.dumps(one)
    again = pickle.loads(ForkingPickler.dumps(one))
    assert again._address._storage_options == one._address._storage_options


@pytest.mark.slow
def test_a_process_of_dcp_saves_to_a_store_that_needs_options(
    s3_url: FreshPrefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    there: dict[str, Any] = {"storage_options": s3_url.storage_options}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        future = dcp.async_save(
            {"t": torch.ones(3)},
            storage_writer=CloudWriter(s3_url.url, **there),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        future.result(timeout=100)  # type: ignore[union-attr]
        assert load(CloudReader(s3_url.url, **there)) == 1
    finally:
        dist.destroy_process_group()


def test_a_save_that_is_refused_at_its_begin_closes_its_store(tmp_path: Path) -> None:
    save(tmp_path / "c", 1)
    writer = CloudWriter(tmp_path / "c")
    error = failure(lambda: dcp.save({"t": torch.ones(3)}, storage_writer=writer))
    assert isinstance(error, CheckpointExistsError)
    assert writer._address._catalog is None


def test_dcp_sees_the_state_and_nothing_of_what_is_kept_beside_it(tmp_path: Path) -> None:
    module = torch.nn.BatchNorm1d(2)
    cloudckpt.save({"model": module, "n": 1}, tmp_path / "c")
    found = CloudReader(tmp_path / "c").read_metadata().state_dict_metadata
    assert set(found) == {"n", *(f"model.{name}" for name in module.state_dict())}
