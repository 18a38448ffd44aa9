"""An optimizer comes back by the names of its parameters, by its own code, bit for bit, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import cloudckpt
from cloudckpt import OptionsError, StateMismatchError
from tests.state.nets import CUT, Matrices, Net, State, bits, check_goes_on, state_of, train


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, on a busy machine a hundred times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- optimizers --------------------------------------------------------------------------------------------------

Make = Callable[..., Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, t0=1),
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, weight_decay=0.1),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "Adam with a tensor for lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "AdamW": torch.optim.AdamW,
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "Adamax": torch.optim.Adamax,
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
    "LBFGS strong wolfe": lambda p: torch.optim.LBFGS(p, max_iter=2, line_search_fn="strong_wolfe"),
    "NAdam": torch.optim.NAdam,
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1, betas=(0.9, 0.9)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": torch.optim.Rprop,
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    # With momentum its first step reads what was in the memory before: torch does not repeat it itself.
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
}


def test_every_optimizer_of_torch_that_takes_dense_gradients_is_in_the_table() -> None:
    classes = {
        name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and issubclass(kind, Optimizer)
    }
    assert {name.split()[0] for name in OPTIMIZERS} == classes - {"Optimizer", "SparseAdam", "Muon"}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_training_goes_on_bit_for_bit_with_every_optimizer(tmp_path: Path, make: Make, dtype: torch.dtype) -> None:
    def pair() -> tuple[nn.Module, Optimizer]:
        model = Net(dtype=dtype)
        return model, make([parameter for parameter in model.parameters() if parameter.requires_grad])

    check_goes_on(tmp_path / "c", pair)


def test_training_goes_on_bit_for_bit_with_muon(tmp_path: Path) -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")

    def pair() -> tuple[nn.Module, Optimizer]:
        model = Matrices()
        return model, torch.optim.Muon(model.parameters(), lr=0.02)

    check_goes_on(tmp_path / "c", pair)


@pytest.mark.parametrize("name", ["Adam", "Adam with a tensor for lr", "LBFGS", "NAdam"])
def test_training_goes_on_when_every_tensor_is_cut_into_shards_and_spans(tmp_path: Path, name: str) -> None:
    def pair() -> tuple[nn.Module, Optimizer]:
        model = Net()
        return model, OPTIMIZERS[name]([parameter for parameter in model.parameters() if parameter.requires_grad])

    check_goes_on(tmp_path / "c", pair, CUT)


def _with_groups(model: nn.Module, *, is_reordered: bool = False) -> Optimizer:
    """Make two groups with options of their own; frozen and unused parameters are in them too."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": weights, "lr": 0.02, "weight_decay": 0.1}, {"params": others, "lr": 0.5, "betas": (0.5, 0.6)}]
    return torch.optim.AdamW(groups[::-1] if is_reordered else groups)


def test_training_goes_on_with_groups_frozen_and_unused_parameters(tmp_path: Path) -> None:
    def pair() -> tuple[nn.Module, Optimizer]:
        model = Net()
        return model, _with_groups(model)

    check_goes_on(tmp_path / "c", pair)


def by_name(model: nn.Module, optimizer: Optimizer) -> object:
    """Return parameters, their optimizer state and their group's options, by the parameter's name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for parameter in group["params"]:
            found[names[parameter]] = [parameter, optimizer.state.get(parameter, {}), options]
    return bits(found)


@pytest.mark.parametrize("is_named", [False, True], ids=["parameters", "named parameters"])
def test_state_follows_the_names_into_a_model_with_another_order_of_modules_and_groups(
    tmp_path: Path, is_named: bool
) -> None:
    model = Net()
    optimizer = _with_groups(model)
    if is_named:
        optimizer = torch.optim.AdamW(model.named_parameters())
    train(model, optimizer, begin=0)
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    again = Net(is_reordered=True)
    fresh = _with_groups(again, is_reordered=True)
    if is_named:
        fresh = torch.optim.AdamW(again.named_parameters())
        own_names = fresh.param_groups[0]["param_names"]

    cloudckpt.load({"model": again, "optimizer": fresh}, tmp_path / "c")

    assert by_name(again, fresh) == by_name(model, optimizer)
    assert train(again, fresh, begin=3) == train(model, optimizer, begin=3)
    if is_named:
        assert fresh.param_groups[0]["param_names"] == own_names


def test_an_optimizer_that_has_not_stepped_is_restored_as_one_that_has_not_stepped(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.125)
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    again = Net()
    stepped = torch.optim.Adam(again.parameters())
    train(again, stepped, begin=10)
    untouched = Net()
    fresh = torch.optim.Adam(untouched.parameters())

    for state in ({"model": again, "optimizer": stepped}, {"model": untouched, "optimizer": fresh}):
        cloudckpt.load(state, tmp_path / "c")  # type: ignore[arg-type]

    assert (len(stepped.state), len(fresh.state)) == (0, 0)
    losses = train(model, optimizer, begin=0)
    assert train(again, stepped, begin=0) == losses
    assert train(untouched, fresh, begin=0) == losses
    assert {float(state["step"]) for state in fresh.state.values()} == {3.0}


def test_saving_does_not_change_an_optimizer_that_has_not_stepped(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    assert len(optimizer.state) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_rate_that_is_a_tensor_is_restored_as_one(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.25), foreach=False)
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    fresh = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.5), foreach=False)
    cloudckpt.load({"model": model, "optimizer": fresh}, tmp_path / "c")
    assert bits(fresh.param_groups[0]["lr"]) == bits(torch.tensor(0.25))


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside two models with the same names"])
def test_an_optimizer_whose_parameters_have_no_names_is_restored_by_their_places(tmp_path: Path, beside: bool) -> None:
    def pair() -> tuple[list[nn.Module], Optimizer, State]:
        models: list[nn.Module] = [Matrices(), Matrices()]
        optimizer = torch.optim.Adam([parameter for model in models for parameter in model.parameters()])
        state: State = {"optimizer": optimizer}
        return models, optimizer, state | ({"g": models[0], "d": models[1]} if beside else {})

    models, optimizer, state = pair()
    train(nn.Sequential(models[0]), optimizer, begin=0)
    train(nn.Sequential(models[1]), optimizer, begin=0)
    cloudckpt.save(state, tmp_path / "c")
    _, fresh, other = pair()
    cloudckpt.load(other, tmp_path / "c")
    assert bits(fresh.state_dict()) == bits(optimizer.state_dict())


def test_state_that_belongs_to_no_parameter_is_kept(tmp_path: Path) -> None:
    model = Matrices()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    train(model, optimizer, begin=0)
    optimizer.state["global"]["count"] = 7  # type: ignore[index]
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    fresh = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    cloudckpt.load({"model": model, "optimizer": fresh}, tmp_path / "c")
    assert bits(fresh.state_dict()) == bits(optimizer.state_dict())
    assert fresh.state["global"] == {"count": 7}  # type: ignore[index]


class Master(Optimizer):
    """Keeps float32 copies of parameters in half precision."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["master"] = parameter.float()
                state["master"] -= 1e-3 * parameter.grad.float()
                parameter.copy_(state["master"])
        return loss


