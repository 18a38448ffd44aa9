"""Of a module with frozen parameters the others are saved, and an optimizer beside it knows their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cloudckpt
from cloudckpt import OptionsError, StateMismatchError, Trainable


class Asking(nn.Linear):
    """A module that loads by itself, strictly, and has extra state."""

    def get_extra_state(self) -> object:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


def build(seed: int, kind: type[nn.Linear] = nn.Linear) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(kind(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [nn.Linear, Asking])
def test_training_goes_on_bitwise_over_frozen_parameters_that_were_not_saved(
    tmp_path: Path, kind: type[nn.Linear]
) -> None:
    model, optimizer = build(1, kind)
    frozen = {name: part.clone() for name, part in model.named_parameters() if not part.requires_grad}
    train(model, optimizer, 2)
    cloudckpt.save({"model": Trainable(model), "optimizer": optimizer}, tmp_path / "c", progress="off")
    train(model, optimizer, 2)

    twin, other = build(2, kind)
    for name, part in frozen.items():
        twin.get_parameter(name).data.copy_(part)
    found = cloudckpt.load({"optimizer": other, "model": Trainable(twin)}, tmp_path / "c", progress="off")
    train(twin, other, 2)

    assert all(
        torch.equal(twin.state_dict()[name], part)
        for name, part in model.state_dict().items()
        if isinstance(part, torch.Tensor)
    )
    assert found.fit is not None
    assert (found.fit.missing, found.fit.unexpected) == ((), ())


def test_only_what_is_trained_and_buffers_are_in_the_checkpoint_and_state_has_their_names(tmp_path: Path) -> None:
    model, optimizer = build(1)
    train(model, optimizer, 1)
    cloudckpt.save({"model": Trainable(model), "optimizer": optimizer}, tmp_path / "c", progress="off")
    names = set(cloudckpt.contents(tmp_path / "c").tensors)
    assert {name for name in names if name.startswith("model.")} == {
        "model.1.bias",
        "model.1.running_mean",
        "model.1.running_var",
        "model.1.num_batches_tracked",
        "model.2.weight",
        "model.2.bias",
    }
    assert "optimizer.state.model.2.weight.exp_avg" in names


def test_frozen_parameters_stay_as_they_are(tmp_path: Path) -> None:
    cloudckpt.save({"model": Trainable(build(1)[0])}, tmp_path / "c", progress="off")
    model = build(2)[0]
    before = model[0].weight.clone()  # type: ignore[index]
    cloudckpt.load({"model": Trainable(model)}, tmp_path / "c", progress="off")
    assert torch.equal(model[0].weight, before)  # type: ignore[index]
    assert torch.equal(model[2].weight, build(1)[0][2].weight)  # type: ignore[index]


def test_other_parameters_that_are_frozen_now_are_told_by_name(tmp_path: Path) -> None:
    cloudckpt.save({"model": Trainable(build(1)[0])}, tmp_path / "c", progress="off")
    model = build(2)[0].requires_grad_(True)
    model[2].bias.requires_grad_(False)  # type: ignore[index]
    before = {name: part.clone() for name, part in model.state_dict().items()}
    with pytest.raises(
        StateMismatchError, match=r"not in the checkpoint: .*model\.0\.weight.*not in the state: model\.2"
    ):
        cloudckpt.load({"model": Trainable(model)}, tmp_path / "c", progress="off")
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())


def test_a_whole_model_is_restored_into_its_trainable_part_where_that_is_wanted(tmp_path: Path) -> None:
    saved = build(1)[0]
    cloudckpt.save({"model": saved}, tmp_path / "c", progress="off")
    model = build(2)[0]
    with pytest.raises(StateMismatchError, match=r"in the checkpoint and not in the state: model\.0\.weight"):
        cloudckpt.load({"model": Trainable(model)}, tmp_path / "c", progress="off")
    cloudckpt.load({"model": Trainable(model)}, tmp_path / "c", strict=False, progress="off")
    assert torch.equal(model[2].weight, saved[2].weight)  # type: ignore[index]
    assert not torch.equal(model[0].weight, saved[0].weight)  # type: ignore[index]


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(OptionsError, match="Trainable is for a module, not for a dict"):
        Trainable({})  # type: ignore[arg-type]
