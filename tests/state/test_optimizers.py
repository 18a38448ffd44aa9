"""An optimizer comes back by the names of its parameters, by its own code, bit for bit, or is refused by name."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

import cloudckpt
from cloudckpt import OptionsError, StateMismatchError
from cloudckpt.format import PathElement
from cloudckpt.state import bind
from cloudckpt.state.beside import Beside
from cloudckpt.state.groups import match_groups
from cloudckpt.state.optimizers import NamedEntry
from cloudckpt.state.plain import PlainModules
from tests.effort import diagonal
from tests.state.nets import CUT, SCHEDULERS, Decay, Matrices, Net, State, bits, check_goes_on, state_of, train

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


@diagonal(
    "dtype, make",
    [torch.float32, torch.float64, torch.bfloat16],
    [pytest.param(make, id=name) for name, make in OPTIMIZERS.items()],
)
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

    with pytest.raises(
        StateMismatchError, match=r"model.one.weight is torch.bfloat16 here and torch.float32 there \(cast"
    ):
        cloudckpt.load({"model": half, "optimizer": fresh}, tmp_path / "c")
    found = cloudckpt.load({"model": half, "optimizer": fresh}, tmp_path / "c", cast=True)

    assert found.fit is not None
    assert "model.one.weight" in found.fit.cast
    assert torch.equal(half.one.weight, model.one.weight.bfloat16())
    kept = optimizer.state[model.one.weight]["exp_avg"]
    assert torch.equal(fresh.state[half.one.weight]["exp_avg"], kept.bfloat16())
    train(half, fresh, begin=3)


class Renamed(nn.Module):
    """Is saved under other names than its parameters have, as hooks may have it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = Matrices(dtype)
        self._register_state_dict_hook(Renamed._rename)
        self.register_load_state_dict_pre_hook(Renamed._rename_back)

    @staticmethod
    def _rename(_module: nn.Module, state: State, _prefix: str, _metadata: object) -> None:
        for key in list(state):
            state[key.removeprefix("base.")] = state.pop(key)

    @staticmethod
    def _rename_back(_module: nn.Module, state: State, *_: object) -> None:
        for key in list(state):
            state[f"base.{key}"] = state.pop(key)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(x)
        return result


@pytest.mark.parametrize(
    ("there", "here"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=["wider", "narrower"]
)
def test_state_follows_a_parameter_that_is_saved_under_another_name(
    tmp_path: Path, there: torch.dtype, here: torch.dtype
) -> None:
    model, again = Renamed(there), Renamed(here)
    optimizer, fresh = torch.optim.Adam(model.parameters()), torch.optim.Adam(again.parameters())
    train(model, optimizer, begin=0)
    cloudckpt.save({"model": model, "o": optimizer}, tmp_path / "c")
    cloudckpt.load({"model": again, "o": fresh}, tmp_path / "c", cast=True)
    kept = optimizer.state[model.base.one.weight]["exp_avg"]
    assert bits(fresh.state[again.base.one.weight]["exp_avg"]) == bits(kept.to(here))
    train(again, fresh, begin=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("is_alone", [False, True], ids=["renamed", "alone"])
def test_state_of_a_dtype_of_its_own_keeps_it_where_its_parameter_is_saved_under_another_name(
    tmp_path: Path, is_alone: bool, dtype: torch.dtype
) -> None:
    model, again = Renamed(torch.bfloat16), Renamed(dtype)
    optimizer, fresh = Master(model.named_parameters()), Master(again.named_parameters())
    train(model, optimizer, begin=0)
    optimizer.state[model.base.one.weight]["exact"] = torch.ones(8, 6, dtype=torch.float64)
    cloudckpt.save({"o": optimizer} if is_alone else {"model": model, "o": optimizer}, tmp_path / "c")
    cloudckpt.load({"o": fresh} if is_alone else {"model": again, "o": fresh}, tmp_path / "c")
    assert bits(list(fresh.state.values())) == bits(list(optimizer.state.values()))


def test_a_part_as_large_as_its_parameter_was_has_the_shape_that_the_parameter_has_here() -> None:
    model = nn.Linear(4, 3)
    (entry,) = (each for each in bind({"m": model, "o": torch.optim.Adam(model.parameters())}) if each.name == "o")
    assert isinstance(entry, NamedEntry)
    saved = {"m.weight": (3, 1), "m.bias": (3,)}

    def shape(parameter: str, key: PathElement, shape: tuple[int, ...]) -> tuple[int, ...]:
        return entry.shape_here(["state", parameter, key], shape, saved.get)

    assert shape("m.weight", "exp_avg", (3, 1)) == (3, 4)
    assert shape("m.weight", "row", (3,)) == (3,)
    assert shape("m.weight", "step", ()) == ()
    assert shape("m.bias", "exp_avg", (3,)) == (3,)
    assert shape("m.other", "exp_avg", (3, 1)) == (3, 1)
    assert entry.shape_here(["param_groups", 0, "lr"], (), saved.get) == ()


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


# -- the optimizer's own code ------------------------------------------------------------------------------------


class Scaled(torch.optim.SGD):
    """Keeps something beside the state of its parameters, as SAM and Lookahead do."""

    scale = 1.0
    slow: tuple[torch.Tensor, ...] = ()

    def state_dict(self) -> State:
        return {**super().state_dict(), "scale": self.scale, "slow": {"weights": list(self.slow)}}

    def load_state_dict(self, state_dict: State) -> None:
        self.scale, self.slow = state_dict["scale"], tuple(state_dict["slow"]["weights"])
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})


def _scaled() -> tuple[nn.Module, Scaled]:
    model = Matrices()
    return model, Scaled(model.parameters(), lr=0.1, momentum=0.5)


