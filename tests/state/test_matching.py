"""What is restored is what was saved, in memory that nothing else fills; or one error names it, and nothing changed."""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import cloudckpt
from cloudckpt import RestoreFailedError, StateMismatchError
from tests.effort import diagonal

State = dict[str, Any]


def trip(path: Path, saved: State, live: State, **options: Any) -> cloudckpt.Checkpoint:
    """Save one state and load it into another one."""
    cloudckpt.save(saved, path / "c", progress="off")
    return cloudckpt.load(live, path / "c", progress="off", **options)


def line(value: float) -> nn.Linear:
    made = nn.Linear(1, 1, bias=False)
    made.weight.data.fill_(value)
    return made


class Two(nn.Module):
    """Two weights, which may be one."""

    def __init__(self, first: float, second: float, *, is_tied: bool = False) -> None:
        super().__init__()
        self.a, self.b = line(first), line(second)
        if is_tied:
            self.b.weight = self.a.weight


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_first", [True, False])
def test_a_copy_of_a_models_own_state_dict_gets_memory_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, is_first: bool
) -> None:
    model = line(0.0)
    best = dict(model.state_dict())
    live: State = {"best": best, "model": model} if is_first else {"model": model, "best": best}

    with caplog.at_level(logging.WARNING):
        trip(tmp_path, {"model": line(1.0), "best": {"weight": torch.tensor([[9.0]])}}, live)

    assert model.weight.item() == 1.0
    assert live["best"] is best
    assert best["weight"].item() == 9.0
    assert "best shares memory and gets memory of its own: best.weight with model.weight" in caplog.text


def test_views_of_a_model_in_a_value_get_memory_of_their_own(tmp_path: Path) -> None:
    saved, model = nn.Linear(4, 4), nn.Linear(4, 4)
    row = torch.arange(4.0)
    live: State = {"rows": [model.weight.data[1]], "model": model}

    trip(tmp_path, {"rows": [row], "model": saved}, live)

    assert torch.equal(model.weight, saved.weight)
    assert torch.equal(live["rows"][0], row)


def test_a_value_whose_elements_share_memory_gets_memory_of_its_own(tmp_path: Path) -> None:
    saved = torch.arange(6.0).reshape(3, 2)
    live: State = {"windows": torch.zeros(4).unfold(0, 2, 1), "wide": torch.zeros(1).expand(3)}

    trip(tmp_path, {"windows": saved, "wide": torch.arange(3.0)}, live)

    assert torch.equal(live["windows"], saved)
    assert torch.equal(live["wide"], torch.arange(3.0))


def test_a_tied_model_takes_equal_contents_and_refuses_different_ones_by_name(tmp_path: Path) -> None:
    tied = Two(0.0, 0.0, is_tied=True)
    trip(tmp_path / "tied", {"m": Two(3.0, 3.0, is_tied=True)}, {"m": tied})
    assert (tied.a.weight.item(), tied.b.weight is tied.a.weight) == (3.0, True)
    trip(tmp_path / "equal", {"m": Two(4.0, 4.0)}, {"m": tied})
    assert tied.a.weight.item() == 4.0

    for strict in (True, False):
        with pytest.raises(StateMismatchError, match=r"m\.[ab]\.weight and m\.[ab]\.weight share memory here"):
            trip(tmp_path / f"other{strict}", {"m": Two(5.0, 6.0)}, {"m": tied}, strict=strict)
    assert tied.a.weight.item() == 4.0


def test_names_that_are_one_parameter_come_back_in_any_order(tmp_path: Path) -> None:
    def tied(names: str) -> nn.ModuleDict:
        shared = line(0.0)
        return nn.ModuleDict(dict.fromkeys(names, shared))

    saved, live = tied("ab"), tied("ba")
    saved["a"].weight.data.fill_(7.0)  # type: ignore[union-attr, operator]
    trip(tmp_path, {"m": saved}, {"m": live})
    assert live["a"].weight.item() == 7.0  # type: ignore[union-attr, operator]


def test_a_tied_checkpoint_fills_a_model_that_is_not_tied(tmp_path: Path) -> None:
    live = Two(0.0, 0.0)
    trip(tmp_path, {"m": Two(3.0, 3.0, is_tied=True)}, {"m": live})
    assert (live.a.weight.item(), live.b.weight.item()) == (3.0, 3.0)


def test_overlapping_parts_of_a_module_take_contents_that_agree(tmp_path: Path) -> None:
    class Viewed(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), value))
            self.register_buffer("tail", self.weight.data[2:])

    live = Viewed(0.0)
    trip(tmp_path / "1", {"m": Viewed(2.0)}, {"m": live})
    assert live.weight.tolist() == [2.0] * 4

    other = Viewed(3.0)
    other.tail = torch.zeros(2)
    with pytest.raises(StateMismatchError, match=r"share memory here and differ in the checkpoint"):
        trip(tmp_path / "2", {"m": other}, {"m": live})
    assert live.weight.tolist() == [2.0] * 4


class Aliasing:
    """Shows the same tensor twice, and clears what it has before it copies."""

    def __init__(self, best: float, current: float) -> None:
        self.best, self.current = torch.full((2,), best), torch.full((2,), current)

    def state_dict(self) -> State:
        return {"best": self.best, "current": self.current}

    def load_state_dict(self, state: State) -> None:
        for name, value in self.state_dict().items():
            value.zero_()
            setattr(self, name, value.clone().copy_(state[name]))


@pytest.mark.parametrize("is_shared", [True, False])
def test_rates_that_groups_share_are_shared_again_and_others_are_not(tmp_path: Path, *, is_shared: bool) -> None:
    def two_groups(first: torch.Tensor, second: torch.Tensor, model: Two) -> torch.optim.Optimizer:
        groups = [{"params": [model.a.weight], "lr": first}, {"params": [model.b.weight], "lr": second}]
        return torch.optim.Adam(groups, foreach=False)

    model, again, rate, default = Two(1.0, 2.0), Two(3.0, 4.0), torch.tensor(0.5), torch.tensor(0.1)
    saved = two_groups(rate, rate if is_shared else torch.tensor(0.25), model)
    live = two_groups(default, default, again)

    trip(tmp_path, {"m": model, "o": saved}, {"m": again, "o": live})

    first, second = (group["lr"] for group in live.param_groups)
    assert (float(first), float(second)) == (0.5, 0.5 if is_shared else 0.25)
    assert (first is second) == is_shared


