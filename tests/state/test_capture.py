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
from cloudckpt import OptionsError, StateMismatchError, UnsupportedValueError
from tests.effort import diagonal
from tests.state.nets import CUT, SCHEDULERS, Matrices, Net, State, bits, state_of, train

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


def _flattened(model: Net) -> nn.Module:
    # PyTorch gives no state of a unit that has parameters with and without gradients.
    for name in ("unused", "frozen"):
        part = FullyShardedDataParallel(model.get_submodule(name), use_orig_params=True, device_id=torch.device("cpu"))
        setattr(model, name, part)
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def _compiled_in_place(model: Net) -> nn.Module:
    model.compile(backend="eager")
    return model


def _compiled_part(model: Net) -> nn.Module:
    model.first = checkpoint_wrapper(torch.compile(model.first, backend="eager"))  # type: ignore[arg-type]
    return model


WRAPPERS: dict[str, Callable[[Net], nn.Module]] = {
    "plain": lambda model: model,
    "DDP": DistributedDataParallel,
    "DDP inside": _half_wrapped,
    "compile": torch.compile,  # type: ignore[dict-item]
    "compile in place": _compiled_in_place,
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model)),  # type: ignore[return-value]
    "activation checkpointing": _checkpointed,
    "checkpointed compile": _compiled_part,
    "FSDP1": _flattened,
    "FSDP2": fully_shard,
}


# By default each with the next one, and with none; all with all in the long run.
PAIRS = [
    pytest.param(
        WRAPPERS[there],
        WRAPPERS[here],
        id=f"{there}-{here}",
        marks=[] if (second - first) % len(WRAPPERS) == 1 or 0 in (first, second) else [pytest.mark.slow],
    )
    for first, there in enumerate(WRAPPERS)
    for second, here in enumerate(WRAPPERS)
]


@pytest.mark.usefixtures("group")
# torch warns of itself when it is asked to compile.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("there", "here"), PAIRS)
def test_what_was_saved_in_one_wrapper_is_restored_in_another(
    tmp_path: Path, there: Callable[[Net], nn.Module], here: Callable[[Net], nn.Module]
) -> None:
    def make(wrap: Callable[[Net], nn.Module]) -> tuple[Net, nn.Module, Optimizer]:
        model = Net()
        wrapped = wrap(model)
        return model, wrapped, torch.optim.AdamW(wrapped.parameters(), lr=0.02)

    model, wrapped, optimizer = make(there)
    # Others are left out: compiling takes seconds.
    train(wrapped if isinstance(wrapped, FullyShardedDataParallel) else model, optimizer, begin=0)
    cloudckpt.save({"model": wrapped, "optimizer": optimizer}, tmp_path / "c")
    _, other, fresh = make(here)

    cloudckpt.load({"model": other, "optimizer": fresh}, tmp_path / "c")

    cloudckpt.save({"model": other, "optimizer": fresh}, tmp_path / "again")
    read = cloudckpt.read(tmp_path / "c")
    assert bits(cloudckpt.read(tmp_path / "again")) == bits(read)
    assert set(read["model"]) == set(Net().state_dict())  # type: ignore[call-overload]
    assert all(read["optimizer"]["state"][name] for name in ("model.first.weight", "model.last.bias"))  # type: ignore[index]


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


@diagonal(
    "make, names",
    [pytest.param(make, id=name) for name, make in SCHEDULERS.items()],
    [("optimizer", "scheduler"), ("scheduler", "optimizer")],
)
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