def test_state_of_higher_precision_than_its_parameter_keeps_it(tmp_path: Path) -> None:
    def pair() -> tuple[nn.Module, Optimizer]:
        model = Matrices(dtype=torch.bfloat16)
        return model, Master(model.parameters())

    check_goes_on(tmp_path / "c", pair)


def test_state_follows_a_parameter_into_another_precision(tmp_path: Path) -> None:
    model = Matrices()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, begin=0)
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    half = Matrices(dtype=torch.bfloat16)
    fresh = torch.optim.Adam(half.parameters())

    cloudckpt.load({"model": half, "optimizer": fresh}, tmp_path / "c")

    assert torch.equal(half.one.weight, model.one.weight.bfloat16())
    kept = optimizer.state[model.one.weight]["exp_avg"]
    assert torch.equal(fresh.state[half.one.weight]["exp_avg"], kept.bfloat16())
    train(half, fresh, begin=3)


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("is_stepped", [False, True], ids=["fresh", "stepped"])
def test_an_optimizer_over_other_parameters_is_refused_by_name_and_nothing_is_changed(
    tmp_path: Path, rate: float | torch.Tensor, is_stepped: bool
) -> None:
    def part(model: Net, names: set[str]) -> Optimizer:
        chosen = [parameter for name, parameter in model.named_parameters() if name in names]
        return torch.optim.Adam(chosen, lr=rate, foreach=False)

    model = Net()
    optimizer = part(model, {"first.weight", "first.bias", "last.bias"})
    if is_stepped:
        train(model, optimizer, begin=0)
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    again = Net()
    other = part(again, {"first.weight", "last.weight"})
    train(again, other, begin=5)
    before = state_of(again, other)

    with pytest.raises(StateMismatchError) as caught:
        cloudckpt.load({"model": again, "optimizer": other}, tmp_path / "c")

    assert caught.value.missing == ("optimizer.model.last.weight",)
    assert set(caught.value.unexpected) == {"optimizer.model.first.bias", "optimizer.model.last.bias"}
    assert state_of(again, other) == before


def test_not_strict_restores_the_state_of_the_parameters_that_both_have(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.Adam([model.first.weight, model.last.bias], lr=0.25)  # type: ignore[union-attr, list-item]
    train(model, optimizer, begin=0)
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    again = Net()
    other = torch.optim.Adam(
        [
            {"params": [again.first.weight], "lr": 0.5},  # type: ignore[union-attr]
            {"params": [again.last.weight], "lr": 0.75},  # type: ignore[union-attr]
        ]
    )

    cloudckpt.load({"model": again, "optimizer": other}, tmp_path / "c", strict=False)

    assert [group["lr"] for group in other.param_groups] == [0.25, 0.75]
    assert bits(other.state[again.first.weight]) == bits(optimizer.state[model.first.weight])  # type: ignore[index, union-attr]
    assert list(other.state) == [again.first.weight]  # type: ignore[union-attr]
    train(again, other, begin=3)


def test_the_same_parameters_in_other_groups_are_refused(tmp_path: Path) -> None:
    model = Net()
    cloudckpt.save({"model": model, "optimizer": _with_groups(model)}, tmp_path / "c")
    with pytest.raises(StateMismatchError, match="the same parameters in other groups"):
        cloudckpt.load({"model": model, "optimizer": torch.optim.AdamW(model.parameters())}, tmp_path / "c")


def test_something_else_than_an_optimizer_is_refused_for_one(tmp_path: Path) -> None:
    model = Net()
    cloudckpt.save({"model": model, "optimizer": {"lr": 0.1}}, tmp_path / "c")
    with pytest.raises(OptionsError, match="no optimizer under 'optimizer'"):
        cloudckpt.load({"model": model, "optimizer": torch.optim.Adam(model.parameters())}, tmp_path / "c")