@pytest.mark.parametrize("is_first", [True, False])
def test_a_copy_of_what_loads_by_itself_gets_memory_of_its_own(tmp_path: Path, *, is_first: bool) -> None:
    module, other = Versioned(0.0), Aliasing(0.0, 0.0)
    live: State = {"copies": [module.weight.data, other.best], "module": module, "other": other}
    saved: State = {"copies": [torch.ones(2), torch.ones(2) * 2], "module": Versioned(3.0), "other": Aliasing(4.0, 5.0)}
    if is_first:
        live, saved = (dict(reversed(state.items())) for state in (live, saved))

    trip(tmp_path, saved, live)

    assert [copied.tolist() for copied in live["copies"]] == [[1.0, 1.0], [2.0, 2.0]]
    assert (module.weight.tolist(), other.best.tolist(), other.current.tolist()) == ([3.0] * 2, [4.0] * 2, [5.0] * 2)


class Wrapping:
    """Shows a module's own tensors, and copies into them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> State:
        return {"inner": dict(self.module.state_dict())}

    def load_state_dict(self, state: State) -> None:
        self.module.load_state_dict(state["inner"])


def test_an_object_and_a_module_that_are_one_memory_take_the_same_contents_only(tmp_path: Path) -> None:
    model, saved = line(0.0), line(3.0)
    trip(tmp_path / "1", {"model": saved, "app": Wrapping(saved)}, {"model": model, "app": Wrapping(model)})
    assert model.weight.item() == 3.0

    with pytest.raises(StateMismatchError, match=r"model\.weight and app\.inner\.weight share memory here and differ"):
        trip(tmp_path / "2", {"model": line(4.0), "app": Wrapping(line(5.0))}, {"model": model, "app": Wrapping(model)})
    assert model.weight.item() == 3.0


def test_an_object_is_handed_memory_of_its_own(tmp_path: Path) -> None:
    live = Aliasing(0.0, 0.0)
    live.current = live.best
    trip(tmp_path, {"o": Aliasing(1.0, 2.0)}, {"o": live})
    assert (live.best.tolist(), live.current.tolist()) == ([1.0] * 2, [2.0] * 2)


def test_an_object_is_handed_the_dtypes_that_were_saved(tmp_path: Path) -> None:
    class Holder:
        def __init__(self, value: torch.Tensor) -> None:
            self.value = value

        def state_dict(self) -> State:
            return {"value": self.value}

        def load_state_dict(self, state: State) -> None:
            self.value = state["value"]

    live = Holder(torch.tensor(0))
    trip(tmp_path, {"o": Holder(torch.tensor(0.73, dtype=torch.float64))}, {"o": live})
    assert live.value == torch.tensor(0.73, dtype=torch.float64)


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_in_a_container_of_tensors_are_compared(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    wrapped = {f"module.{name}": tensor for name, tensor in nn.Linear(2, 2).state_dict().items()}

    with pytest.raises(StateMismatchError) as caught:
        trip(tmp_path, {"model": wrapped, "step": 1}, {"model": model.state_dict(), "step": 0})

    assert set(caught.value.missing) == {"model.weight", "model.bias"}
    assert set(caught.value.unexpected) == {"model.module.weight", "model.module.bias"}
    assert torch.equal(model.weight, before)


def test_a_container_keeps_what_the_checkpoint_lacks_without_strict(tmp_path: Path) -> None:
    one, two = torch.zeros(2), torch.full((2,), 8.0)
    live: State = {"box": {"w1": one, "w2": two, "note": "here"}}

    found = trip(tmp_path, {"box": {"w1": torch.ones(2), "w3": torch.ones(3)}}, live, strict=False)

    assert live["box"]["w1"] is one
    assert one.tolist() == [1.0, 1.0]
    assert (live["box"]["w2"].tolist(), live["box"]["note"], "w3" in live["box"]) == ([8.0, 8.0], "here", False)
    assert found.fit is not None
    assert set(found.fit.missing) == {"box.w2", "box.note"}
    assert found.fit.unexpected == ("box.w3",)


@pytest.mark.parametrize("empty", [None, {}, []], ids=repr)
@pytest.mark.parametrize("is_deep", [False, True])
def test_an_empty_place_takes_what_was_saved(tmp_path: Path, empty: object, *, is_deep: bool) -> None:
    saved = {"buf": [torch.ones(2), {"n": 3}]}
    live: State = {"box": {"w": torch.zeros(1), "rest": empty}} if is_deep else {"box": empty}

    trip(tmp_path, {"box": {"w": torch.ones(1), "rest": saved} if is_deep else saved}, live)

    found = live["box"]["rest"] if is_deep else live["box"]
    assert repr(found) == repr(saved)


def test_whoever_holds_a_container_of_the_state_sees_what_was_restored(tmp_path: Path) -> None:
    shadow: State = {"w": torch.zeros(1), "n": 0}
    history: list[object] = [1]
    trip(
        tmp_path,
        {"ema": {"shadow": {"w": torch.ones(1), "n": 5}, "h": [1, 2]}},
        {"ema": {"shadow": shadow, "h": history}},
    )
    assert (shadow["w"].item(), shadow["n"], history) == (1.0, 5, [1, 2])


def test_nothing_in_common_is_an_error_without_strict_too(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(StateMismatchError, match="nothing of the checkpoint belongs to anything in the state"):
        trip(tmp_path, {"net": nn.Sequential(nn.Linear(1, 1)), "epoch": 5}, {"net": model, "epohc": 0}, strict=False)


def test_a_grown_tensor_takes_what_resize_makes_of_the_saved_one(tmp_path: Path) -> None:
    saved, live = nn.Embedding(3, 2), nn.Embedding(5, 2)
    tail = live.weight.data[3:].clone()
    with pytest.raises(StateMismatchError, match="pass resize=") as caught:
        trip(tmp_path / "1", {"m": saved}, {"m": live})
    assert caught.value.mismatched == {"m.weight": ((5, 2), (3, 2))}

    def grown(name: str, there: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        assert name == "m.weight"
        return torch.cat([there, here[3:]])

    trip(tmp_path / "2", {"m": saved}, {"m": live}, resize=grown)

    assert torch.equal(live.weight[:3], saved.weight)
    assert torch.equal(live.weight[3:], tail)
    with pytest.raises(StateMismatchError, match=r"resize returned torch\.float32 of \(3, 2\) for m\.weight"):
        trip(tmp_path / "3", {"m": saved}, {"m": live}, resize=lambda name, there, here: there)
    assert torch.equal(live.weight[3:], tail)


# -- what objects say --------------------------------------------------------------------------------------------------


class Refusing:
    error: Exception = KeyError("no")

    def __init__(self, value: int, *, is_willing: bool = True) -> None:
        self.value, self.is_willing = value, is_willing

    def state_dict(self) -> State:
        return {"value": self.value}

    def load_state_dict(self, state: State) -> None:
        if state["value"] == 99 or not self.is_willing:
            self.value = -1
            raise self.error
        self.value = state["value"]


@pytest.mark.parametrize("is_first", [True, False])
def test_an_object_that_refuses_leaves_everything_as_it_was(tmp_path: Path, *, is_first: bool) -> None:
    model, other, refusing = line(0.0), Refusing(1), Refusing(2)
    live: State = {"model": model, "other": other, "last": refusing, "n": 3}
    saved: State = {"model": line(5.0), "other": Refusing(6), "last": Refusing(99), "n": 8}
    if is_first:
        live, saved = (dict(reversed(state.items())) for state in (live, saved))

    with pytest.raises(
        StateMismatchError, match=r"last refuses the state that was saved: KeyError: 'no'; nothing was "
    ) as e:
        trip(tmp_path, saved, live)

    assert isinstance(e.value.__cause__, KeyError)
    assert (model.weight.item(), other.value, refusing.value, live["n"]) == (0.0, 1, 2, 3)


def test_an_object_whose_error_has_no_text_leaves_everything_as_it_was(tmp_path: Path) -> None:
    model, refusing = line(0.0), Refusing(2)
    refusing.error = type("MuteError", (Exception,), {"__str__": lambda _: 1 // 0})()
    with pytest.raises(StateMismatchError, match="MuteError, whose text fails with ZeroDivisionError; nothing was"):
        trip(tmp_path, {"model": line(5.0), "last": Refusing(99)}, {"model": model, "last": refusing})
    assert (model.weight.item(), refusing.value) == (0.0, 2)


def test_an_object_that_takes_no_state_back_is_named(tmp_path: Path) -> None:
    other, refusing = Refusing(1), Refusing(2, is_willing=False)
    with pytest.raises(
        StateMismatchError, match="nothing was changed but in last, which cannot take its old state back"
    ):
        trip(tmp_path, {"other": Refusing(5), "last": Refusing(6)}, {"other": other, "last": refusing})
    assert other.value == 1


def test_a_disabled_scalers_state_is_refused_before_the_model_changes(tmp_path: Path) -> None:
    model = line(0.0)
    with pytest.raises(StateMismatchError, match="scaler refuses the state that was saved: RuntimeError"):
        trip(
            tmp_path,
            {"model": line(1.0), "scaler": GradScaler("cpu", enabled=False)},
            {"model": model, "scaler": GradScaler("cpu")},
        )
    assert model.weight.item() == 0.0


def test_a_module_that_does_not_take_its_state_says_what_was_changed(tmp_path: Path) -> None:
    class Choosing(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((1,), value))
            self.register_load_state_dict_post_hook(self.check)

        @staticmethod
        def check(module: nn.Module, _: object) -> None:
            if module.weight.item() == 13.0:  # type: ignore[operator]
                raise ValueError("thirteen")

    with pytest.raises(
        RestoreFailedError, match=r"model did not take the state that was saved: thirteen.* o is restored"
    ) as e:
        trip(tmp_path, {"model": Choosing(13.0), "o": Refusing(4)}, {"model": Choosing(0.0), "o": Refusing(1)})
    assert (e.value.name, e.value.changed) == ("model", ("o",))


# -- a module's own loading --------------------------------------------------------------------------------------------


class Versioned(nn.Module):
    """Doubles weights that an older version saved."""

    _version = 2

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))

    def _load_from_state_dict(self, state: State, prefix: str, metadata: State, *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_module_learns_which_version_saved_it(tmp_path: Path) -> None:
    live = Versioned(0.0)
    trip(tmp_path / "1", {"m": nn.Sequential(Versioned(3.0))}, {"m": nn.Sequential(live)})
    assert live.weight.tolist() == [3.0, 3.0]

    old = Versioned(3.0)
    old._version = 1  # type: ignore[misc]
    trip(tmp_path / "2", {"m": torch.compile(old, backend="eager")}, {"m": live})
    assert live.weight.tolist() == [6.0, 6.0]


def test_a_module_that_loads_by_itself_is_not_cast_unless_the_caller_says_so(tmp_path: Path) -> None:
    live, saved = Versioned(0.0), Versioned(1 / 3).double()
    with pytest.raises(StateMismatchError, match=r"m\.weight is torch\.float32 here and torch\.float64 there"):
        trip(tmp_path / "1", {"m": saved}, {"m": live})
    assert live.weight.tolist() == [0.0, 0.0]
    found = trip(tmp_path / "2", {"m": saved}, {"m": live}, cast=True)
    assert torch.equal(live.weight, saved.weight.float())
    assert found.fit is not None
    assert found.fit.cast == ("m.weight",)


class Growing(nn.Module):
    """Has a buffer of the size that was saved, or none."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("seen", torch.arange(float(size)) if size else None)

    def _load_from_state_dict(self, state: State, prefix: str, *rest: Any) -> None:
        found = state.get(f"{prefix}seen")
        self.seen = None if found is None else torch.empty_like(found)
        super()._load_from_state_dict(state, prefix, *rest)


