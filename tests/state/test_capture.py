"""Whatever a training program holds comes back so that the run goes on bit for bit, or nothing of it is touched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer, lr_scheduler

import cloudckpt
from cloudckpt import Options, OptionsError, StateMismatchError, UnsupportedValueError
from cloudckpt.options import KIB

CUT = Options(shard_bytes=256, block_bytes=64, span_bytes=128, memory_budget_bytes=8 * KIB, concurrency=3)
State = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, on a busy machine a hundred times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Buffers, a normalization, a frozen and an unused parameter."""

    def __init__(self, *, is_reordered: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        parts: list[tuple[str, nn.Module]] = [
            ("first", nn.Linear(6, 8, dtype=dtype)),
            ("norm", nn.BatchNorm1d(8, dtype=dtype)),
            ("last", nn.Linear(8, 3, dtype=dtype)),
            ("frozen", nn.Linear(3, 3, dtype=dtype)),
            ("unused", nn.Linear(2, 2, dtype=dtype)),
        ]
        for name, part in reversed(parts) if is_reordered else parts:
            self.add_module(name, part)
        self.get_submodule("frozen").requires_grad_(requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        hidden: torch.Tensor = self.frozen(self.last(torch.tanh(self.norm(self.first(x)))))  # type: ignore[operator]
        return hidden


class Matrices(nn.Module):
    """Two-dimensional parameters only."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.one = nn.Linear(6, 8, bias=False, dtype=dtype)
        self.two = nn.Linear(8, 3, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.two(torch.tanh(self.one(x)))
        return result


def train(model: nn.Module, optimizer: Optimizer, *, begin: int, steps: int = 3) -> list[float]:
    """Take steps on data that depends on the step alone; return the losses."""
    losses = []
    dtype = next(model.parameters()).dtype
    for step in range(begin, begin + steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(dtype)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure)  # type: ignore[arg-type]
        losses.append(loss.item())  # type: ignore[attr-defined]
    return losses


def bits(value: object) -> object:
    """Return nested state with every tensor as dtype and exact bytes."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        dense = value.detach().cpu().contiguous()
        return str(dense.dtype), tuple(dense.shape), dense.reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: bits(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [bits(child) for child in value]
    return value


def state_of(model: nn.Module, optimizer: Optimizer) -> object:
    return bits([dict(model.state_dict()), optimizer.state_dict()])


def check_goes_on(url: Path, make: Callable[[], tuple[nn.Module, Optimizer]], options: Options | None = None) -> None:
    """Train, save, train on; restore into new objects and train on: the same bits."""
    torch.manual_seed(1)
    model, optimizer = make()
    train(model, optimizer, begin=0)
    cloudckpt.save({"model": model, "optimizer": optimizer}, url, options=options)
    at_save = state_of(model, optimizer)
    losses = train(model, optimizer, begin=3)

    torch.manual_seed(2)
    again, fresh = make()
    memory = [parameter.data_ptr() for parameter in again.parameters()]
    cloudckpt.load({"model": again, "optimizer": fresh}, url, options=options)

    assert state_of(again, fresh) == at_save
    assert [parameter.data_ptr() for parameter in again.parameters()] == memory
    assert train(again, fresh, begin=3) == losses
    assert state_of(again, fresh) == state_of(model, optimizer)


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

    assert caught.value.missing == ("optimizer.last.weight",)
    assert set(caught.value.unexpected) == {"optimizer.first.bias", "optimizer.last.bias"}
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


# -- modules -----------------------------------------------------------------------------------------------------


def test_a_module_is_restored_in_place_with_its_buffers(tmp_path: Path) -> None:
    model = Net()
    model(torch.randn(5, 6))
    model.get_buffer("cache").fill_(1.0)
    cloudckpt.save({"model": model}, tmp_path / "c")
    again = Net()
    memory = {name: tensor.data_ptr() for name, tensor in again.state_dict().items()}

    cloudckpt.load({"model": again}, tmp_path / "c")

    assert bits(dict(again.state_dict())) == bits(dict(model.state_dict()))
    assert {name: tensor.data_ptr() for name, tensor in again.state_dict().items()} == memory
    assert again.get_buffer("seen").item() == 1
    assert torch.equal(again.get_buffer("cache"), torch.zeros(4)), "not persistent, so it is nobody's to restore"


class Tied(nn.Module):
    """One parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_come_back_and_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    model.head(model.embed(torch.arange(7))).sum().backward()
    optimizer.step()
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    again = Tied()
    fresh = torch.optim.Adam(again.parameters())

    cloudckpt.load({"model": again, "optimizer": fresh}, tmp_path / "c")

    assert again.head.weight is again.embed.weight
    assert state_of(again, fresh) == state_of(model, optimizer)


class Extra(nn.Module):
    """State beside the tensors."""

    def __init__(self, extra: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.extra = extra

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [{"count": 3, "pair": (1, 2)}, torch.arange(3), [torch.ones(2), "x"], 5], ids=repr)
def test_extra_state_of_any_kind_is_restored(tmp_path: Path, extra: object) -> None:
    model = nn.Sequential(Extra(extra), nn.Linear(2, 2))
    cloudckpt.save({"model": model}, tmp_path / "c")
    blank = torch.zeros(3, dtype=torch.int64) if isinstance(extra, torch.Tensor) else copy.deepcopy(extra)
    again = nn.Sequential(Extra(blank), nn.Linear(2, 2))

    cloudckpt.load({"model": again}, tmp_path / "c")

    assert bits(again[0].extra) == bits(extra)
    assert bits(again[1].weight) == bits(model[1].weight)


def test_a_tensor_where_a_value_was_saved_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    cloudckpt.save({"box": {"a": 5, "weight": torch.zeros(3)}}, tmp_path / "c")
    again = {"a": torch.ones(1), "weight": torch.full((3,), 9.0)}
    for strict in (True, False):
        with pytest.raises(StateMismatchError, match=r"box\.a is a tensor here and a value there"):
            cloudckpt.load({"box": again}, tmp_path / "c", strict=strict)
    assert again["weight"].tolist() == [9.0] * 3


@pytest.mark.parametrize("live", [0, torch.ones(1), {"deep": [torch.ones(2)]}, []], ids=repr)
@pytest.mark.parametrize("saved", [5, torch.zeros(2), {"deep": [torch.ones(3), "x"]}, {}], ids=repr)
def test_extra_state_comes_back_whatever_the_module_has_there(tmp_path: Path, saved: object, live: object) -> None:
    cloudckpt.save({"model": Extra(saved)}, tmp_path / "c")
    again = Extra(live)

    cloudckpt.load({"model": again}, tmp_path / "c")

    assert repr(again.extra) == repr(saved)


class Noticing(nn.Module):
    """Derives something from its weight when a state is loaded."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.total = 0.0
        if how == "hook":
            self.register_load_state_dict_post_hook(lambda *_: self.derive())

    def derive(self) -> None:
        self.total = float(self.weight.sum())


class Overriding(Noticing):
    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.derive()


@pytest.mark.parametrize("make", [lambda: Noticing("hook"), lambda: Overriding("override")], ids=["hook", "override"])
def test_a_module_that_acts_when_a_state_is_loaded_is_told(tmp_path: Path, make: Callable[[], Noticing]) -> None:
    model = make()
    model.weight.data.fill_(2.0)
    cloudckpt.save({"model": nn.Sequential(model)}, tmp_path / "c")
    again = make()
    cloudckpt.load({"model": nn.Sequential(again)}, tmp_path / "c")
    assert again.total == 6.0


class Renaming(nn.Module):
    """Saves its weight transposed, under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self._register_state_dict_hook(Renaming._shown)
        self.register_load_state_dict_pre_hook(Renaming._taken)

    @staticmethod
    def _shown(module: nn.Module, state: State, prefix: str, _: object) -> None:
        state[prefix + "flipped"] = state.pop(prefix + "weight").t().clone()

    @staticmethod
    def _taken(module: nn.Module, state: State, prefix: str, *_: object) -> None:
        state[prefix + "weight"] = state.pop(prefix + "flipped").t()


def test_a_module_whose_hooks_transform_its_state_is_restored_through_them(tmp_path: Path) -> None:
    model = Renaming()
    model.weight.data = torch.arange(6.0).reshape(2, 3)
    cloudckpt.save({"model": model}, tmp_path / "c")
    again = Renaming()
    cloudckpt.load({"model": again}, tmp_path / "c")
    assert bits(again.weight) == bits(model.weight)
    assert set(cloudckpt.read(tmp_path / "c")["model"]) == {"flipped"}  # type: ignore[call-overload]


def test_modules_without_state_are_fine(tmp_path: Path) -> None:
    state: State = {"loss": nn.MSELoss(), "model": nn.Linear(2, 2), "act": nn.Sequential(nn.ReLU(), nn.Dropout())}
    cloudckpt.save(state, tmp_path / "c")
    cloudckpt.load(state, tmp_path / "c")
    assert set(cloudckpt.read(tmp_path / "c")) == {"loss", "model", "act"}


def test_a_lazy_module_gets_the_shape_that_was_saved_and_cannot_be_saved_before(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedValueError, match="run a batch through its lazy module first"):
        cloudckpt.save({"model": nn.LazyLinear(3)}, tmp_path / "c")
    model, lazy = nn.Linear(2, 3), nn.LazyLinear(3)
    cloudckpt.save({"model": model}, tmp_path / "c")
    cloudckpt.load({"model": lazy}, tmp_path / "c")
    assert torch.equal(lazy.weight, model.weight)


def test_every_difference_of_a_module_is_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    saved = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 2), "old": nn.Linear(1, 1)})
    cloudckpt.save({"model": saved, "epoch": 3}, tmp_path / "c")
    model = nn.ModuleDict({"a": nn.Linear(2, 4), "b": nn.Linear(2, 2), "new": nn.Linear(1, 1)})
    before = bits(dict(model.state_dict()))
    state: State = {"model": model, "epoch": 0}

    with pytest.raises(StateMismatchError) as caught:
        cloudckpt.load(state, tmp_path / "c")

    assert set(caught.value.missing) == {"model.new.weight", "model.new.bias"}
    assert set(caught.value.unexpected) == {"model.old.weight", "model.old.bias"}
    assert caught.value.mismatched == {"model.a.weight": ((4, 2), (3, 2)), "model.a.bias": ((4,), (3,))}
    assert bits(dict(model.state_dict())) == before
    assert state["epoch"] == 0


def test_not_strict_restores_the_common_part_of_a_module(tmp_path: Path) -> None:
    saved = nn.ModuleDict({"b": nn.Linear(2, 2), "old": nn.Linear(1, 1)})
    cloudckpt.save({"model": saved, "gone": 1}, tmp_path / "c")
    model = nn.ModuleDict({"b": nn.Linear(2, 2), "new": nn.Linear(1, 1)})
    new = bits(dict(model["new"].state_dict()))

    cloudckpt.load({"model": model, "fresh": 2}, tmp_path / "c", strict=False)

    assert bits(dict(model["b"].state_dict())) == bits(dict(saved["b"].state_dict()))
    assert bits(dict(model["new"].state_dict())) == new


# -- wrappers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one rank, on loopback."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _half_wrapped(model: Net) -> nn.Module:
    model.first = DistributedDataParallel(model.first)  # type: ignore[arg-type]
    return model


def _checkpointed(model: Net) -> nn.Module:
    model.first = checkpoint_wrapper(model.first)  # type: ignore[arg-type]
    return model


WRAPPERS: dict[str, Callable[[Net], nn.Module]] = {
    "plain": lambda model: model,
    "DDP": DistributedDataParallel,
    "DDP inside": _half_wrapped,
    "compile": torch.compile,  # type: ignore[dict-item]
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model)),  # type: ignore[return-value]
    "activation checkpointing": _checkpointed,
    "FSDP2": fully_shard,
}


@pytest.mark.usefixtures("group")
# torch warns of itself when it is asked to compile.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("there", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("here", [WRAPPERS["plain"], WRAPPERS["DDP"], WRAPPERS["FSDP2"]], ids=["plain", "DDP", "FSDP2"])
def test_what_was_saved_in_one_wrapper_is_restored_in_another(
    tmp_path: Path, there: Callable[[Net], nn.Module], here: Callable[[Net], nn.Module]
) -> None:
    def make(wrap: Callable[[Net], nn.Module]) -> tuple[Net, nn.Module, Optimizer]:
        model = Net()
        wrapped = wrap(model)
        return model, wrapped, torch.optim.AdamW(wrapped.parameters(), lr=0.02)

    model, wrapped, optimizer = make(there)
    train(model, optimizer, begin=0)
    cloudckpt.save({"model": wrapped, "optimizer": optimizer}, tmp_path / "c")
    again, other, fresh = make(here)

    cloudckpt.load({"model": other, "optimizer": fresh}, tmp_path / "c")

    def state(module: nn.Module, own: Optimizer) -> object:
        return bits([list(module.parameters()), list(module.buffers()), [own.state[p] for p in module.parameters()]])

    assert state(again, fresh) == state(model, optimizer)
    assert set(cloudckpt.read(tmp_path / "c")["model"]) == set(Net().state_dict())  # type: ignore[call-overload]


@pytest.mark.usefixtures("group")
# torch warns of FSDP1 as a whole, and of what that calls.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_fsdp1_is_restored_with_its_optimizer(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Optimizer]:
        model = FullyShardedDataParallel(Matrices(), device_id=torch.device("cpu"))
        return model, torch.optim.Adam(model.parameters(), lr=0.02)

    model, optimizer = make()
    train(model, optimizer, begin=0)
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    losses = train(model, optimizer, begin=3)
    again, fresh = make()

    cloudckpt.load({"model": again, "optimizer": fresh}, tmp_path / "c")

    assert train(again, fresh, begin=3) == losses


# -- schedulers and others ---------------------------------------------------------------------------------------


def _warmed_up(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    warm = lr_scheduler.LinearLR(optimizer, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.ExponentialLR(optimizer, 0.9)], milestones=[4])


def _chained(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


class Decay:
    """A callable with state."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, epoch: int) -> float:
        return self.rate**epoch


SCHEDULERS: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler]] = {
    "ChainedScheduler": _chained,
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CyclicLR with a function": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, scale_fn=lambda x: 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR with an object": lambda o: lr_scheduler.LambdaLR(o, Decay(0.8)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=9),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5, 7]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=20),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=20, power=2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "SequentialLR": _warmed_up,
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
}


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    bases = {"LRScheduler", "_LRScheduler"}
    classes = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)
    }
    assert {name.split()[0] for name in SCHEDULERS} == classes - bases