def test_what_an_optimizer_says_beside_its_parameters_state_comes_back(tmp_path: Path) -> None:
    model, optimizer = _scaled()
    train(model, optimizer, begin=0)
    optimizer.scale, optimizer.slow = 8.0, (torch.ones(3), torch.zeros(2, dtype=torch.int64))
    again, fresh = _scaled()

    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    cloudckpt.load({"model": again, "optimizer": fresh}, tmp_path / "c")

    assert fresh.scale == 8.0
    assert state_of(again, fresh) == state_of(model, optimizer)


def test_what_only_the_optimizer_can_read_is_refused_for_parameters_in_another_order(tmp_path: Path) -> None:
    model, optimizer = _scaled()
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    fresh = Scaled(list(model.parameters())[::-1], lr=0.1)
    with pytest.raises(StateMismatchError, match="keeps 'slow' beside the state of its parameters, which stand in ano"):
        cloudckpt.load({"model": model, "optimizer": fresh}, tmp_path / "c")


def test_hooks_of_state_dict_and_load_state_dict_have_the_last_word(tmp_path: Path) -> None:
    def to_disk(_: Optimizer, state: State) -> State:
        return {**state, "version": 2}

    def from_disk(_: Optimizer, state: State) -> State:
        assert state["version"] == 2
        for part in state["state"].values():
            part["exp_avg"] = part["exp_avg"].bfloat16()
        return state

    def after(optimizer: Optimizer) -> None:
        for part in optimizer.state.values():
            part["exp_avg_sq"] = part["exp_avg_sq"].double()

    model = Matrices()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, begin=0)
    optimizer.register_state_dict_post_hook(to_disk)
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    fresh = torch.optim.Adam(model.parameters())
    fresh.register_load_state_dict_pre_hook(from_disk)
    fresh.register_load_state_dict_post_hook(after)

    cloudckpt.load({"model": model, "optimizer": fresh}, tmp_path / "c")

    for parameter, part in fresh.state.items():
        saved = optimizer.state[parameter]
        assert bits(part["exp_avg"]) == bits(saved["exp_avg"].bfloat16())
        assert bits(part["exp_avg_sq"]) == bits(saved["exp_avg_sq"].double())
    assert not {*fresh._optimizer_load_state_dict_pre_hooks.values()} - {from_disk}
    assert not {*fresh._optimizer_load_state_dict_post_hooks.values()} - {after}


class Modern(Optimizer):
    """Brings states that older versions of it saved up to date."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def __setstate__(self, state: State) -> None:
        super().__setstate__(state)
        for part in self.state.values():
            part["m"] = part["m"].float()
            part.setdefault("seen", type(part["m"]).__name__)


@pytest.mark.parametrize("changed", [False, True], ids=["same dtype", "other dtype"])
def test_what_an_optimizer_does_in_its_setstate_stays_done(tmp_path: Path, changed: bool) -> None:
    model, again = Matrices(torch.bfloat16), Matrices(torch.float64 if changed else torch.bfloat16)
    optimizer, fresh = Modern(model.parameters()), Modern(again.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {"m": torch.ones_like(parameter).detach()}
    cloudckpt.save({"model": model, "o": optimizer}, tmp_path / "c")
    cloudckpt.load({"model": again, "o": fresh}, tmp_path / "c")
    for parameter, part in fresh.state.items():
        assert bits(part) == bits({"m": torch.ones(parameter.shape), "seen": "Tensor"})
    assert "__setstate__" not in vars(fresh)


class Direct(torch.optim.SGD):
    """Takes what it is given, after the hooks, without any __setstate__."""

    def load_state_dict(self, state_dict: State) -> None:
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            self.state[parameter] = state_dict["state"][number]


def test_an_optimizer_that_sets_its_state_without_torchs_code_has_what_was_saved(tmp_path: Path) -> None:
    model = Matrices()
    optimizer, fresh = (Direct(model.parameters(), lr=0.1, momentum=0.5) for _ in range(2))
    train(model, optimizer, begin=0)
    cloudckpt.save({"model": model, "o": optimizer}, tmp_path / "c")
    cloudckpt.load({"model": model, "o": fresh}, tmp_path / "c")
    assert bits(fresh.state_dict()) == bits(optimizer.state_dict())


CONTAINERS: dict[str, Any] = {
    "deque": deque([torch.tensor(16777217), torch.ones(2)], maxlen=3),
    "ordered": OrderedDict(b=torch.tensor([0.1], dtype=torch.float64), a=1),
    "of a dict": {"deep": OrderedDict(a=[deque([1.5], maxlen=2)])},
    "counter": Counter("aab"),
    "set": {1, 2},
    "frozen": frozenset({"a"}),
    "bytes": b"ab",
    "range": range(2, 9, 3),
    "size": torch.Size([2, 3]),
    "array": np.arange(3, dtype=np.int16),
}


@diagonal("kind, dtype", CONTAINERS, [torch.bfloat16, torch.float64])
def test_a_container_in_the_state_comes_back_as_it_was(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model, again = Matrices(torch.bfloat16), Matrices(dtype)
    optimizer, fresh = (torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.5) for each in (model, again))
    optimizer.state[model.one.weight]["mine"] = saved = CONTAINERS[kind]
    cloudckpt.save({"model": model, "o": optimizer}, tmp_path / "c")
    cloudckpt.load({"model": again, "o": fresh}, tmp_path / "c")
    found = fresh.state[again.one.weight]["mine"]
    assert type(found) is type(saved)
    assert getattr(found, "maxlen", None) == getattr(saved, "maxlen", None)
    assert str(found) == str(saved)  # tensors say their dtype


def test_tensors_in_a_container_follow_their_parameter_into_another_precision(tmp_path: Path) -> None:
    model, again = Matrices(torch.bfloat16), Matrices()
    optimizer, fresh = (torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.5) for each in (model, again))
    weight = model.one.weight.detach()
    optimizer.state[model.one.weight]["mine"] = {"last": deque([weight, weight.double()], maxlen=2)}
    cloudckpt.save({"model": model, "o": optimizer}, tmp_path / "c")
    cloudckpt.load({"model": again, "o": fresh}, tmp_path / "c")
    found = fresh.state[again.one.weight]["mine"]["last"]
    assert bits(list(found)) == bits([weight.float(), weight.double()])
    assert found.maxlen == 2


STATES: dict[str, object] = {
    "int64": torch.tensor([2**40 + 1]),
    "nested int64": {"k": {"count": torch.tensor([2**40 + 1])}},
    "float64": torch.tensor([0.1], dtype=torch.float64),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "bool": torch.tensor([True, False]),
    "list": [torch.arange(3), 2.5, {"deep": torch.arange(2, dtype=torch.int8)}],
    "tuple": (torch.arange(3), None),
    "text": "warm",
    "texts": ["a", {"b": "c"}],
    "number": 7,
    "single": torch.tensor(1.5, dtype=torch.float64),
}


@diagonal(
    "kind, is_stepped, dtype",
    STATES,
    [pytest.param(False, id="fresh"), pytest.param(True, id="stepped")],
    [torch.float32, torch.bfloat16],
)
def test_state_of_any_type_and_depth_keeps_it_whatever_its_parameter_is(
    tmp_path: Path, kind: str, is_stepped: bool, dtype: torch.dtype
) -> None:
    model = Matrices(dtype)
    optimizer, fresh = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5) for _ in range(2))
    optimizer.state[model.one.weight]["mine"] = STATES[kind]
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    if is_stepped:
        train(model, fresh, begin=0)
    cloudckpt.load({"model": model, "optimizer": fresh}, tmp_path / "c")
    assert bits(fresh.state_dict()) == bits(optimizer.state_dict())


class Hollow(Optimizer):
    """Wraps an optimizer and never was initialized as one, as those of training libraries."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner

    @property
    def param_groups(self) -> list[State]:  # type: ignore[override]
        return self.optimizer.param_groups

    def state_dict(self) -> State:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: State) -> None:
        self.optimizer.load_state_dict(state_dict)