@pytest.mark.parametrize(("there", "here"), [(3, 5), (5, 0), (0, 5)])
def test_a_module_may_resize_its_buffers_when_it_loads(tmp_path: Path, there: int, here: int) -> None:
    live = Growing(here)
    trip(tmp_path, {"m": nn.Sequential(Growing(there), nn.Linear(1, 1))}, {"m": nn.Sequential(live, nn.Linear(1, 1))})
    assert (None if live.seen is None else live.seen.tolist()) == (list(range(there)) or None)


def test_what_a_modules_own_loading_leaves_out_is_refused_or_reported(tmp_path: Path) -> None:
    class Keyed(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.zeros(1)))
            self.register_load_state_dict_pre_hook(lambda *_: None)

    with pytest.raises(RestoreFailedError, match=r"it found no m\.new and it has no use for m\.old"):
        trip(tmp_path / "1", {"m": Keyed("old")}, {"m": Keyed("new")})
    found = trip(tmp_path / "2", {"m": Keyed("old")}, {"m": Keyed("new")}, strict=False)
    assert found.fit is not None
    assert (found.fit.missing, found.fit.unexpected) == (("m.new",), ("m.old",))


def test_a_key_that_a_hook_adds_does_not_refuse_the_module(tmp_path: Path) -> None:
    def noted(value: float) -> nn.Linear:
        made = line(value)
        made._register_state_dict_hook(lambda module, state, prefix, _: state.update({f"{prefix}when": torch.ones(1)}))
        return made

    live = noted(0.0)
    trip(tmp_path, {"m": nn.Sequential(noted(4.0))}, {"m": nn.Sequential(live)})
    assert live.weight.item() == 4.0


