"""A save between two optimizer steps keeps the gradients exactly, or refuses; and what else a step is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import cloudckpt
from cloudckpt import CheckpointManager, Options, OptionsError, SaveFailedError, StateMismatchError
from cloudckpt.state.accumulation import AccumulationWindow
from tests.ranks.processes import run

CALM = Options(progress_timeout_s=60)


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


def _backward(model: nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(1000 + number)
    model(torch.randn(4, 6, generator=generator)).square().sum().backward()


def _micro_batches(
    model: nn.Module, optimizer: torch.optim.Optimizer, window: AccumulationWindow, numbers: Sequence[int]
) -> None:
    for number in numbers:
        _backward(model, number)
        if window.advance():
            optimizer.step()
            optimizer.zero_grad()


def _kept(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all parameters and gradients."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().clone()
        if parameter.grad is not None:
            found[f"{name}.grad"] = parameter.grad.clone()
    return found


def _assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


# -- the window itself --------------------------------------------------------------------------------------


def test_every_window_ends_after_its_steps() -> None:
    window = AccumulationWindow(_model(), 3)
    assert [(window.advance(), window.position) for _ in range(7)] == [
        (False, 1),
        (False, 2),
        (True, 0),
        (False, 1),
        (False, 2),
        (True, 0),
        (False, 1),
    ]


@pytest.mark.parametrize(("steps", "on_save"), [(0, "keep"), (4, "forget")])
def test_a_window_that_cannot_be_is_refused(steps: int, on_save: Any) -> None:
    with pytest.raises(OptionsError, match="give 1 or more"):
        AccumulationWindow(_model(), steps, on_save=on_save)


def test_a_save_in_the_middle_is_refused_with_the_position_and_nothing_is_written(tmp_path: Path) -> None:
    model = _model()
    window = AccumulationWindow(model, steps=4)
    _micro_batches(model, SGD(model.parameters(), lr=0.1), window, range(3))
    with pytest.raises(OptionsError, match="3 of 4 micro-batches are accumulated"):
        cloudckpt.save({"model": model, "window": window}, tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("on_save", ["refuse", "keep"])
def test_a_save_where_a_window_begins_holds_no_gradients_and_its_restore_clears_them(
    tmp_path: Path, on_save: Literal["refuse", "keep"]
) -> None:
    model = _model()
    window = AccumulationWindow(model, 2, on_save=on_save)
    optimizer = SGD(model.parameters(), lr=0.1)
    _micro_batches(model, optimizer, window, range(2))
    checkpoint = cloudckpt.save({"model": model, "window": window}, tmp_path / "c")
    assert cloudckpt.read(checkpoint.url, "window") == {"window": {"position": 0, "steps": 2}}
    _micro_batches(model, optimizer, window, [2])
    cloudckpt.load({"model": model, "window": window}, checkpoint.url)
    assert [parameter.grad for parameter in model.parameters()] == [None] * 4
    assert window.position == 0


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_kept_gradients_come_back_exactly_and_the_run_goes_on_as_if_never_interrupted(
    tmp_path: Path, stop: int
) -> None:
    model = _model()
    window, optimizer = AccumulationWindow(model, 4, on_save="keep"), AdamW(model.parameters())
    state: dict[str, object] = {"model": model, "optimizer": optimizer, "window": window}
    _micro_batches(model, optimizer, window, range(stop))
    checkpoint = cloudckpt.save(state, tmp_path / "c")
    at_save = _kept(model)
    _micro_batches(model, optimizer, window, range(stop, 11))
    wanted = _kept(model)

    other = _model(seed=5)
    other_window, other_optimizer = AccumulationWindow(other, 4, on_save="keep"), AdamW(other.parameters())
    _micro_batches(other, other_optimizer, other_window, range(50, 52))  # stale gradients, another position
    cloudckpt.load({"model": other, "optimizer": other_optimizer, "window": other_window}, checkpoint.url)
    _assert_same(_kept(other), at_save)
    assert other_window.position == stop % 4
    _micro_batches(other, other_optimizer, other_window, range(stop, 11))
    _assert_same(_kept(other), wanted)


def test_a_parameter_without_a_gradient_has_none_after_a_restore(tmp_path: Path) -> None:
    model = _model()
    window = AccumulationWindow(model, 2, on_save="keep")
    _micro_batches(model, SGD(model.parameters(), lr=0.1), window, [0])
    model[0].bias.grad = None
    wanted = _kept(model)
    checkpoint = cloudckpt.save({"model": model, "window": window}, tmp_path / "c")
    _backward(model, 1)
    cloudckpt.load({"model": model, "window": window}, checkpoint.url)
    _assert_same(_kept(model), wanted)
    assert model[0].bias.grad is None


def test_parameters_without_a_model_are_known_by_their_place(tmp_path: Path) -> None:
    parameters = [torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
    window = AccumulationWindow(parameters, 2, on_save="keep")
    (parameters[0].sum() * 3).backward()
    window.advance()
    checkpoint = cloudckpt.save({"window": window}, tmp_path / "c")
    parameters[0].grad = None
    parameters[1].grad = torch.zeros(2, 2)
    cloudckpt.load({"window": window}, checkpoint.url)
    assert torch.equal(parameters[0].grad, torch.full((3,), 3.0))  # type: ignore[arg-type]
    assert parameters[1].grad is None


def test_a_middle_without_any_gradient_is_not_kept_as_if_it_were_whole(tmp_path: Path) -> None:
    window = AccumulationWindow(_model(), 4, on_save="keep")
    window.advance()
    with pytest.raises(OptionsError, match=r"1 of 4 .* not all of it is in \.grad"):
        cloudckpt.save({"window": window}, tmp_path / "c")


def _saved_in_the_middle(path: Path) -> str:
    model = _model()
    window = AccumulationWindow(model, 4, on_save="keep")
    _micro_batches(model, SGD(model.parameters(), lr=0.1), window, range(3))
    return cloudckpt.save({"window": window}, path).url


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AccumulationWindow(_model(), 8), r"after 3 of 4 micro-batches and has windows of 8 here"),
        (lambda: AccumulationWindow(_model()[0], 4), r"window\.gradients\.0\.weight belongs to no parameter"),
        (lambda: AccumulationWindow(nn.Sequential(nn.Linear(6, 9)), 4), r"0\.weight belongs to no parameter"),
    ],
)
def test_gradients_of_another_window_or_model_are_refused_before_anything_is_changed(
    tmp_path: Path, make: Callable[[], AccumulationWindow], said: str
) -> None:
    url = _saved_in_the_middle(tmp_path / "c")
    window = make()
    window.advance()
    with pytest.raises(StateMismatchError, match=said):
        cloudckpt.load({"window": window}, url)
    assert window.position == 1


def test_a_state_dict_of_its_own_is_refused_in_the_same_way() -> None:
    window = AccumulationWindow(_model(), 4)
    for state, said in (({"position": 4, "steps": 4}, "no state of"), ({"position": 1, "steps": 2}, "after 1 of 2")):
        with pytest.raises(StateMismatchError, match=said):
            window.load_state_dict(dict(state))
    with pytest.raises(StateMismatchError, match="a gradient of x, unknown here"):
        window.load_state_dict({"position": 1, "steps": 4, "gradients": {"x": torch.ones(1)}})


# -- several ranks ------------------------------------------------------------------------------------------


def _ddp_in_the_middle(url: str) -> bool:
    """Save under `no_sync`, where each rank's gradients are its own; return whether they come back."""
    rank = dist.get_rank()
    model = DistributedDataParallel(_model())
    window = AccumulationWindow(model, 4, on_save="keep")
    state: dict[str, object] = {"model": model, "window": window}
    with model.no_sync(), CheckpointManager(url, options=CALM) as manager:
        for number in range(2):
            _backward(model, 10 * rank + number)
            window.advance()
        wanted = _kept(model)
        manager.save(1, state)
        _backward(model, 77)
        window.advance()
        manager.restore(state)
    _assert_same(_kept(model), wanted)
    return window.position == 2