class Boxed(Optimizer):
    """Wraps an optimizer, and has a state_dict of another kind, and no groups of its own."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.scale = 1.0

    def state_dict(self) -> State:
        return {"inner": self.inner.state_dict(), "scale": self.scale}

    def load_state_dict(self, state_dict: State) -> None:
        self.scale = state_dict["scale"]
        self.inner.load_state_dict(state_dict["inner"])


@pytest.mark.parametrize("wrap", [Hollow, Boxed])
def test_an_optimizer_that_wraps_another_is_asked_by_its_own_code(
    tmp_path: Path, wrap: Callable[[Optimizer], Optimizer]
) -> None:
    def parts() -> tuple[nn.Module, Optimizer, Optimizer]:
        model = Matrices(torch.bfloat16)
        inner = Master(model.parameters())
        return model, inner, wrap(inner)

    model, inner, outer = parts()
    train(model, inner, begin=0)
    cloudckpt.save({"model": model, "optimizer": outer}, tmp_path / "c")
    again, fresh, other = parts()
    cloudckpt.load({"model": again, "optimizer": other}, tmp_path / "c")
    assert state_of(again, fresh) == state_of(model, inner)
    assert train(again, fresh, begin=3) == train(model, inner, begin=3)


def test_a_wrapper_follows_the_names_where_it_has_torchs_state_dict(tmp_path: Path) -> None:
    model = Matrices()
    inner = torch.optim.Adam(model.parameters())
    train(model, inner, begin=0)
    cloudckpt.save({"model": model, "optimizer": Hollow(inner)}, tmp_path / "c")
    fresh = torch.optim.Adam(list(model.parameters())[::-1])
    cloudckpt.load({"model": model, "optimizer": Hollow(fresh)}, tmp_path / "c")
    assert by_name(model, fresh) == by_name(model, inner)


def test_a_state_dict_of_another_kind_is_refused_for_parameters_in_another_order(tmp_path: Path) -> None:
    model = Matrices()
    cloudckpt.save({"model": model, "optimizer": Boxed(torch.optim.Adam(model.parameters()))}, tmp_path / "c")
    other = Boxed(torch.optim.Adam(list(model.parameters())[::-1]))
    with pytest.raises(StateMismatchError, match="its parameters stand in another order"):
        cloudckpt.load({"model": model, "optimizer": other}, tmp_path / "c")


class Sam(Optimizer):
    """Shares the groups of the optimizer that it wraps, and says nothing of its state, as is common."""

    def __init__(self, params: Any, base: Callable[[Any], Optimizer]) -> None:
        super().__init__(params, {"rho": 0.05})
        self.base_optimizer = base(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.base_optimizer.step(closure)

    def load_state_dict(self, state_dict: State) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


def _sam() -> tuple[nn.Module, Sam]:
    model = Matrices()
    return model, Sam(model.parameters(), lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9))


def test_an_optimizer_that_leaves_out_the_state_of_the_one_it_wraps_is_refused_alone(tmp_path: Path) -> None:
    model, optimizer = _sam()
    cloudckpt.save({"model": model, "sam": optimizer}, tmp_path / "fresh")
    train(model, optimizer, begin=0)
    with pytest.raises(OptionsError, match="'sam' leaves out the state of the SGD that it wraps; put that one into"):
        cloudckpt.save({"model": model, "sam": optimizer}, tmp_path / "c")


class Several(Optimizer):
    """Keeps inner optimizers in a container, and says nothing of their state."""

    def __init__(self, params: Any, hold: Callable[[Optimizer], object]) -> None:
        params = list(params)
        super().__init__(params, {})
        self.first = torch.optim.Adam(params)
        self.held = hold(self.first)
        del self.first

    def step(self, closure: Any = None) -> Any:
        found = self.held
        while not isinstance(found, Optimizer):
            found = next(iter(found.values() if isinstance(found, dict) else found))  # type: ignore[attr-defined]
        return found.step(closure)


HOLD: dict[str, Callable[[Optimizer], object]] = {
    "plain": lambda inner: inner,
    "list": lambda inner: [inner],
    "dict": lambda inner: {"adam": inner},
    "set": lambda inner: {inner},
    "list of dicts": lambda inner: [{"adam": inner}],
    "dict of tuples": lambda inner: {"adam": (inner, None)},
    "one of many": lambda inner: [inner, *range(2000)],
}


@pytest.mark.parametrize("hold", HOLD.values(), ids=HOLD)
def test_a_wrapped_optimizer_is_found_in_whatever_holds_it(tmp_path: Path, hold: Callable[[Optimizer], object]) -> None:
    model = Matrices()
    optimizer = Several(model.parameters(), hold)
    train(model, optimizer, begin=0)
    with pytest.raises(OptionsError, match="'o' leaves out the state of the Adam that it wraps; put that one into"):
        cloudckpt.save({"model": model, "o": optimizer}, tmp_path / "c")


@pytest.mark.parametrize("names", [("sam", "base"), ("base", "sam")], ids=" then ".join)
def test_an_optimizer_and_the_one_it_wraps_still_share_their_groups(tmp_path: Path, names: tuple[str, str]) -> None:
    def state(model: nn.Module, optimizer: Sam) -> State:
        return {"model": model, **{name: {"sam": optimizer, "base": optimizer.base_optimizer}[name] for name in names}}

    model, optimizer = _sam()
    train(model, optimizer, begin=0)
    cloudckpt.save(state(model, optimizer), tmp_path / "c")
    again, fresh = _sam()
    cloudckpt.load(state(again, fresh), tmp_path / "c")
    for each in (optimizer, fresh):
        each.param_groups[0]["lr"] = 0.01
    assert train(again, fresh, begin=3) == train(model, optimizer, begin=3)
    assert state_of(again, fresh.base_optimizer) == state_of(model, optimizer.base_optimizer)


class Clearing(torch.optim.SGD):
    """Clears its own tensors before it copies into them."""

    def load_state_dict(self, state_dict: State) -> None:
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            own = self.state[parameter]["momentum_buffer"]
            own.zero_()
            own.add_(state_dict["state"][number]["momentum_buffer"])


def test_an_optimizer_with_a_load_of_its_own_is_given_memory_of_its_own(tmp_path: Path) -> None:
    model = Matrices()
    optimizer, other = (Clearing(model.parameters(), lr=0.1, momentum=0.5) for _ in range(2))
    train(model, optimizer, begin=0)
    train(model, other, begin=5)
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    cloudckpt.load({"model": model, "optimizer": other}, tmp_path / "c")
    assert bits(other.state_dict()) == bits(optimizer.state_dict())


def test_moments_are_filled_where_they_stand(tmp_path: Path) -> None:
    model = Matrices()
    optimizer, other = (torch.optim.Adam(model.parameters()) for _ in range(2))
    train(model, optimizer, begin=0)
    train(model, other, begin=5)
    memory = [part["exp_avg"].data_ptr() for part in other.state.values()]
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    cloudckpt.load({"model": model, "optimizer": other}, tmp_path / "c")
    assert [part["exp_avg"].data_ptr() for part in other.state.values()] == memory
    assert bits(other.state_dict()) == bits(optimizer.state_dict())


def test_vectors_of_all_parameters_are_refused_for_parameters_in_another_order(tmp_path: Path) -> None:
    model = Matrices()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    train(model, optimizer, begin=0)
    cloudckpt.save({"model": model, "o": optimizer}, tmp_path / "c")
    with pytest.raises(StateMismatchError, match="o keeps vectors of all parameters together"):
        cloudckpt.load({"model": model, "o": torch.optim.LBFGS(list(model.parameters())[::-1])}, tmp_path / "c")


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters:UserWarning")
def test_a_parameter_that_stands_twice_in_its_group_is_restored_as_one(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2))
    there = _marked(weight, weight)
    cloudckpt.save({"weight": weight, "o": there}, tmp_path / "c")
    here = torch.optim.SGD([weight, weight], lr=0.5)
    cloudckpt.load({"weight": weight, "o": here}, tmp_path / "c")
    assert bits(here.state_dict()) == bits(there.state_dict())


# -- names -------------------------------------------------------------------------------------------------------


def _marked(*parameters: torch.Tensor) -> Optimizer:
    """Return an optimizer whose state tells its parameters apart."""
    optimizer = torch.optim.SGD(list(parameters), lr=0.1, momentum=0.5)
    for place, parameter in enumerate(parameters):
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, place + 1.0).detach()
    return optimizer


def _marks(optimizer: Optimizer, *parameters: torch.Tensor) -> list[float]:
    return [float(optimizer.state[parameter]["momentum_buffer"].flatten()[0]) for parameter in parameters]


def test_parameters_of_two_modules_with_the_same_names_are_told_apart(tmp_path: Path) -> None:
    g, d = Matrices(), Matrices()
    weights = [*g.parameters(), *d.parameters()]
    cloudckpt.save({"g": g, "d": d, "o": _marked(*weights)}, tmp_path / "c")
    other = torch.optim.SGD(weights[::-1], lr=0.1, momentum=0.5)
    cloudckpt.load({"d": d, "g": g, "o": other}, tmp_path / "c")
    assert _marks(other, *weights) == [1.0, 2.0, 3.0, 4.0]


def test_a_parameter_that_is_a_value_of_the_state_has_its_name_there(tmp_path: Path) -> None:
    model = Matrices()
    loose = {"temperature": nn.Parameter(torch.ones(2)), "more": [nn.Parameter(torch.ones(2))]}
    weights: list[Any] = [loose["temperature"], *model.parameters(), loose["more"][0]]  # type: ignore[index]
    state: State = {"model": model, "loose": loose}
    cloudckpt.save({**state, "o": _marked(*weights)}, tmp_path / "c")
    other = torch.optim.SGD(weights[::-1], lr=0.1, momentum=0.5)
    cloudckpt.load({**state, "o": other}, tmp_path / "c")
    assert _marks(other, *weights) == [1.0, 2.0, 3.0, 4.0]


def test_one_parameter_without_a_name_takes_no_name_from_the_others(tmp_path: Path) -> None:
    model, loose = Matrices(), nn.Parameter(torch.ones(2))
    weights: list[torch.Tensor] = [loose, *model.parameters()]
    cloudckpt.save({"model": model, "o": _marked(*weights)}, tmp_path / "c")
    other = torch.optim.SGD(weights[::-1], lr=0.1, momentum=0.5)
    cloudckpt.load({"model": model, "o": other}, tmp_path / "c")
    assert _marks(other, *weights) == [1.0, 2.0, 3.0]


def test_names_that_the_optimizer_was_given_count_where_nothing_stands_beside_it(tmp_path: Path) -> None:
    model = Matrices()
    optimizer = torch.optim.Adam(model.named_parameters())
    train(model, optimizer, begin=0)
    cloudckpt.save({"o": optimizer}, tmp_path / "c")
    other = torch.optim.Adam(list(model.named_parameters())[::-1])
    cloudckpt.load({"o": other}, tmp_path / "c")
    assert by_name(model, other) == by_name(model, optimizer)
    assert other.param_groups[0]["param_names"] == ["two.weight", "one.weight"]


@pytest.mark.parametrize("key", ["model", "teacher", "student"])
def test_a_name_that_an_optimizer_was_given_is_none_where_the_state_has_it(tmp_path: Path, key: str) -> None:
    def parts() -> tuple[nn.ModuleDict, Optimizer]:
        both = nn.ModuleDict({"model": Matrices(), "teacher": Matrices()})
        return both, torch.optim.SGD(both.named_parameters(), lr=0.1, momentum=0.5)

    both, optimizer = parts()
    for place, parameter in enumerate(both.parameters()):
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, place + 1.0).detach()
    cloudckpt.save({key: both["teacher"], "o": optimizer}, tmp_path / "c")
    again, other = parts()
    cloudckpt.load({key: again["teacher"], "o": other}, tmp_path / "c")
    assert _marks(other, *again.parameters()) == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("there", ["with its module", "alone"])
def test_parameters_with_names_are_never_taken_for_some_without(tmp_path: Path, there: str, strict: bool) -> None:
    model = Matrices()
    optimizer, other = _marked(*model.parameters()), _marked(*model.parameters())
    states: dict[str, State] = {"with its module": {"model": model, "o": optimizer}, "alone": {"o": optimizer}}
    cloudckpt.save(states.pop(there), tmp_path / "c")
    (here,) = ({**state, "o": other} for state in states.values())
    before = bits(other.state_dict())
    with pytest.raises(
        StateMismatchError, match=r"o has \d parameters here and . there that nothing in the state names"
    ):
        cloudckpt.load(here, tmp_path / "c", strict=strict)
    assert bits(other.state_dict()) == before


def test_parameters_without_names_whose_shapes_stand_in_another_order_are_refused(tmp_path: Path) -> None:
    wide, tall = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(5, 2))
    cloudckpt.save({"o": _marked(wide, tall)}, tmp_path / "c")
    with pytest.raises(StateMismatchError, match=r"parameter 0 of o is .* of \(5, 2\) here and .* of \(2, 5\)"):
        cloudckpt.load({"o": torch.optim.SGD([tall, wide], lr=0.1)}, tmp_path / "c")


def test_parameters_without_names_are_not_restored_into_less_precise_ones(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2))
    cloudckpt.save({"o": _marked(weight)}, tmp_path / "c")
    half, double = (nn.Parameter(weight.detach().to(dtype)) for dtype in (torch.bfloat16, torch.float64))
    other = torch.optim.SGD([double], lr=0.1, momentum=0.5)
    cloudckpt.load({"o": other}, tmp_path / "c")
    assert bits(other.state[double]["momentum_buffer"]) == bits(torch.ones(2, dtype=torch.float64))
    with pytest.raises(StateMismatchError, match=r"parameter 0 of o is torch.bfloat16 of .* and torch.float32 of"):
        cloudckpt.load({"o": torch.optim.SGD([half], lr=0.1)}, tmp_path / "c")


class Shared(nn.Module):
    """One weight under two names."""

    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        self.other = nn.Linear(2, 2, bias=False)
        for name in names:
            self.add_module(name, nn.Linear(2, 2, bias=False))
        self.get_submodule(names[1]).weight = self.get_submodule(names[0]).weight


def test_a_tied_parameter_is_found_by_any_of_its_names(tmp_path: Path) -> None:
    model, again = Shared(("a", "b")), Shared(("b", "a"))
    cloudckpt.save({"model": model, "o": _marked(*model.parameters())}, tmp_path / "c")
    weights = list(again.parameters())
    other = torch.optim.SGD(weights[::-1], lr=0.1, momentum=0.5)
    cloudckpt.load({"model": again, "o": other}, tmp_path / "c")
    assert _marks(other, *weights) == [1.0, 2.0]


def test_two_parameters_are_not_restored_into_one_that_is_tied(tmp_path: Path) -> None:
    model = Shared(("a", "b"))
    model.b = nn.Linear(2, 2, bias=False)
    model.b.load_state_dict(model.a.state_dict())  # type: ignore[union-attr, operator]
    cloudckpt.save({"model": model, "o": _marked(*model.parameters())}, tmp_path / "c")
    again = Shared(("a", "b"))
    with pytest.raises(StateMismatchError, match=r"o has as one parameter here what are several there: model\.a\.w"):
        cloudckpt.load({"model": again, "o": _marked(*again.parameters())}, tmp_path / "c")


# -- groups ------------------------------------------------------------------------------------------------------


def test_every_group_finds_its_options_in_whatever_order(tmp_path: Path) -> None:
    model = Net()
    parameters = list(model.parameters())
    there = torch.optim.SGD([{"params": [each], "lr": 1.0 + place} for place, each in enumerate(parameters)], lr=0.1)
    cloudckpt.save({"model": model, "o": there}, tmp_path / "c")
    here = torch.optim.SGD([{"params": [each]} for each in parameters[::-1]], lr=0.1)
    cloudckpt.load({"model": model, "o": here}, tmp_path / "c")
    assert by_name(model, here) == by_name(model, there)


def test_empty_groups_keep_their_options(tmp_path: Path) -> None:
    model = Matrices()

    def make(*rates: float) -> Optimizer:
        first, second, third = rates
        return torch.optim.SGD(
            [{"params": [], "lr": first}, {"params": model.parameters(), "lr": second}, {"params": [], "lr": third}]
        )

    there, here = make(0.25, 0.5, 0.75), make(1.0, 1.0, 1.0)
    cloudckpt.save({"model": model, "o": there}, tmp_path / "c")
    cloudckpt.load({"model": model, "o": here}, tmp_path / "c")
    assert bits(here.state_dict()) == bits(there.state_dict())


@pytest.mark.parametrize("is_more", [True, False], ids=["more here", "more there"])
def test_another_number_of_empty_groups_is_refused(tmp_path: Path, is_more: bool) -> None:
    model = Matrices()
    one: list[State] = [{"params": list(model.parameters())}]
    two: list[State] = [*one, {"params": []}]
    there, here = (torch.optim.SGD(groups, lr=0.1) for groups in ((one, two) if is_more else (two, one)))
    cloudckpt.save({"model": model, "o": there}, tmp_path / "c")
    with pytest.raises(StateMismatchError) as caught:
        cloudckpt.load({"model": model, "o": here}, tmp_path / "c")
    assert (caught.value.missing if is_more else caught.value.unexpected) == ("o.param_groups.1",)


def test_tensors_that_groups_share_do_not_share_what_was_saved(tmp_path: Path) -> None:
    model = Matrices()

    def make(*rates: torch.Tensor) -> Optimizer:
        groups = [{"params": [each], "lr": rate} for each, rate in zip(model.parameters(), rates, strict=True)]
        return torch.optim.Adam(groups, foreach=False)

    rate = torch.tensor(0.5)
    cloudckpt.save({"model": model, "o": make(torch.tensor(0.1), torch.tensor(0.2))}, tmp_path / "c")
    here = make(rate, rate)
    cloudckpt.load({"model": model, "o": here}, tmp_path / "c")
    assert [float(group["lr"]) for group in here.param_groups] == [float(torch.tensor(value)) for value in (0.1, 0.2)]
    assert float(rate) == 0.5


def test_not_strict_refuses_common_parameters_in_other_groups(tmp_path: Path) -> None:
    model = Net()
    first, last = list(model.first.parameters()), list(model.last.parameters())  # type: ignore[union-attr]
    cloudckpt.save({"model": model, "o": torch.optim.SGD([*first, *last], lr=0.1)}, tmp_path / "c")
    here = torch.optim.SGD([{"params": first}, {"params": last[:1]}], lr=0.1)
    with pytest.raises(StateMismatchError, match="the same parameters in other groups"):
        cloudckpt.load({"model": model, "o": here}, tmp_path / "c", strict=False)


def test_not_strict_leaves_the_state_of_parameters_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    model = Matrices()
    one, two = model.parameters()
    cloudckpt.save({"model": model, "o": _marked(one)}, tmp_path / "c")
    other = _marked(two, one)
    cloudckpt.load({"model": model, "o": other}, tmp_path / "c", strict=False)
    assert _marks(other, one, two) == [1.0, 1.0]


# -- schedulers --------------------------------------------------------------------------------------------------


def _two_groups(model: Matrices, *, is_reordered: bool) -> Optimizer:
    groups: list[State] = [{"params": [model.one.weight], "lr": 0.2}, {"params": [model.two.weight], "lr": 0.1}]
    return torch.optim.SGD(groups[::-1] if is_reordered else groups, momentum=0.9)


def _rates(optimizer: Optimizer, scheduler: Any, steps: int) -> list[dict[int, float]]:
    found = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        found.append({id(group["params"][0]): float(group["lr"]) for group in optimizer.param_groups})
    return found


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@diagonal("name, names", SCHEDULERS, [("o", "scheduler"), ("scheduler", "o")])
def test_the_rates_follow_their_groups_with_every_scheduler(tmp_path: Path, name: str, names: tuple[str, str]) -> None:
    model = Matrices()

    def parts(*, is_reordered: bool) -> State:
        optimizer = _two_groups(model, is_reordered=is_reordered)
        found = {"o": optimizer, "scheduler": SCHEDULERS[name](optimizer)}
        return {"model": model} | {key: found[key] for key in names}

    there = parts(is_reordered=False)
    _rates(there["o"], there["scheduler"], 4)
    cloudckpt.save(there, tmp_path / "c")
    here = parts(is_reordered=True)

    cloudckpt.load(here, tmp_path / "c")

    for key in ("base_lrs", "_last_lr", "max_lrs", "min_lrs"):
        kept = [getattr(state["scheduler"], key, []) for state in (here, there)]
        assert kept[0] == kept[1][::-1]
    assert _rates(here["o"], here["scheduler"], 8) == _rates(there["o"], there["scheduler"], 8)


def test_every_list_that_a_scheduler_of_torch_keeps_for_groups_is_known() -> None:
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(13)]
    found = set()
    for make in [*SCHEDULERS.values(), lambda optimizer: SWALR(optimizer, 0.1)]:
        scheduler = make(torch.optim.SGD([{"params": [each]} for each in parameters], lr=0.1, momentum=0.9))
        found |= {key for key, kept in vars(scheduler).items() if isinstance(kept, list | tuple) and len(kept) == 13}
    assert found == {*("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")}


def test_each_group_keeps_its_function_when_the_groups_stand_in_another_order(tmp_path: Path) -> None:
    model = Matrices()

    def parts(*, is_reordered: bool, rates: tuple[float, float]) -> State:
        optimizer = _two_groups(model, is_reordered=is_reordered)
        return {"model": model, "o": optimizer, "s": lr_scheduler.LambdaLR(optimizer, [Decay(rate) for rate in rates])}

    there, here = parts(is_reordered=False, rates=(0.5, 0.9)), parts(is_reordered=True, rates=(0.1, 0.1))
    cloudckpt.save(there, tmp_path / "c")
    cloudckpt.load(here, tmp_path / "c")
    assert [each.rate for each in here["s"].lr_lambdas] == [0.9, 0.5]
    assert _rates(here["o"], here["s"], 3) == _rates(there["o"], there["s"], 3)


class Own(lr_scheduler.LRScheduler):
    """A scheduler of the user's own."""

    def get_lr(self) -> list[float]:
        return [rate * 0.5 for rate in self.base_lrs]


