from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", minversion="0.21", reason="make integrations installs the frameworks")

from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn

import cloudckpt
from cloudckpt.errors import OptionsError, StateMismatchError
from cloudckpt.integrations.peft import Adapter
from raw_access import FreshPrefix
from tests.integrations.interrupted import assert_a_run_goes_on_from_a_bucket


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.inner(x))
        return out


def adapted(seed: int, *, rank: int = 4) -> PeftModel:
    torch.manual_seed(0)
    base = Base()
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=rank, target_modules=["inner"], init_lora_weights=False))


def test_a_checkpoint_of_an_adapter_gives_it_back_and_holds_nothing_of_the_model(tmp_path: Path) -> None:
    model, twin = adapted(1), adapted(2)
    x = torch.randn(3, 32)
    cloudckpt.save({"adapter": Adapter(model)}, tmp_path / "c")
    cloudckpt.load({"adapter": Adapter(twin)}, tmp_path / "c")
    assert torch.equal(model(x), twin(x))
    held = cloudckpt.contents(tmp_path / "c")
    assert sum(one.size_bytes for one in held.tensors.values()) == 2 * 4 * 32 * 4


def test_what_is_saved_is_what_peft_keeps_in_a_file(tmp_path: Path) -> None:
    model = adapted(1)
    cloudckpt.save({"adapter": Adapter(model)}, tmp_path / "c")
    model.save_pretrained(tmp_path / "p")
    ours = cloudckpt.read(tmp_path / "c")["adapter"]
    theirs = load_file(tmp_path / "p/adapter_model.safetensors")
    assert isinstance(ours, dict)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_adapter_of_another_rank_is_refused_by_name_and_nothing_is_changed(tmp_path: Path) -> None:
    cloudckpt.save({"adapter": Adapter(adapted(1))}, tmp_path / "c")
    wide = adapted(2, rank=8)
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    with pytest.raises(StateMismatchError, match="lora_A"):
        cloudckpt.load({"adapter": Adapter(wide)}, tmp_path / "c")
    assert all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())


def _trained(config: PeftConfig, seed: int) -> PeftModel:
    """A small model of language, adapted, whose adapter has been trained for some steps."""
    transformers = pytest.importorskip("transformers", reason="make integrations installs the frameworks")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **shape))
    torch.manual_seed(seed)
    model = get_peft_model(base, copy.deepcopy(config))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    tokens = torch.arange(16).reshape(2, 8)
    for step in range(4):
        torch.autograd.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        if isinstance(config, AdaLoraConfig):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


def _language(kind: type[PeftConfig], **how: object) -> PeftConfig:
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=4, **how)


# PEFT calls Transformers by names that are to end.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("config", "why"),
    [
        (_language(PromptEncoderConfig, encoder_hidden_size=8), "mlp_head"),
        (_language(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=8), "transform"),
        (AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=20, tinit=1, tfinal=2), "AdaLoRA"),
    ],
    ids=["p-tuning", "prefix projection", "adalora"],
)
def test_an_adapter_that_peft_keeps_in_another_form_is_refused_and_trainable_saves_it(
    config: PeftConfig, why: str, tmp_path: Path
) -> None:
    model = _trained(config, 1)

    with pytest.raises(OptionsError, match=rf"'default'.*{why}.*cloudckpt\.Trainable"):
        cloudckpt.save({"adapter": Adapter(model)}, tmp_path / "c", progress="off")
    assert not (tmp_path / "c/manifest.json").exists()

    other = _trained(config, 2)
    cloudckpt.save({"adapter": cloudckpt.Trainable(model)}, tmp_path / "t", progress="off")
    cloudckpt.load({"adapter": cloudckpt.Trainable(other)}, tmp_path / "t", progress="off")
    tokens = torch.arange(8)[None]
    assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_that_are_weights_themselves_come_back(kind: type[PeftConfig], tmp_path: Path) -> None:
    model, other = _trained(_language(kind), 1), _trained(_language(kind), 2)
    cloudckpt.save({"adapter": Adapter(model)}, tmp_path / "c", progress="off")
    cloudckpt.load({"adapter": Adapter(other)}, tmp_path / "c", progress="off")
    tokens = torch.arange(8)[None]
    assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_a_model_without_adapters_and_an_unknown_adapter_are_refused_by_name() -> None:
    with pytest.raises(OptionsError, match="get_peft_model"):
        Adapter(Base())
    with pytest.raises(OptionsError, match="no adapter 'other'; it has 'default'"):
        Adapter(adapted(1), "other")


def test_an_adapter_is_found_inside_of_a_wrapper() -> None:
    model = adapted(1)
    assert Adapter(torch.compile(model, backend="eager")).model is model


@pytest.mark.timeout(600)
def test_an_adapter_that_is_killed_and_told_to_end_has_the_losses_of_one_left_alone(s3_url: FreshPrefix) -> None:
    assert_a_run_goes_on_from_a_bucket("peft_lora.py", s3_url)
