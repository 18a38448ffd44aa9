"""`read` returns a checkpoint, or the part of it that was asked for, without any model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import cloudckpt
from cloudckpt import CheckpointManager, CheckpointNotFoundError, IntegrityError, ManifestError, Options
from cloudckpt.options import KIB
from cloudckpt.store import RetryingStore, open_store

CUT = Options(shard_bytes=256, block_bytes=64, span_bytes=128, memory_budget_bytes=8 * KIB)


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other, strict=True))
    return one == other and type(one) is type(other)


@pytest.fixture
def state() -> dict[str, object]:
    return {
        "model": {"embed.weight": torch.arange(12.0).reshape(3, 4), "head": {"w": torch.ones(40), "b": torch.zeros(2)}},
        "model_ema": torch.full((3,), 9.0),
        "list": [torch.tensor(0), "one", torch.tensor(2), {"deep": (torch.tensor(3), 4)}],
        "config": {"lr": 0.5, "betas": (0.9, 0.99)},
        "epoch": 3,
    }


@pytest.fixture
def url(tmp_path: Path, state: dict[str, object]) -> Path:
    cloudckpt.save(state, tmp_path / "c", options=CUT)
    return tmp_path / "c"


def test_without_keys_everything_is_read(url: Path, state: dict[str, object]) -> None:
    assert equal(cloudckpt.read(url), state)


def test_an_exact_name_reads_one_tensor(url: Path) -> None:
    found = cloudckpt.read(url, "model.embed.weight")
    assert equal(found, {"model": {"embed.weight": torch.arange(12.0).reshape(3, 4)}})


def test_a_name_reads_all_that_lies_below_it_and_no_neighbour(url: Path, state: dict[str, object]) -> None:
    assert equal(cloudckpt.read(url, "model"), {"model": state["model"]})
    assert equal(cloudckpt.read(url, ["model.head"]), {"model": {"head": {"w": torch.ones(40), "b": torch.zeros(2)}}})


def test_a_glob_reads_all_names_that_match(url: Path) -> None:
    assert equal(cloudckpt.read(url, "model*.b"), {"model": {"head": {"b": torch.zeros(2)}}})
    assert set(cloudckpt.read(url, "model*")) == {"model", "model_ema"}
    assert set(cloudckpt.read(url, "model.[!h]*")["model"]) == {"embed.weight"}  # type: ignore[call-overload]


def test_several_keys_are_read_together_each_name_once_in_the_order_saved(url: Path, state: dict[str, object]) -> None:
    found = cloudckpt.read(url, ["epoch", "config", "ep*"])
    assert list(found) == ["config", "epoch"]
    assert equal(found, {"config": state["config"], "epoch": 3})


@pytest.mark.parametrize("keys", ["nothing", ["epoch", "nothing"], "model.head.w.x", "embed*", ""])
def test_a_key_that_matches_nothing_is_an_error_that_says_what_is_there(url: Path, keys: str | list[str]) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"is named .*; it holds config"):
        cloudckpt.read(url, keys)


def test_no_keys_at_all_read_nothing(url: Path) -> None:
    assert cloudckpt.read(url, []) == {}


def test_a_part_of_a_list_keeps_the_places_of_what_was_read(url: Path) -> None:
    assert equal(cloudckpt.read(url, "list.2"), {"list": {2: torch.tensor(2)}})
    assert equal(cloudckpt.read(url, ["list.0", "list.3.deep.1"]), {"list": {0: torch.tensor(0), 3: {"deep": {1: 4}}}})
    assert equal(cloudckpt.read(url, "list.3"), {"list": {3: {"deep": (torch.tensor(3), 4)}}})


def test_a_part_is_read_by_fetching_that_part_alone(
    url: Path, state: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[RetryingStore] = []

    def remembered(*arguments: object, **options: object) -> RetryingStore:
        opened.append(open_store(*arguments, **options))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr("cloudckpt.checkpoint.open_store", remembered)
    cloudckpt.read(url, "model.head.b", options=CUT)
    cloudckpt.read(url, "epoch", options=CUT)
    cloudckpt.read(url, options=CUT)
    fetched_bytes = [store.stats()["get"].bytes for store in opened]
    # Eight bytes lie in one block, or in two where a block's edge cuts through them; values are in the index.
    assert 8 <= fetched_bytes[0] <= 2 * CUT.block_bytes
    assert fetched_bytes[1] == 0
    assert fetched_bytes[2] >= 252, "every tensor"


def test_what_is_read_is_new_memory(url: Path) -> None:
    one, other = cloudckpt.read(url, "model_ema"), cloudckpt.read(url, "model_ema")
    one["model_ema"].zero_()  # type: ignore[union-attr]
    assert equal(other, {"model_ema": torch.full((3,), 9.0)})


def test_a_checkpoint_below_a_root_is_read_by_its_url_without_the_library_s_own_entries(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    with CheckpointManager(tmp_path / "root") as manager:
        saved = manager.save(7, {"model": model, "epoch": 1})
    found = cloudckpt.read(saved.url)
    assert set(found) == {"model", "epoch"}
    assert equal(found["model"], {"weight": model.weight.detach(), "bias": model.bias.detach()})
    assert set(cloudckpt.read(saved.url, "cloudckpt.rng")) == {"cloudckpt.rng.r00000"}


def test_a_root_is_not_a_checkpoint(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "root") as manager:
        manager.save(7, {"epoch": 1})
    with pytest.raises(CheckpointNotFoundError, match="root of a CheckpointManager"):
        cloudckpt.read(tmp_path / "root")


def test_a_manifest_of_another_place_is_refused(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "root") as manager:
        saved = manager.save(7, {"t": torch.ones(2)})
    copied = tmp_path / "root" / "step-0000000008-e0001"
    (tmp_path / "root" / saved.prefix).rename(copied)
    with CheckpointManager(tmp_path / "root") as manager, pytest.raises(ManifestError, match="it was copied there"):
        manager.restore({"t": torch.zeros(2)}, step=8)
    assert equal(cloudckpt.read(copied), {"t": torch.ones(2)}), "by its own URL a copied checkpoint is whole"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("epohc", "epoch"),
        ("modle.head.w", "model.head.w"),
        ("model.haed.b", "model.head.b"),
        ("model.head.bb", "model.head.b"),
        ("confg", "config"),
    ],
)
def test_an_error_names_what_is_near_a_mistyped_key(url: Path, key: str, near: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=rf"named '{key}'; near it: {near}"):
        cloudckpt.read(url, key)


def test_contents_are_names_shapes_dtypes_and_sizes_and_no_shard_is_read(url: Path, state: dict[str, object]) -> None:
    for shard in url.rglob("*.safetensors"):
        shard.unlink()
    found = cloudckpt.contents(url)
    assert found.tensors["model.embed.weight"] == cloudckpt.TensorInfo(shape=(3, 4), dtype=torch.float32, size_bytes=48)
    assert found.tensors["list.0"].shape == ()
    assert dict(found.values) == {"list.1": 5, "list.3.deep.1": 1, "config": 40, "epoch": 1}
    assert found.names == [*found.tensors, *found.values]
    assert found.total_bytes == sum(one.size_bytes for one in found.tensors.values()) + 47
    assert found.select(["model.head", "epoch"]) == ["model.head.w", "model.head.b", "epoch"]
    assert found.checkpoint.url == f"file://{url}"
    with pytest.raises(CheckpointNotFoundError, match=r"near it: model\.head\.w"):
        found.select("modl.head.w")


def test_a_manager_reads_the_newest_checkpoint_that_is_whole_or_the_one_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state: dict[str, object] = {"w": torch.zeros(2), "step": 0}
    with CheckpointManager(tmp_path, progress="off") as manager:
        with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint"):
            manager.read()
        for step in (1, 2):
            state.update(w=torch.full((2,), float(step)), step=step)
            manager.save(step, state, metrics={"loss": step})
        assert equal(manager.read(), {"w": torch.full((2,), 2.0), "step": 2})
        assert equal(manager.read(1, "step"), {"step": 1})
        best = manager.best("loss")
        assert best is not None
        assert equal(manager.read(best, ["w"]), {"w": torch.ones(2)})
        assert set(manager.contents(1).tensors) == {"w"}
        with pytest.raises(CheckpointNotFoundError, match="near it: step"):
            manager.read(2, "stpe")
        newest = manager.latest()
        assert newest is not None
        for shard in (tmp_path / newest.prefix).rglob("*.safetensors"):
            shard.write_bytes(bytes(shard.stat().st_size))
        assert equal(manager.read(), {"w": torch.ones(2), "step": 1})
        assert "NOT reading" in caplog.text
        with pytest.raises(IntegrityError):
            manager.read(2)


def test_what_each_rank_has_for_itself_is_told_of_in_the_contents(tmp_path: Path) -> None:
    class Stream:
        def state_dict(self) -> dict[str, object]:
            return {"place": 1}

        def load_state_dict(self, state: dict[str, object]) -> None: ...

    cloudckpt.save({"stream": cloudckpt.PerRank(Stream()), "step": 1}, tmp_path / "c")
    found = cloudckpt.contents(tmp_path / "c")
    assert (dict(found.per_rank), found.names) == ({"stream": 1}, ["step"])


def test_a_module_without_state_among_values_is_told_not_to_be_what_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cloudckpt.save({"hparams": {"lr": 0.5, "act": nn.ReLU(), "net": nn.Linear(1, 1)}}, tmp_path / "c")
    found = cloudckpt.read(tmp_path / "c", "hparams")
    assert found["hparams"]["act"] == {}  # type: ignore[call-overload, index]
    assert "a module without any state was saved at hparams.act;" in caplog.text


@pytest.mark.parametrize("there", [None, {}, {"lr": 0.0, "act": None, "net": None}], ids=["none", "empty", "names"])
def test_a_module_without_state_is_told_not_to_be_what_is_restored_into_a_value(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, there: object
) -> None:
    cloudckpt.save({"hparams": {"lr": 0.5, "act": nn.ReLU(), "net": nn.Linear(1, 1)}}, tmp_path / "c")
    cloudckpt.load({"hparams": there}, tmp_path / "c")
    assert "a module without any state was saved at hparams.act; what is restored there is an empty dict" in caplog.text


def test_a_module_without_state_that_is_there_is_no_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cloudckpt.save({"hparams": {"lr": 0.5, "act": nn.ReLU()}}, tmp_path / "c")
    state = {"hparams": {"lr": 0.0, "act": (act := nn.ReLU())}}
    cloudckpt.load(state, tmp_path / "c")
    assert state == {"hparams": {"lr": 0.5, "act": act}}
    assert "without any state" not in caplog.text