def _wrapped(how: str, module: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for part in how:
        if part == "c":
            module = torch.compile(module, backend="eager")  # type: ignore[assignment]
        elif part == "a":
            module = checkpoint_wrapper(module)
        else:
            module = nn.DataParallel(module)
    return module


@diagonal("here, there", ["", "c", "ad", "ca"], ["c", "", "a", "d", "ca", "ac", "dc", "cad"])
def test_a_checkpoint_fits_with_and_without_each_wrapper(tmp_path: Path, there: str, here: str) -> None:
    def net(how: str, value: float) -> tuple[nn.Module, nn.Linear]:
        inner = line(value)
        return _wrapped(how, nn.Sequential(OrderedDict(module=_wrapped(how, inner), rest=nn.BatchNorm1d(1)))), inner

    (saved, _), (live, inner) = net(there, 4.0), net(here, 0.0)
    trip(tmp_path, {"m": saved}, {"m": live})
    assert inner.weight.item() == 4.0
    assert set(cloudckpt.read(tmp_path / "c")["m"]) == {  # type: ignore[call-overload]
        "module.weight",
        *(f"rest.{name}" for name in nn.BatchNorm1d(1).state_dict()),
    }


# -- no memory ---------------------------------------------------------------------------------------------------------


def test_a_module_on_the_meta_device_is_refused_by_name_or_gets_memory(tmp_path: Path) -> None:
    saved = Two(3.0, 3.0, is_tied=True)
    with torch.device("meta"):
        live = Two(0.0, 0.0, is_tied=True)
        live.register_buffer("steps", torch.zeros(2), persistent=False)
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
    for strict in (True, False):
        with pytest.raises(StateMismatchError, match=r"m\.a\.weight is on the meta device .*materialize='cpu'"):
            trip(tmp_path / f"{strict}", {"m": saved}, {"m": live}, strict=strict)
    with pytest.raises(StateMismatchError, match=r"m\.b\.weight"):
        trip(tmp_path / "other", {"m": line(1.0)}, {"m": live}, materialize="cpu")
    assert live.a.weight.is_meta

    trip(tmp_path / "2", {"m": saved}, {"m": live}, materialize="cpu")

    assert live.a.weight.item() == 3.0
    assert live.b.weight is live.a.weight
    assert optimizer.param_groups[0]["params"][0] is live.a.weight
    assert live.get_buffer("steps").is_meta  # no checkpoint has it: whoever uses it unfilled is told


def test_a_meta_tensor_in_a_container_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StateMismatchError, match=r"box\.w is on the meta device"):
        trip(tmp_path, {"box": {"w": torch.ones(2)}}, {"box": {"w": torch.ones(2, device="meta")}}, materialize="cpu")


@pytest.mark.parametrize("make", [lambda: torch.device("meta"), torch.inference_mode], ids=["meta", "inference"])
def test_what_is_the_default_around_a_restore_does_not_matter(tmp_path: Path, make: Callable[[], Any]) -> None:
    model, optimizer = line(0.0), torch.optim.Adam([torch.zeros(2, requires_grad=True)])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    live: State = {"m": model, "o": optimizer, "v": {"x": torch.zeros(3)}, "n": 0}
    saved: State = {"m": line(2.0), "o": optimizer, "v": {"x": torch.ones(3)}, "n": 7}
    with make():
        trip(tmp_path, saved, live)
        read = cloudckpt.read(tmp_path / "c")

    assert (model.weight.item(), live["v"]["x"].tolist(), live["n"]) == (2.0, [1.0] * 3, 7)
    assert read["m"]["weight"].item() == 2.0  # type: ignore[index]


# -- what users do -----------------------------------------------------------------------------------------------------


def hooked(module: nn.Module) -> nn.Module:
    module.register_load_state_dict_pre_hook(lambda *_: None)
    return module


def test_a_hook_does_not_switch_checks_off(tmp_path: Path) -> None:
    with torch.device("meta"):
        meta = hooked(line(0.0))
    with pytest.raises(StateMismatchError, match=r"m\.weight is on the meta device"):
        trip(tmp_path / "1", {"m": line(2.0)}, {"m": meta})
    trip(tmp_path / "2", {"m": line(2.0)}, {"m": meta}, materialize="cpu")
    assert meta.weight.item() == 2.0  # type: ignore[operator]

    tied = hooked(Two(0.0, 0.0, is_tied=True))
    with pytest.raises(StateMismatchError, match="share memory here and differ"):
        trip(tmp_path / "3", {"m": Two(1.0, 2.0)}, {"m": tied})
    assert [parameter.item() for parameter in tied.parameters()] == [0.0]


