"""A real model of `transformers` is loaded from an export by `from_pretrained`, and computes the same to the bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt

os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def transformers() -> Any:
    """The library, imported only where one of these tests runs: every worker collects them all."""
    return pytest.importorskip(
        "transformers", reason="transformers comes with the extra `test`, and is not installed here"
    )


@pytest.mark.parametrize("max_shard_bytes", [None, 20_000])
@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_a_model_of_transformers_is_loaded_from_an_export(
    family: str, max_shard_bytes: int | None, transformers: Any, tmp_path: Path
) -> None:
    if family == "GPT2":  # ties its head to its embedding
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=100, n_positions=32)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=100
        )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    optimizer = torch.optim.AdamW(model.parameters())
    config.save_pretrained(tmp_path / "config")
    saved = cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "saved", progress="off")
    done = cloudckpt.export(
        saved.url,
        tmp_path / "hf",
        to="huggingface",
        prefix="model.",
        config=tmp_path / "config",
        max_shard_bytes=max_shard_bytes,
        progress="off",
    )
    assert ("model.lm_head.weight" in done.left_out) == (family == "GPT2")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(10).view(2, 5)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_a_folder_of_save_pretrained_is_imported_and_loaded(transformers: Any, tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=100, n_positions=32)
    source, target = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    source.save_pretrained(tmp_path / "hf", max_shard_size=20_000)
    checkpoint = cloudckpt.import_(tmp_path / "hf", tmp_path / "out", under="model", progress="off")
    # The head is tied, and not in the folder.
    cloudckpt.load({"model": target}, checkpoint.url, strict=False, progress="off")
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name