def rates(optimizer: Optimizer, scheduler: lr_scheduler.LRScheduler, steps: int) -> list[list[float]]:
    found = []
    for _ in range(steps):
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
        found.append([float(group["lr"]) for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize("names", [("optimizer", "scheduler"), ("scheduler", "optimizer")], ids=" then ".join)
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_the_rates_go_on_with_every_scheduler(
    tmp_path: Path, make: Callable[[Optimizer], lr_scheduler.LRScheduler], names: tuple[str, str]
) -> None:
    def parts() -> State:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(
            [{"params": [model.weight], "lr": 0.2}, {"params": [model.bias]}], lr=0.1, momentum=0.9
        )
        found = {"optimizer": optimizer, "scheduler": make(optimizer)}
        return {"model": model} | {name: found[name] for name in names}

    state = parts()
    rates(state["optimizer"], state["scheduler"], 4)
    cloudckpt.save(state, tmp_path / "c")
    other = parts()

    cloudckpt.load(other, tmp_path / "c")

    assert bits(other["scheduler"].state_dict()) == bits(state["scheduler"].state_dict())
    assert rates(other["optimizer"], other["scheduler"], 8) == rates(state["optimizer"], state["scheduler"], 8)


def test_a_grad_scaler_goes_on(tmp_path: Path) -> None:
    def scaled() -> tuple[torch.amp.GradScaler, nn.Module, Optimizer]:
        model = nn.Linear(2, 2)
        return torch.amp.GradScaler(device="cpu", growth_interval=2), model, torch.optim.SGD(model.parameters(), lr=0.1)

    def step(scaler: torch.amp.GradScaler, model: nn.Module, optimizer: Optimizer, factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(model(torch.full((1, 2), factor)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    scaler, model, optimizer = scaled()
    for factor in (1.0, float("inf"), 1.0):
        step(scaler, model, optimizer, factor)
    cloudckpt.save({"scaler": scaler}, tmp_path / "c")
    other, model_2, optimizer_2 = scaled()
    cloudckpt.load({"scaler": other}, tmp_path / "c")

    assert other.state_dict() == scaler.state_dict()
    for _ in range(3):
        step(scaler, model, optimizer, 1.0)
        step(other, model_2, optimizer_2, 1.0)
    assert other.get_scale() == scaler.get_scale()


class Loader:
    """An object of the user's own, whose state has tensors and values."""

    def __init__(self, seed: int) -> None:
        self.place = seed
        self.order = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
        self.history: list[torch.Tensor] = []

    def state_dict(self) -> State:
        return {"place": self.place, "order": self.order, "history": list(self.history), "nested": {7: (1, None)}}

    def load_state_dict(self, state: State) -> None:
        assert state["nested"] == {7: (1, None)}
        self.place, self.order, self.history = state["place"], state["order"], state["history"]


def test_an_object_with_a_state_dict_takes_what_was_saved_whatever_its_own_shapes_are(tmp_path: Path) -> None:
    loader = Loader(1)
    loader.history = [torch.ones(2), torch.zeros(3, 3)]
    cloudckpt.save({"loader": loader}, tmp_path / "c", options=CUT)
    other = Loader(2)
    other.history = [torch.ones(4)]
    cloudckpt.load({"loader": other}, tmp_path / "c")
    assert bits(other.state_dict()) == bits(loader.state_dict())


# -- containers of objects ---------------------------------------------------------------------------------------


def _nested_state() -> State:
    generator, critic, loader = Matrices(), Matrices(), Loader(3)
    return {
        "nets": {"generator": generator, "critic": critic, "temperature": 0.5, "mean": torch.ones(2)},
        "optimizers": [torch.optim.Adam(generator.parameters()), torch.optim.SGD(critic.parameters(), lr=0.1)],
        "pair": (loader, torch.arange(3.0)),
        "by number": {1: nn.Linear(1, 1), (2, "x"): nn.Linear(1, 1)},
    }


def test_modules_optimizers_and_objects_inside_containers_are_restored_in_place(tmp_path: Path) -> None:
    state = _nested_state()
    train(state["nets"]["generator"], state["optimizers"][0], begin=0)
    state["nets"]["temperature"] = 0.75
    state["nets"]["mean"].fill_(3.0)
    state["pair"][0].place = 99
    cloudckpt.save(state, tmp_path / "c")
    other = _nested_state()
    nets, optimizers, mean, pair = other["nets"], other["optimizers"], other["nets"]["mean"], other["pair"]

    cloudckpt.load(other, tmp_path / "c")

    assert (other["nets"], other["optimizers"], other["pair"]) == (nets, optimizers, pair)
    for name in ("generator", "critic"):
        assert bits(dict(nets[name].state_dict())) == bits(dict(state["nets"][name].state_dict()))
    for mine, saved in zip(optimizers, state["optimizers"], strict=True):
        assert bits(mine.state_dict()) == bits(saved.state_dict())
    assert nets["temperature"] == 0.75
    assert nets["mean"] is mean
    assert bits(mean) == bits(torch.full((2,), 3.0))
    assert pair[0].place == 99
    assert bits(dict(other["by number"][2, "x"].state_dict())) == bits(dict(state["by number"][2, "x"].state_dict()))


def test_read_shows_containers_of_objects_as_they_stood(tmp_path: Path) -> None:
    cloudckpt.save(_nested_state(), tmp_path / "c")
    found: State = cloudckpt.read(tmp_path / "c")
    assert isinstance(found["optimizers"], list)
    assert isinstance(found["pair"], tuple)
    assert set(found["by number"]) == {1, (2, "x")}
    assert set(found["nets"]["generator"]) == {"one.weight", "two.weight"}


def test_differences_inside_containers_are_listed(tmp_path: Path) -> None:
    cloudckpt.save({"nets": {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}}, tmp_path / "c")
    with pytest.raises(StateMismatchError) as caught:
        cloudckpt.load({"nets": {"a": nn.Linear(1, 1), "c": nn.Linear(1, 1)}}, tmp_path / "c")
    assert caught.value.missing == ("nets.c",)
    assert set(caught.value.unexpected) == {"nets.b.weight", "nets.b.bias"}


def test_a_value_that_could_not_be_put_back_into_its_tuple_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"'pair\.1' stands in a tuple"):
        cloudckpt.save({"pair": (nn.Linear(1, 1), 3)}, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_two_objects_that_would_share_a_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"both named 'a\.b\.weight'"):
        cloudckpt.save({"a": {"b": nn.Linear(1, 1)}, "a.b": nn.Linear(1, 1)}, tmp_path / "c")


def test_a_container_that_holds_itself_is_refused(tmp_path: Path) -> None:
    loop: State = {"x": torch.ones(1)}
    loop["again"] = loop
    with pytest.raises(UnsupportedValueError, match="holds itself"):
        cloudckpt.save({"loop": loop}, tmp_path / "c")


def test_a_state_dict_passed_as_a_value_keeps_its_names(tmp_path: Path) -> None:
    model = Net()
    cloudckpt.save({"weights": model.state_dict()}, tmp_path / "c")
    mine: OrderedDict[str, torch.Tensor] = Net().state_dict()  # type: ignore[assignment]
    state: State = {"weights": mine}
    cloudckpt.load(state, tmp_path / "c")
    assert state["weights"] is mine
    assert bits(dict(mine)) == bits(dict(model.state_dict()))