@pytest.mark.parametrize("strict", [True, False])
def test_a_scheduler_that_nobody_can_read_is_refused_beside_groups_in_another_order(
    tmp_path: Path, strict: bool
) -> None:
    model = Matrices()
    there, here = (_two_groups(model, is_reordered=is_reordered) for is_reordered in (False, True))
    cloudckpt.save({"model": model, "o": there, "own": Own(there)}, tmp_path / "c")
    cloudckpt.load({"model": model, "o": there, "own": Own(there)}, tmp_path / "c")
    with pytest.raises(StateMismatchError, match="own may keep something for each group of o, whose groups stand in a"):
        cloudckpt.load({"model": model, "o": here, "own": Own(here)}, tmp_path / "c", strict=strict)


class Warm:
    """Keeps a rate for each group of an optimizer that it holds as `hold` says."""

    def __init__(self, optimizer: Optimizer, hold: Callable[[Optimizer], object]) -> None:
        self.mine = hold(optimizer)
        self.base = [group["lr"] for group in optimizer.param_groups]

    def state_dict(self) -> State:
        return {"base": self.base}

    def load_state_dict(self, state_dict: State) -> None:
        self.base = state_dict["base"]


class Slots(Warm):
    __slots__ = ("opt",)

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, lambda _: None)
        self.opt = optimizer