def test_a_loading_of_its_own_is_told_how_strict_the_caller_is(tmp_path: Path) -> None:
    class Strict(nn.Linear):
        def load_state_dict(self, state: State, strict: bool = True) -> None:  # type: ignore[override]
            if strict and "bias" not in state:
                raise KeyError("bias")
            self.weight.data.copy_(state["weight"])

    class Plain(nn.Linear):
        def load_state_dict(self, state: State) -> None:  # type: ignore[override]
            self.weight.data.copy_(state["weight"])

    saved = nn.Linear(1, 1, bias=False)
    with pytest.raises(RestoreFailedError, match="bias"):
        trip(tmp_path / "1", {"m": saved}, {"m": Strict(1, 1)})
    for number, live in enumerate((Strict(1, 1), Plain(1, 1))):
        trip(tmp_path / f"2{number}", {"m": saved}, {"m": live}, strict=False)
        assert torch.equal(live.weight, saved.weight)


def test_the_versions_of_a_state_dict_come_back_with_it(tmp_path: Path) -> None:
    class Trainer:
        def __init__(self, value: float) -> None:
            self.module = nn.Sequential(Versioned(value))

        def state_dict(self) -> State:
            return {"inner": self.module.state_dict()}

        def load_state_dict(self, state: State) -> None:
            self.module.load_state_dict(state["inner"])

    live, holder, empty = Trainer(0.0), nn.Sequential(Versioned(0.0)), nn.Sequential(Versioned(0.0))
    of_module, of_dict = nn.Sequential(Versioned(0.0)), nn.Sequential(Versioned(0.0))
    state: State = {"t": live, "d": holder.state_dict(), "e": None, "x": of_module.state_dict(), "y": of_dict}
    whole = nn.Sequential(Versioned(4.0))
    other = whole.state_dict()
    trip(tmp_path, {"t": Trainer(3.0), "d": other, "e": other, "x": whole, "y": other}, state)
    of_module.load_state_dict(state["x"])
    for name in ("d", "e", "x"):
        read = nn.Sequential(Versioned(0.0))
        read.load_state_dict(cloudckpt.read(tmp_path / "c")[name])  # type: ignore[arg-type]
        assert read[0].weight.tolist() == [4.0] * 2
    assert [module[0].weight.tolist() for module in (of_module, of_dict)] == [[4.0] * 2] * 2  # type: ignore[operator, union-attr]
    holder.load_state_dict(state["d"])
    empty.load_state_dict(state["e"])
    assert [module[0].weight.tolist() for module in (live.module, holder, empty)] == [[3.0] * 2, [4.0] * 2, [4.0] * 2]  # type: ignore[operator, union-attr]


def test_nothing_has_memory_after_a_refusal(tmp_path: Path) -> None:
    for number, saved in enumerate(({"m": nn.Sequential(line(1.0), line(2.0))}, {"m": Two(1.0, 2.0)})):
        with torch.device("meta"):
            live = nn.Sequential(line(0.0)) if number == 0 else Two(0.0, 0.0, is_tied=True)
        with pytest.raises(StateMismatchError):
            trip(tmp_path / str(number), saved, {"m": live}, materialize="cpu")
        assert all(parameter.is_meta for parameter in live.parameters())


