"""A model goes from any number of ranks to Hugging Face's layout at a URL, and back to any number, to the bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from cloudckpt import CloudHFReader, CloudHFWriter, OptionsError, SourceError
from servers import FreshPrefix
from tests.ranks.processes import run

os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SHAPES = {"a.weight": (10, 6), "b.weight": (7, 9), "c": (5,), "scalar": (), "empty": (0, 3)}
PLACEMENTS = {"a.weight": Shard(0), "b.weight": Shard(1), "c": Shard(0), "scalar": Replicate(), "empty": Replicate()}


def whole(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def sharded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(one, mesh, [PLACEMENTS[name]]) for name, one in tensors.items()}


def put_together(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in tensors.items()}


def are_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], one) for name, one in expected.items())


def _save_and_load(url: str, options: dict[str, Any]) -> bool:
    state = sharded(whole())
    writer = CloudHFWriter(url, storage_options=options, max_shard_bytes=300)
    dcp.save(state, storage_writer=writer)
    assert (writer.exported is not None) == (dist.get_rank() == 0)
    target = sharded({name: torch.zeros_like(one) for name, one in whole().items()})
    dcp.load(target, storage_reader=CloudHFReader(url, storage_options=options))
    return are_equal(put_together(target), whole())


def test_two_ranks_save_to_a_bucket_and_one_loads(s3_url: FreshPrefix) -> None:
    options = s3_url.storage_options
    assert run(2, _save_and_load, s3_url.url, options) == [True, True]
    target = {name: torch.zeros_like(one) for name, one in whole().items()}
    dcp.load(target, storage_reader=CloudHFReader(s3_url.url, storage_options=options))
    assert are_equal(target, whole())


def _load(url: str) -> bool:
    target = sharded({name: torch.zeros_like(one) for name, one in whole(torch.bfloat16).items()})
    dcp.load(target, storage_reader=CloudHFReader(url))
    return are_equal(put_together(target), whole(torch.bfloat16))


def test_one_rank_saves_files_that_safetensors_reads_and_two_load(tmp_path: Path) -> None:
    writer = CloudHFWriter(tmp_path / "model")
    dcp.save(whole(torch.bfloat16), storage_writer=writer)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]
    assert are_equal(load_file(tmp_path / "model" / "model.safetensors"), whole(torch.bfloat16))
    assert writer.exported is not None
    assert writer.exported.files == ("model.safetensors",)
    assert run(2, _load, str(tmp_path / "model")) == [True, True]


def test_a_model_that_is_there_is_replaced_only_if_that_is_asked_for(tmp_path: Path) -> None:
    dcp.save({"a": torch.zeros(3)}, storage_writer=CloudHFWriter(tmp_path))
    with pytest.raises(dcp.CheckpointException, match=r"holds model\.safetensors already"):
        dcp.save({"a": torch.ones(3)}, storage_writer=CloudHFWriter(tmp_path))
    assert are_equal(load_file(tmp_path / "model.safetensors"), {"a": torch.zeros(3)})
    for size in (100, 3):  # several files, then one
        writer = CloudHFWriter(tmp_path, exists="replace", max_shard_bytes=100)
        dcp.save({"a": torch.ones(size), "b": torch.ones(size)}, storage_writer=writer)
        target = {"a": torch.zeros(size), "b": torch.zeros(size)}
        dcp.load(target, storage_reader=CloudHFReader(tmp_path))
        assert are_equal(target, {"a": torch.ones(size), "b": torch.ones(size)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(OptionsError, match="exists is 'skip'"):
        CloudHFWriter(tmp_path, exists="skip")  # type: ignore[arg-type]


def test_names_have_a_prefix_taken_off_and_put_on(tmp_path: Path) -> None:
    state = {"model": {"w": torch.arange(4.0)}, "optimizer": {"step": torch.tensor(1)}}
    dcp.save(state, storage_writer=CloudHFWriter(tmp_path, prefix="model."))
    assert list(load_file(tmp_path / "model.safetensors")) == ["w"]
    target = {"model": {"w": torch.zeros(4)}}
    dcp.load(target, storage_reader=CloudHFReader(tmp_path, prefix="model."))
    assert torch.equal(target["model"]["w"], torch.arange(4.0))


def test_what_failed_leaves_no_model_and_the_next_save_what_it_left(tmp_path: Path) -> None:
    with pytest.raises(dcp.CheckpointException, match="it is a value"):
        dcp.save({"w": torch.ones(3), "step": 7}, storage_writer=CloudHFWriter(tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(dcp.CheckpointException, match=r"neither \.metadata, nor model\.safetensors"):
        dcp.load({"w": torch.zeros(3)}, storage_reader=CloudHFReader(tmp_path))
    left = tmp_path / ".cloudckpt-hf" / ("0" * 16) / "r00000-0000.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a save that was killed")
    writer = CloudHFWriter(tmp_path, leave_out=True)
    dcp.save({"w": torch.ones(3), "step": 7}, storage_writer=writer)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["model.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises((dcp.CheckpointException, SourceError), match=r"damaged|not a file of huggingface"):
        dcp.load({"w": torch.zeros(3)}, storage_reader=CloudHFReader(tmp_path))


def _model_of(transformers: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=100
    )
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def _train_sharded(url: str) -> list[float]:
    import transformers
    from torch.distributed.fsdp import fully_shard

    model = _model_of(transformers)
    tokens = torch.arange(10).view(2, 5)
    with torch.no_grad():
        expected = model(tokens).logits
    fully_shard(model)
    dcp.save(model.state_dict(), storage_writer=CloudHFWriter(url, config=[model.config], max_shard_bytes=20_000))
    return expected.flatten().tolist()


def test_a_model_sharded_over_two_ranks_is_loaded_by_from_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers comes with the extra `test`")
    expected, _ = run(2, _train_sharded, str(tmp_path / "hf"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        found = loaded(torch.arange(10).view(2, 5)).logits
    assert found.flatten().tolist() == expected
    state = {name: torch.zeros_like(one) for name, one in loaded.state_dict().items()}
    dcp.load(state, storage_reader=CloudHFReader(tmp_path / "hf"))
    assert are_equal(state, dict(loaded.state_dict()))
    # And what save_pretrained writes.
    loaded.save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    again = {name: torch.zeros_like(one) for name, one in state.items()}
    dcp.load(again, storage_reader=CloudHFReader(tmp_path / "theirs"))
    assert are_equal(again, state)