FOREIGN: dict[str, Callable[[Optimizer], object]] = {
    **{f"in {name}": lambda optimizer, hold=hold: Warm(optimizer, hold) for name, hold in HOLD.items()},
    "in a slot": Slots,
    "with another of its kind": lambda optimizer: Warm(optimizer, lambda it: Warm(it, lambda it: it)),
    "with one of torch": lambda optimizer: Warm(optimizer, lambda it: lr_scheduler.StepLR(it, 1)),
    "in what each rank keeps": lambda optimizer: cloudckpt.PerRank(Warm(optimizer, lambda it: it)),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_whatever_holds_an_optimizer_is_refused_beside_groups_in_another_order(
    tmp_path: Path, make: Callable[[Optimizer], object]
) -> None:
    model = Matrices()
    there, here = (_two_groups(model, is_reordered=is_reordered) for is_reordered in (False, True))
    cloudckpt.save({"model": model, "o": there, "own": make(there)}, tmp_path / "c")
    cloudckpt.load({"model": model, "o": there, "own": make(there)}, tmp_path / "c")
    with pytest.raises(StateMismatchError, match="own may keep something for each group of o, whose groups stand in a"):
        cloudckpt.load({"model": model, "o": here, "own": make(here)}, tmp_path / "c")


def test_an_object_that_holds_another_optimizer_is_restored_beside_groups_in_another_order(tmp_path: Path) -> None:
    model, other = Matrices(), Matrices()
    there, here = (_two_groups(model, is_reordered=is_reordered) for is_reordered in (False, True))
    own = Warm(_two_groups(other, is_reordered=False), lambda it: it)
    cloudckpt.save({"model": model, "o": there, "own": own}, tmp_path / "c")
    own.base = []
    cloudckpt.load({"model": model, "o": here, "own": own}, tmp_path / "c")
    assert own.base == [0.2, 0.1]


@pytest.mark.parametrize("function", [Decay(0.5), lambda epoch: 0.5**epoch], ids=["object", "function"])
@pytest.mark.parametrize("make", [lr_scheduler.LambdaLR, lr_scheduler.MultiplicativeLR])
def test_a_group_that_was_not_saved_keeps_its_function(tmp_path: Path, make: Any, function: Any) -> None:
    model = Matrices()
    there = torch.optim.SGD([model.one.weight], lr=0.2)
    cloudckpt.save({"model": model, "o": there, "s": make(there, Decay(0.9))}, tmp_path / "c")
    here = torch.optim.SGD([{"params": [model.two.weight], "lr": 0.1}, {"params": [model.one.weight], "lr": 0.1}])
    scheduler = make(here, [function, Decay(0.1)])
    cloudckpt.load({"model": model, "o": here, "s": scheduler}, tmp_path / "c", strict=False)
    assert scheduler.lr_lambdas[0] is function
    assert scheduler.lr_lambdas[0](2) == 0.25
    assert scheduler.lr_lambdas[1].rate == 0.9
    assert scheduler.base_lrs == [0.1, 0.2]


# -- many --------------------------------------------------------------------------------------------------------


def test_modules_are_looked_through_once_for_all_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(50)))
    state: State = {"model": model, "o": [torch.optim.SGD([each], lr=0.1) for each in model.parameters()]}
    walked = []
    modules = nn.Module.named_modules

    def named_modules(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        walked.append(self)
        return modules(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    assert len(bind(state)) == 101
    assert sum(each is model for each in walked) < 5


def test_matching_groups_looks_at_each_name_a_few_times() -> None:
    looks = 0

    class Counted(str):
        __slots__ = ()

        def __hash__(self) -> int:
            nonlocal looks
            looks += 1
            return super().__hash__()

    groups = [[Counted(f"p{place}")] for place in range(1000)]
    fit = match_groups(groups, groups[::-1])
    assert fit.sources == list(range(999, -1, -1))
    assert looks < 10 * len(groups)


def test_a_container_that_is_held_many_times_is_looked_at_once() -> None:
    weight = nn.Parameter(torch.ones(1))
    held: object = [weight]
    for _ in range(60):
        held = [held, held]
    assert Beside({"held": held, "o": torch.optim.SGD([weight], lr=0.1)}, PlainModules()).names_of(weight) == [
        "held" + ".0" * 61
    ]


# -- a state_dict of its own kind ---------------------------------------------------------------------------


class Flat(Optimizer):
    """Several optimizers as one, whose state_dict has neither groups nor numbers, as torchtitan's."""

    def __init__(self, model: nn.Module, order: list[str], lr: float) -> None:
        named = dict(model.named_parameters())
        self.parts = {name: torch.optim.Adam([named[name]], lr=lr) for name in order}
        super().__init__([named[name] for name in order], {})

    def step(self, closure: Any = None) -> None:
        for part in self.parts.values():
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, part in self.parts.items():
            own = part.state_dict()
            flat |= {f"state.{name}.{key}": value for key, value in own["state"].get(0, {}).items()}
            options = {key: value for key, value in own["param_groups"][0].items() if key != "params"}
            flat |= {f"param_groups.{name}.{key}": value for key, value in options.items()}
        return flat

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            of = {
                top: {
                    key.rpartition(".")[2]: value
                    for key, value in state_dict.items()
                    if key.startswith(f"{top}.{name}.")
                }
                for top in ("state", "param_groups")
            }
            part.load_state_dict({"state": {0: of["state"]}, "param_groups": [{**of["param_groups"], "params": [0]}]})


def _flat_state(seed: int, order: list[str], *, with_model: bool = True) -> tuple[dict[str, Any], nn.Module, Flat]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = Flat(model, order, lr=0.1 * seed)
    return {"optimizer": optimizer} | ({"model": model} if with_model else {}), model, optimizer


def _steps(model: nn.Module, optimizer: Optimizer, count: int) -> None:
    for step in range(count):
        torch.manual_seed(step)
        model.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("with_model", [True, False])
def test_a_flat_state_dict_by_names_is_handed_over_as_it_is_whatever_the_order(
    tmp_path: Path, with_model: bool
) -> None:
    state, model, optimizer = _flat_state(1, ["weight", "bias"])
    _steps(model, optimizer, 2)
    cloudckpt.save(state, tmp_path / "c", progress="off")
    twin_state, twin, other = _flat_state(2, ["bias", "weight"], with_model=with_model)
    cloudckpt.load(twin_state, tmp_path / "c", strict=with_model, progress="off")
    twin.load_state_dict(model.state_dict())
    _steps(model, optimizer, 2)
    _steps(twin, other, 2)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_flat_state_dict_of_other_parameters_is_refused_by_their_names(tmp_path: Path) -> None:
    cloudckpt.save({"optimizer": _flat_state(1, ["weight"])[2]}, tmp_path / "c", progress="off")
    other = _flat_state(2, ["bias"])[2]
    with pytest.raises(
        StateMismatchError,
        match=r"not in the checkpoint: optimizer\.bias; in the checkpoint and not in the state: optimizer\.weight",
    ):
        cloudckpt.load({"optimizer": other}, tmp_path / "c", progress="off")
    assert other.parts["bias"].param_groups[0]["lr"] == 0.2