@pytest.mark.parametrize("make", [lambda: nn.LSTM(2, 3), lambda: nn.GRU(2, 3), lambda: nn.Linear(2, 3)])
def test_a_model_on_the_meta_device_gets_memory_beside_its_optimizer(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.device("meta"):
        again = make()
    fresh = torch.optim.Adam(again.parameters())

    trip(tmp_path, {"m": model, "o": optimizer}, {"m": again, "o": fresh}, materialize="cpu")

    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(optimizer.state[one]["exp_avg"], fresh.state[other]["exp_avg"])


def test_resized_tensors_in_one_memory_are_refused(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self, size: int, *, is_tied: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(size, 1), nn.Embedding(size, 1)
            if is_tied:
                self.b.weight = self.a.weight

    def grown(name: str, saved: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        live[: len(saved)] = saved  # a copy: nothing is changed by it
        return live

    live = Pair(3, is_tied=True)
    before = live.a.weight.clone()
    with pytest.raises(StateMismatchError, match=r"m\.a\.weight, m\.b\.weight share memory"):
        trip(tmp_path / "1", {"m": Pair(2, is_tied=False)}, {"m": live}, resize=grown)
    saved: State = {"m": Pair(2, is_tied=True), "last": Refusing(99)}
    with pytest.raises(StateMismatchError, match="last refuses"):
        trip(tmp_path / "2", saved, {"m": live, "last": Refusing(0)}, resize=grown)
    assert torch.equal(live.a.weight, before)
    tied = Pair(2, is_tied=True)
    trip(tmp_path / "3", {"m": tied}, {"m": live}, resize=grown)
    assert torch.equal(live.a.weight[:2], tied.a.weight)


def test_a_resize_that_raises_is_told_by_the_tensors_name(tmp_path: Path) -> None:
    with pytest.raises(StateMismatchError, match=r"resize raised ZeroDivisionError for m\.weight"):
        trip(tmp_path, {"m": nn.Embedding(2, 1)}, {"m": nn.Embedding(3, 1)}, resize=lambda *_: 1 / 0)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    "options",
    [{"resize": 5}, {"materialize": "nope"}, {"materialize": 5.0}, {"cast": "float16"}, {"strict": "no"}],
    ids=repr,
)
def test_choices_that_mean_nothing_are_refused(tmp_path: Path, options: State) -> None:
    with pytest.raises(cloudckpt.OptionsError, match=f"{next(iter(options))} is"):
        trip(tmp_path, {"n": 1}, {"n": 0}, **options)


def test_an_object_gets_back_what_it_had_of_gradients(tmp_path: Path) -> None:
    class Policy:
        def __init__(self, value: float) -> None:
            self.alpha = nn.Parameter(torch.tensor([value]))
            self.beta = torch.tensor([value], requires_grad=True)

        def state_dict(self) -> State:
            return {"alpha": self.alpha, "beta": self.beta}

        def load_state_dict(self, state: State) -> None:
            self.alpha, self.beta = state["alpha"], state["beta"]

    live = Policy(0.0)
    state: State = {"p": live, "x": None}
    trip(tmp_path, {"p": Policy(2.0), "x": nn.Parameter(torch.ones(1))}, state)
    assert (type(live.alpha), live.alpha.requires_grad, live.alpha.item()) == (nn.Parameter, True, 2.0)
    assert (type(live.beta), live.beta.requires_grad, live.beta.item()) == (torch.Tensor, True, 2.0)
    assert (type(state["x"]), state["x"].requires_grad) == (nn.Parameter, True)


def test_one_parameter_under_two_names_of_an_object_is_one_again(tmp_path: Path) -> None:
    class Twice:
        def __init__(self, value: float) -> None:
            self.first = self.second = nn.Parameter(torch.tensor([value]))

        def state_dict(self) -> State:
            return {"first": self.first, "second": self.second}

        def load_state_dict(self, state: State) -> None:
            self.first, self.second = state["first"], state["second"]

    live = Twice(0.0)
    trip(tmp_path, {"o": Twice(2.0)}, {"o": live})
    assert live.first is live.second
    assert live.first.item() == 2.0


@pytest.mark.parametrize("state", [(1, torch.ones(2)), [1, [2]], torch.ones(3), 7, None], ids=repr)
def test_an_object_is_handed_whatever_its_state_was(tmp_path: Path, state: object) -> None:
    class Whatever:
        def __init__(self, state: object) -> None:
            self.state = state

        def state_dict(self) -> Any:
            return self.state

        def load_state_dict(self, state: object) -> None:
            self.state = state

    live = Whatever(0)
    trip(tmp_path, {"o": Whatever(state)}, {"o": live})
    assert repr(live.state) == repr(state)


def test_an_object_without_a_state_yet_takes_what_was_saved(tmp_path: Path) -> None:
    class Late(Refusing):
        def state_dict(self) -> State:
            if self.value == 0:
                raise RuntimeError("not started")
            return super().state_dict()

    live = Late(0)
    trip(tmp_path, {"o": Late(5)}, {"o": live})
    assert live.value == 5


def test_an_object_that_went_back_has_nothing_of_the_newer_state(tmp_path: Path) -> None:
    class Open:
        def __init__(self, **values: object) -> None:
            self.__dict__.update(values)

        def state_dict(self) -> State:
            return dict(self.__dict__)

        def load_state_dict(self, state: State) -> None:
            self.__dict__.update(state)

    live = Open(x=0)
    with pytest.raises(StateMismatchError, match=r"nothing was changed$"):
        trip(tmp_path, {"o": Open(x=1, y=2), "r": Refusing(99)}, {"o": live, "r": Refusing(0)})
    assert live.__dict__ == {"x": 0}


def test_an_interrupt_in_an_object_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    class Interrupted(Refusing):
        def load_state_dict(self, state: State) -> None:
            raise KeyboardInterrupt

    first, model = Refusing(1), line(0.0)
    with pytest.raises(KeyboardInterrupt):
        trip(
            tmp_path,
            {"a": Refusing(5), "b": Refusing(6), "m": line(7.0)},
            {"a": first, "b": Interrupted(2), "m": model},
        )
    assert (first.value, model.weight.item()) == (1, 0.0)


def test_one_object_under_two_names_takes_one_state(tmp_path: Path) -> None:
    live = Refusing(0)
    with pytest.raises(StateMismatchError, match="best and last are one object here and differ"):
        trip(tmp_path / "1", {"best": Refusing(1), "last": Refusing(2)}, {"best": live, "last": live})
    assert live.value == 0
    trip(tmp_path / "2", {"best": Refusing(3), "last": Refusing(3)}, {"best": live, "last": live})
    assert live.value == 3


def test_containers_that_stand_in_two_places_come_back_as_what_was_saved_in_each(tmp_path: Path) -> None:
    history: list[float] = []
    live: State = {"loss": dict.fromkeys(["train", "val"], history), "rows": [[0]] * 2}
    trip(tmp_path, {"loss": {"train": [1.0], "val": [2.0]}, "rows": [[1], [2]]}, live)
    assert live == {"loss": {"train": [1.0], "val": [2.0]}, "rows": [[1], [2]]}


def test_a_list_of_a_models_parameters_stays_one_with_it(tmp_path: Path) -> None:
    saved, model = line(3.0), line(0.0)
    held = list(model.parameters())
    trip(tmp_path, {"m": saved, "held": list(saved.parameters())}, {"m": model, "held": held})
    assert held[0] is model.weight
    assert model.weight.item() == 3.0


def test_generators_that_stand_in_the_state_draw_on(tmp_path: Path) -> None:
    import random

    import numpy as np

    saved = [torch.Generator().manual_seed(1), random.Random(1), np.random.default_rng(1), np.random.RandomState(1)]
    live = [torch.Generator().manual_seed(2), random.Random(2), np.random.default_rng(2), np.random.RandomState(2)]
    held = list(live)
    trip(tmp_path, {"g": saved}, {"g": live})

    def draws(each: list[Any]) -> list[float]:
        return [torch.rand(1, generator=each[0]).item(), each[1].random(), each[2].random(), each[3].random_sample()]

    assert draws(held) == draws(saved)


@pytest.mark.parametrize("saved", [OrderedDict(a=torch.ones(1)), OrderedDict(a=1)], ids=["tensors", "plain"])
def test_an_empty_dict_takes_the_type_that_was_saved(tmp_path: Path, saved: object) -> None:
    live: State = {"d": {}}
    trip(tmp_path, {"d": saved}, live)
    assert type(live["d"]) is OrderedDict
    assert repr(live["d"]) == repr(saved)


def test_a_tensor_of_a_foreign_type_is_filled_where_one_stands_and_refused_elsewhere(tmp_path: Path) -> None:
    class Box(torch.Tensor):
        pass

    saved = torch.ones(2).as_subclass(Box)
    live = torch.zeros(2).as_subclass(Box)
    trip(tmp_path / "1", {"t": saved}, {"t": live})
    assert live.tolist() == [1.0, 1.0]
    with pytest.raises(StateMismatchError, match="t was a Box"):
        trip(tmp_path / "2", {"t": saved}, {"t": None})
    aliasing = Aliasing(1.0, 1.0)
    aliasing.best = saved
    with pytest.raises(cloudckpt.UnsupportedValueError, match=r"'o\.best' is a Box"):
        cloudckpt.save({"o": aliasing}, tmp_path / "3", progress="off")


def test_a_backward_notices_that_a_value_was_restored_since(tmp_path: Path) -> None:
    value = torch.tensor([3.0])
    weight = torch.ones(1, requires_grad=True)
    loss = (weight * value).sum()
    trip(tmp_path, {"v": torch.tensor([5.0])}, {"v": value})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_a_name_that_the_checkpoint_lacks_is_not_missed_where_another_one_fills_it(tmp_path: Path) -> None:
    live = Two(0.0, 0.0, is_tied=True)
    cloudckpt.save({"m": {"a.weight": torch.tensor([[4.0]])}}, tmp_path / "c", progress="off")
    found = cloudckpt.load({"m": live}, tmp_path / "c", progress="off")
    assert live.b.weight.item() == 4.0
    assert found.fit is not None
    assert found.fit.missing == ()


def test_one_checkpoint_is_no_root(tmp_path: Path) -> None:
    cloudckpt.save({"n": 1}, tmp_path / "c", progress="off")
    with (
        cloudckpt.CheckpointManager(tmp_path / "c", progress="off") as manager,
        pytest.raises(cloudckpt.OptionsError, match="is one checkpoint, not a root"),
    ):
        manager.restore({"n": 0})


@pytest.mark.parametrize("is_beside_meta", [False, True])
@pytest.mark.parametrize("is_stepped", [False, True])
def test_the_state_of_a_grown_parameter_is_what_resize_makes_of_it(
    tmp_path: Path, *, is_stepped: bool, is_beside_meta: bool
) -> None:
    def trained(size: int, *, is_stepped: bool) -> tuple[nn.Embedding, torch.optim.Optimizer]:
        model = nn.Embedding(size, 2)
        optimizer = torch.optim.Adam(model.parameters())
        if is_stepped:
            model.weight.grad = torch.ones(size, 2)
            optimizer.step()
        return model, optimizer

    def grown(_: str, saved: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        live[: len(saved)] = saved
        return live

    (model, optimizer), (again, live) = trained(3, is_stepped=True), trained(5, is_stepped=is_stepped)
    tail = live.state[again.weight]["exp_avg"][3:].clone() if is_stepped else torch.zeros(2, 2)
    with torch.device("meta" if is_beside_meta else "cpu"):
        other = nn.Linear(2, 2)
    saved: State = {"m": model, "o": optimizer, "other": nn.Linear(2, 2)}

    trip(tmp_path, saved, {"m": again, "o": live, "other": other}, resize=grown, materialize="cpu")

    state = live.state[again.weight]
    assert torch.equal(state["exp_avg"][:3], optimizer.state[model.weight]["exp_avg"])
    assert torch.equal(state["exp_avg"][3:], tail)
    assert torch.equal(again.weight[:3], model.weight)
    assert torch.equal(other.weight, saved["other"].weight)


# -- what several hold -------------------------------------------------------------------------------------------------


class Keeping:
    """Keeps what it is handed."""

    def __init__(self, **held: Any) -> None:
        self.held = held

    def state_dict(self) -> State:
        return self.held

    def load_state_dict(self, state: State) -> None:
        self.held = state


class CopyingInto(Keeping):
    """Copies what it is handed to where it has the same."""

    def load_state_dict(self, state: State) -> None:
        for name, tensor in self.held.items():
            tensor.copy_(state[name])


class OwnLinear(nn.Linear):
    """Loads by code of its own."""

    def _load_from_state_dict(self, *args: Any) -> None:
        return super()._load_from_state_dict(*args)


VIEWS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda weight: weight[0],
    lambda weight: weight.view(-1),
    lambda weight: weight.t(),
    lambda weight: weight,
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", [Keeping, CopyingInto])
@pytest.mark.parametrize("linear", [nn.Linear, OwnLinear])
def test_an_object_that_holds_a_view_of_a_model_is_handed_what_was_saved(
    tmp_path: Path,
    kind: type[Keeping],
    linear: type[nn.Linear],
    view: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    there, here = linear(3, 2), linear(3, 2)
    saved, live = kind(x=view(there.weight.detach())), kind(x=view(here.weight.detach()))
    trip(tmp_path, {"model": there, "o": saved}, {"model": here, "o": live})
    assert torch.equal(live.held["x"], saved.held["x"])
    assert torch.equal(here.weight, there.weight)


def test_an_object_that_holds_the_model_takes_a_copy_that_was_saved(tmp_path: Path) -> None:
    there, here = nn.Linear(3, 2), nn.Linear(3, 2)
    saved, live = Keeping(w=there.weight.detach().clone()), Keeping(w=here.weight.detach())
    trip(tmp_path, {"model": there, "ema": saved}, {"model": here, "ema": live})
    assert torch.equal(live.held["w"], there.weight)


def test_nobody_is_handed_memory_that_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloudckpt.save({"o": Keeping(x=torch.ones(2))}, tmp_path / "c", progress="off")
    live = Keeping(x=torch.zeros(2))
    monkeypatch.setattr("cloudckpt.state.matching._Matching._refuse_doubles", lambda self: self._early.clear())
    with pytest.raises(cloudckpt.CloudCkptError, match=r"o\.x would be memory that nothing fills"):
        cloudckpt.load({"o": live}, tmp_path / "c", progress="off")
    assert live.held["x"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("is_beside", [True, False])
@pytest.mark.parametrize("kinds", [(OwnLinear, OwnLinear), (nn.Linear, OwnLinear), (OwnLinear, nn.Linear)])
def test_untied_weights_do_not_go_into_tied_ones_that_load_by_themselves(
    tmp_path: Path, kinds: tuple[type[nn.Linear], type[nn.Linear]], *, is_beside: bool
) -> None:
    there, here = (nn.ModuleList([kind(2, 2, bias=False) for kind in kinds]) for _ in range(2))
    here[1].weight = here[0].weight
    before = here[0].weight.detach().clone()

    def state(model: nn.Module) -> State:
        return {"model": model, "ema": dict(model.state_dict())} if is_beside else {"model": model}

    with pytest.raises(StateMismatchError, match=r"model\.[01]\.weight and model\.[01]\.weight share memory"):
        trip(tmp_path, state(there), state(here))
    assert torch.equal(here[0].weight, before)


def test_of_objects_in_one_memory_those_that_keep_are_restored_and_those_that_copy_are_refused(tmp_path: Path) -> None:
    cloudckpt.save({"a": Keeping(x=torch.ones(1)), "b": Keeping(x=torch.zeros(1))}, tmp_path / "c", progress="off")
    for kind in (Keeping, CopyingInto):
        memory = torch.full((1,), 7.0)
        live = {"a": kind(x=memory), "b": kind(x=memory)}
        if kind is Keeping:
            cloudckpt.load(live, tmp_path / "c", progress="off")
            assert [live[name].held["x"].item() for name in "ab"] == [1.0, 0.0]
        else:
            with pytest.raises(StateMismatchError, match=r"a\.x and b\.x share memory.*nothing was changed"):
                cloudckpt.load(live, tmp_path / "c", progress="off")
            assert memory.item() == 7.0


Z = torch.tensor([1 + 2j])


@pytest.mark.parametrize("other", [Z.conj(), Z.conj().imag])
def test_what_is_read_conjugated_or_negated_is_another_tensor(tmp_path: Path, other: torch.Tensor) -> None:
    one = Z.imag if not other.is_complex() else Z
    live: State = {"o": Keeping(), "v": None}
    trip(tmp_path, {"o": Keeping(one=one, other=other), "v": [one, other]}, live)
    assert torch.equal(live["o"].held["one"], one)
    assert torch.equal(live["o"].held["other"], other)
    assert torch.equal(live["v"][0], one)
    assert torch.equal(live["v"][1], other)


class Rope(OwnLinear):
    """Has a buffer beside its conjugate."""

    def __init__(self, z: torch.Tensor) -> None:
        super().__init__(1, 1)
        self.register_buffer("z", z)
        self.register_buffer("zc", z.conj())


def test_a_buffer_and_its_conjugate_come_back_by_own_loading(tmp_path: Path) -> None:
    live = Rope(torch.zeros(1, dtype=torch.complex64))
    trip(tmp_path, {"m": Rope(Z.clone())}, {"m": live})
    assert torch.equal(live.get_buffer("z"), Z)
    assert torch.equal(live.get_buffer("zc"), Z.conj())


@pytest.mark.parametrize("is_first", [True, False])
def test_a_parameter_and_what_was_detached_from_it_are_two_tensors_in_one_memory(
    tmp_path: Path, *, is_first: bool
) -> None:
    w = nn.Parameter(torch.ones(1))
    held = {"w": w, "shadow": w.detach()} if is_first else {"shadow": w.detach(), "w": w}
    live = Keeping()
    trip(tmp_path, {"o": Keeping(**held)}, {"o": live})
    assert type(live.held["w"]) is nn.Parameter
    assert type(live.held["shadow"]) is torch.Tensor
    assert not live.held["shadow"].requires_grad
    assert live.held["w"].data_ptr() == live.held["shadow"].data_ptr()


@pytest.mark.parametrize("kind", [deque, lambda items: SimpleNamespace(x=items)])
def test_gradients_of_tensors_in_any_container_come_back(tmp_path: Path, kind: Callable[[Any], Any]) -> None:
    live = Keeping()
    trip(tmp_path, {"o": Keeping(x=kind([torch.ones(1, requires_grad=True), torch.ones(1)]))}, {"o": live})
    found = live.held["x"]
    assert [each.requires_grad for each in getattr(found, "x", found)] == [True, False]


@pytest.mark.parametrize("held", [{"a": 1}, {"a": torch.ones(1)}])
@pytest.mark.parametrize(("there", "here"), [(int, list), (None, int), (list, None)])
def test_the_factory_of_a_defaultdict_is_the_saved_one_where_it_stands(
    tmp_path: Path, held: State, there: Any, here: Any
) -> None:
    kept = defaultdict(here, {name: torch.zeros(1) if name in held and held[name] != 1 else 0 for name in held})
    live: State = {"v": kept}
    trip(tmp_path, {"v": defaultdict(there, held)}, live)
    assert live["v"] is kept
    assert kept.default_factory is there
    assert kept == held


@pytest.mark.parametrize("kinds", [(dict, OrderedDict), (OrderedDict, dict)])
def test_a_container_of_tensors_has_the_saved_type(tmp_path: Path, kinds: tuple[type, type]) -> None:
    there, here = kinds
    tensor = torch.zeros(1)
    live: State = {"v": here(a=tensor)}
    trip(tmp_path, {"v": there(a=torch.ones(1))}, live)
    assert type(live["v"]) is there
    assert live["v"]["a"] is tensor
    assert tensor.item() == 1.0


class Amax(nn.Module):
    """Has a tensor as extra state."""

    def __init__(self, amax: torch.Tensor) -> None:
        super().__init__()
        self.w, self.amax = nn.Parameter(torch.ones(1)), amax

    def get_extra_state(self) -> State:
        return {"amax": self.amax}

    def set_extra_state(self, state: State) -> None:
        self.amax = state["amax"]


def test_extra_state_is_handed_over_in_the_dtype_in_which_it_was_saved(tmp_path: Path) -> None:
    live = Amax(torch.zeros(1, dtype=torch.int64))
    trip(tmp_path, {"m": Amax(torch.full((1,), 0.5))}, {"m": live})
    assert live.amax.dtype == torch.float32
    assert live.amax.item() == 0.5