def _restore_ddp(url: str, strict: bool) -> tuple[str, int]:
    model = DistributedDataParallel(_model())
    window = AccumulationWindow(model, 4, on_save="keep")
    with CheckpointManager(url, options=CALM) as manager:
        try:
            manager.restore({"model": model, "window": window}, strict=strict)
        except StateMismatchError as exc:
            return str(exc), window.position
    return "", window.position


def test_gradients_that_are_not_reduced_yet_are_each_rank_s_own(tmp_path: Path) -> None:
    assert run(2, _ddp_in_the_middle, str(tmp_path)) == [True, True]
    for said, position in run(3, _restore_ddp, str(tmp_path), True):
        assert "window was saved by 2 ranks, each for itself, and here are 3 ranks" in said
        assert "from where a window begins" in said
        assert position == 0
    assert run(3, _restore_ddp, str(tmp_path), False) == [("", 0)] * 3


def _sharded(seed: int) -> nn.Sequential:
    model = _model(seed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _whole(model: nn.Module) -> dict[str, list[float]]:
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        found[name] = parameter.grad.full_tensor().flatten().tolist()
    return found


def _save_sharded(url: str) -> dict[str, list[float]]:
    model = _sharded(0)
    window = AccumulationWindow(model, 4, on_save="keep")
    for number in range(3):
        _backward(model, number)
        window.advance()
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(1, {"model": model, "window": window})
    return _whole(model)


def _restore_sharded(url: str) -> tuple[int, dict[str, list[float]]]:
    model = _sharded(9)
    window = AccumulationWindow(model, 4, on_save="keep")
    with CheckpointManager(url, options=CALM) as manager:
        manager.restore({"model": model, "window": window})
    return window.position, _whole(model)


def test_sharded_gradients_are_restored_by_another_number_of_ranks(tmp_path: Path) -> None:
    wanted = run(2, _save_sharded, str(tmp_path))[0]
    assert run(3, _restore_sharded, str(tmp_path)) == [(3, wanted)] * 3
    model = _model(9)
    window = AccumulationWindow(model, 4, on_save="keep")
    with CheckpointManager(tmp_path) as manager:
        manager.restore({"model": model, "window": window})
    found = {name: held.grad.flatten().tolist() for name, held in model.named_parameters() if held.grad is not None}
    assert (window.position, found) == (3, wanted)


def _save_hidden(url: str) -> str:
    model = _sharded(0)
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    window = AccumulationWindow(model, 4, on_save="keep")
    _backward(model, 0)
    window.advance()
    with CheckpointManager(url, options=CALM) as manager, pytest.raises(OptionsError) as caught:
        manager.save(1, {"window": window})
    return str(caught.value)


def test_gradients_that_a_sharded_module_holds_back_are_not_lost_without_a_word(tmp_path: Path) -> None:
    for said in run(2, _save_hidden, str(tmp_path)):
        assert "set_requires_gradient_sync" in said


def _save_out_of_step(url: str) -> str:
    model = _model()
    window = AccumulationWindow(model, 4, on_save="keep")
    for number in range(1 + dist.get_rank()):
        _backward(model, number)
        window.advance()
    with CheckpointManager(url, options=CALM) as manager, pytest.raises(SaveFailedError) as caught:
        manager.save(1, {"window": window})
    return str(caught.value)


def test_ranks_at_other_places_of_a_window_are_refused(tmp_path: Path) -> None:
    for said in run(2, _save_out_of_step, str(tmp_path)):
        assert "'window' differs between rank 0 and rank 1" in said


# -- what else a step is made of ----------------------------------------------------------------------------


class Ema:
    """An average of one's own."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: held.detach().clone() for name, held in model.named_parameters()}
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        self.updates += 1
        for name, held in model.named_parameters():
            self.shadow[name].lerp_(held.detach(), min(0.1, 1 / self.updates))

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.updates = dict(state["shadow"]), state["updates"]


class Run:
    """A run with a scaler, a schedule and two averages."""

    def __init__(self, seed: int, schedule: int) -> None:
        self.model = _model(seed)
        self.optimizer = AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = _scheduler(schedule, self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.ema = Ema(self.model)

    def state(self) -> dict[str, object]:
        return dict(vars(self))

    def step(self, number: int) -> None:
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(number)
        loss = self.model(torch.randn(4, 6, generator=generator)).square().mean()
        scaled = self.scaler.scale(loss)
        (scaled * float("inf") if number == 4 else scaled).backward()  # an overflow: no step, a smaller scale
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.average.update_parameters(self.model)
        self.ema.update(self.model)

    def sight(self) -> list[Any]:
        """Return all numbers that count."""
        return [
            _lists(self.model.state_dict()),
            _lists(self.average.state_dict()),
            _lists(self.ema.shadow),
            self.ema.updates,
            self.scheduler.get_last_lr(),
            self.scheduler.last_epoch,
            self.scaler.state_dict(),
        ]


def _scheduler(kind: int, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    if kind == 0:
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    if kind == 1:
        parts = [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=40)


def _lists(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("stop", [1, 5])
def test_scaler_schedule_and_averages_go_on_exactly(tmp_path: Path, schedule: int, stop: int) -> None:
    first = Run(0, schedule)
    for number in range(stop):
        first.step(number)
    checkpoint = cloudckpt.save(first.state(), tmp_path / "c")
    at_save = copy.deepcopy(first.sight())
    for number in range(stop, 9):
        first.step(number)

    second = Run(1, schedule)
    second.step(20)
    cloudckpt.load(second.state(), checkpoint.url)
    assert second.sight() == at_save
    for number in range(stop, 9):
        second.step(number)
    assert second.sight() == first.sight()
    assert second.scaler.get_scale() != 256.0
