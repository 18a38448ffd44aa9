"""What only PyTorch's own code saves is looked at without it, and nobody can tell the difference."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import cloudckpt
from cloudckpt.format import Flat
from cloudckpt.state import Allowed, Saved, bind, capture, collector_at_rest, plan_restore
from cloudckpt.state.collector import collector_awake
from cloudckpt.state.modules import ModuleEntry
from cloudckpt.state.overlap import tied_names
from cloudckpt.state.plain import PlainModules, PlainOptimizers


class Various(nn.Module):
    """Parts of many kinds: shared, absent, without tensors, with hidden buffers, of another version."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.again = self.first
        self.parts = nn.ModuleList([nn.Identity(), nn.Sequential(nn.Linear(3, 1, bias=False))])
        self.own = nn.Parameter(torch.rand(2))
        self.absent: nn.Module | None
        self.register_module("absent", None)
        self.register_parameter("nothing", None)
        self.register_buffer("kept", torch.rand(4))
        self.register_buffer("hidden", torch.rand(4), persistent=False)


def test_a_plain_module_is_seen_as_its_state_dict_says() -> None:
    module = Various()
    found = PlainModules().tensors_of(module)
    assert found is not None
    tensors, versions = found
    said = module.state_dict()
    assert list(tensors) == list(said)
    assert all(tensor.is_set_to(said[name]) for name, tensor in tensors.items())
    assert {"": {"version": 1}} | {path: {"version": version} for path, version in versions.items()} == {
        path: note
        for path, note in said._metadata.items()  # type: ignore[attr-defined]
        if not path or note != {"version": 1}
    }


class Extra(nn.Linear):
    def get_extra_state(self) -> object:
        return 1


class Saving(nn.Linear):
    def _save_to_state_dict(self, *arguments: Any) -> None:
        super()._save_to_state_dict(*arguments)


class Loading(nn.Linear):
    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)


class LoadingNorm(nn.BatchNorm1d):
    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)


class Saying(nn.Linear):
    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        return super().state_dict(*arguments, **options)


class Finding(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class Elsewhere(nn.Linear):
    """A module that keeps a registry of its own."""

    @property
    def _buffers(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"found": torch.ones(1)}

    @_buffers.setter
    def _buffers(self, value: object) -> None:
        pass


class Tensor(torch.Tensor):
    pass


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script: nn.Module = torch.jit.script(nn.Linear(1, 1))
    return script


def _holding(tensor: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("held", tensor)
    return module


def _hooked(register: str) -> nn.Module:
    module = nn.Linear(1, 1)
    getattr(module, register)(lambda *_: None)
    return module


def _patched() -> nn.Module:
    module = nn.Linear(1, 1)
    module.state_dict = dict  # type: ignore[method-assign, assignment]
    return module


NOT_PLAIN = {
    "extra state": lambda: Extra(1, 1),
    "a method": lambda: Saving(1, 1),
    "another loading": lambda: Loading(1, 1),
    "another loading of a norm": lambda: LoadingNorm(1),
    "another state_dict": lambda: Saying(1, 1),
    "another look-up": lambda: Finding(1, 1),
    "a registry of its own": lambda: Elsewhere(1, 1),
    "a tensor of its own kind": lambda: _holding(torch.rand(1).as_subclass(Tensor)),
    "a script": _scripted,
    "a spectral norm that recomputes": lambda: nn.utils.spectral_norm(nn.Linear(2, 2)),
    "a method of the instance": _patched,
    "a wrapper": lambda: nn.DataParallel(nn.Linear(1, 1)),
    "no shape yet": lambda: nn.LazyLinear(1),
    **{
        name: lambda name=name: _hooked(name)
        for name in (
            "register_state_dict_post_hook",
            "register_state_dict_pre_hook",
            "register_load_state_dict_pre_hook",
            "register_load_state_dict_post_hook",
        )
    },
}


@pytest.mark.parametrize("make", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_may_do_more_than_hold_tensors_is_not_plain_wherever_it_stands(make: Any) -> None:
    assert PlainModules().tensors_of(make()) is None
    assert PlainModules().tensors_of(nn.Sequential(nn.Linear(1, 1), nn.Sequential(make()))) is None


def test_a_module_that_never_was_initialized_is_not_plain() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            pass

    assert PlainModules().tensors_of(Bare()) is None


@pytest.mark.parametrize("name", ["state_dict", "_save_to_state_dict", "_load_from_state_dict", "get_extra_state"])
def test_no_module_is_plain_while_pytorchs_own_code_is_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = getattr(nn.Module, name)

    @functools.wraps(own)
    def replaced(*arguments: Any, **options: Any) -> Any:
        return own(*arguments, **options)

    monkeypatch.setattr(nn.Module, name, replaced)
    assert PlainModules().tensors_of(nn.Linear(1, 1)) is None


class Renamed(nn.Linear):
    """A module whose lists of parameters say something else than its state_dict."""

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(())


def _with_hooks_of_forward() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    module.register_full_backward_hook(lambda *_: None)
    return module


def _of_another_version() -> nn.Module:
    module = nn.Linear(2, 2)
    module._version = 7
    return nn.Sequential(module, nn.Linear(2, 2))


PLAIN = {
    "parts of many kinds": Various,
    "a batch norm": lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
    "an instance norm": lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
    "a norm without statistics": lambda: nn.BatchNorm1d(2, track_running_stats=False),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2),
    "an orthogonal weight": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)),
    "lists of parameters of its own": lambda: Renamed(2, 2),
    "hooks of forward": _with_hooks_of_forward,
    "a version of its own": _of_another_version,
    "a buffer": lambda: _holding(nn.Buffer(torch.rand(2))),
    "nothing": nn.Identity,
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_a_plain_module_is_saved_as_if_its_state_dict_were_asked(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"model": make(), "layers": [make(), nn.Linear(1, 1)]}
    found = capture(bind(state))
    monkeypatch.setattr(PlainModules, "tensors_of", lambda *_: None)
    _assert_same(found, capture(bind(state)))


def _assert_same(one: Flat, other: Flat) -> None:
    assert list(one.leaves) == list(other.leaves)
    assert list(one.paths.items()) == list(other.paths.items())
    assert one.notes == other.notes
    assert one.alike == other.alike
    for name, leaf in one.leaves.items():
        there = other.leaves[name]
        if isinstance(leaf, torch.Tensor) and isinstance(there, torch.Tensor):
            assert leaf.detach().is_set_to(there.detach())
            assert (type(leaf.detach()), leaf.dtype) == (type(there.detach()), there.dtype)
        else:
            assert repr(leaf) == repr(there)


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_norm_whose_checkpoint_counts_no_batches_is_told_so_in_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_asked: bool
) -> None:
    old = nn.BatchNorm1d(2)
    del old._buffers["num_batches_tracked"]
    old.running_mean.fill_(3)  # type: ignore[union-attr, operator]
    cloudckpt.save({"model": old}, tmp_path / "c")
    if is_asked:
        monkeypatch.setattr(PlainModules, "tensors_of", lambda *_: None)
    norm = nn.BatchNorm1d(2)
    norm.num_batches_tracked.fill_(5)  # type: ignore[union-attr, operator]
    with pytest.raises(cloudckpt.StateMismatchError, match="num_batches_tracked"):
        cloudckpt.load({"model": norm}, tmp_path / "c")
    cloudckpt.load({"model": norm}, tmp_path / "c", strict=False)
    assert (norm.num_batches_tracked, norm.running_mean.tolist()) == (5, [3, 3])  # type: ignore[union-attr, operator]


class Moving:
    """An object that gives a module other memory when it is restored."""

    def __init__(self, module: nn.Linear) -> None:
        self._module = module

    def state_dict(self) -> dict[str, object]:
        return {"moved": 1}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._module.weight.data = torch.zeros_like(self._module.weight)


def test_a_module_whose_memory_was_replaced_during_the_restore_has_what_was_saved(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    cloudckpt.save({"model": model, "other": Moving(nn.Linear(2, 2))}, tmp_path / "c")
    again = nn.Linear(2, 2)
    cloudckpt.load({"model": again, "other": Moving(again)}, tmp_path / "c")
    assert torch.equal(again.weight, model.weight)


@contextmanager
def _calls_of(*functions: Any) -> Iterator[list[str]]:
    """Note which of PyTorch's own functions are called; they must not be replaced for that."""
    codes = {inspect.unwrap(function).__code__ for function in functions}
    called: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in codes:
            called.append(frame.f_code.co_qualname)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(before)


def test_a_small_plain_module_costs_no_state_dict_of_its_own(tmp_path: Path) -> None:
    layers = [nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)) for _ in range(3)]
    again = [nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)) for _ in range(3)]
    with _calls_of(nn.Module.state_dict, nn.Module.load_state_dict) as called:
        cloudckpt.save({"layers": layers}, tmp_path / "c")
        cloudckpt.load({"layers": again}, tmp_path / "c")
    assert called == []
    assert all(torch.equal(one[0].weight, other[0].weight) for one, other in zip(layers, again, strict=True))


def test_a_plain_module_saved_just_so_is_matched_without_a_look_at_each_of_its_names(tmp_path: Path) -> None:
    cloudckpt.save({"layers": [nn.Linear(1, 1), nn.BatchNorm1d(1)]}, tmp_path / "c")
    with _calls_of(ModuleEntry.takes, Saved.below) as called:
        cloudckpt.load({"layers": [nn.Linear(1, 1), nn.BatchNorm1d(1)]}, tmp_path / "c")
    assert called == []


def _restoration(live: dict[str, Any], saved: dict[str, Any]) -> tuple[object, ...]:
    flat = capture(bind(saved))
    tensors = {name: leaf for name, leaf in flat.leaves.items() if isinstance(leaf, torch.Tensor)}
    said = Saved(
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        values={name: leaf for name, leaf in flat.leaves.items() if name not in tensors},
        paths=flat.paths,
        notes=flat.notes,
    )
    try:
        found = plan_restore(bind(live), said, Allowed(strict=False))
    except cloudckpt.StateMismatchError as exc:
        return (str(exc),)
    filled = {name: tensor.data_ptr() for name, tensor in found.tensors.items() if isinstance(tensor, torch.Tensor)}
    return filled, found.fit, found.unexpected, found.of_modules, found.moved


_tied = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("live", "saved"),
    [
        pytest.param([Various(), nn.Linear(2, 2)], [Various(), nn.Linear(2, 2)], id="just so"),
        pytest.param([nn.Linear(2, 2, bias=False)], [nn.Linear(2, 2)], id="more is saved of one"),
        pytest.param([nn.Linear(2, 2)], [nn.Linear(2, 2, bias=False)], id="less is saved of one"),
        pytest.param([nn.Linear(2, 2)], [nn.Linear(2, 2), nn.Linear(2, 2)], id="more are saved"),
        pytest.param([nn.Linear(2, 2), nn.Linear(2, 2)], [nn.Linear(2, 2)], id="fewer are saved"),
        pytest.param([nn.Linear(2, 2)], [Extra(2, 2)], id="a value was saved beside"),
        pytest.param([nn.Linear(2, 2)], [nn.Linear(2, 3)], id="of another shape"),
        pytest.param([nn.Linear(2, 2)], [nn.Linear(2, 2).double()], id="of another dtype"),
        pytest.param([nn.Linear(2, 2, device="meta")], [nn.Linear(2, 2)], id="without memory"),
        pytest.param([_tied, _tied], [_tied, _tied], id="one module twice"),
        pytest.param([_tied, _tied], [nn.Linear(2, 2), nn.Linear(2, 2)], id="tied here alone"),
        pytest.param({"0": nn.Linear(2, 2)}, [nn.Linear(2, 2)], id="at another path of that name"),
        pytest.param([nn.Linear(2, 2), _tied.weight], [nn.Linear(2, 2), _tied.weight], id="beside a tensor"),
        pytest.param([_tied, _tied.weight.data], [_tied, _tied.weight.data], id="beside a tensor of its own"),
    ],
)
def test_a_module_matched_at_once_is_matched_as_each_of_its_names_would_be(
    live: Any, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = _restoration({"layers": live}, {"layers": saved})
    monkeypatch.setattr("cloudckpt.state.matching._Matching._match_whole", lambda *_: False)
    assert at_once == _restoration({"layers": live}, {"layers": saved})


# -- optimizers --------------------------------------------------------------------------------------------------


def _parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.rand(2, 3)), nn.Parameter(torch.rand(4, dtype=torch.float16))]


def _stepped(make: Any, parameters: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = make(parameters)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.rand_like(parameter)
    optimizer.step(lambda: 1.0)
    return optimizer


def _with_wide_state(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for parameter in parameters:
        optimizer.state[parameter] = {"momentum_buffer": torch.rand(parameter.shape), "step": torch.tensor(2.0)}
    return optimizer


def _with_state(make: Any) -> Any:
    def made(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.state.update(make(parameters))
        return optimizer

    return made


def _with_shared_state(parameters: Any) -> torch.optim.Optimizer:
    optimizer, shared = torch.optim.SGD(parameters, lr=0.1), {"x": torch.rand(1)}
    optimizer.state.update(dict.fromkeys(parameters, shared))
    return optimizer


OPTIMIZERS = {
    "Adam": partial(_stepped, torch.optim.Adam),
    "AdamW with more state": partial(_stepped, partial(torch.optim.AdamW, amsgrad=True)),
    "a learning rate that is a tensor": partial(_stepped, partial(torch.optim.Adam, lr=torch.tensor(0.1))),
    "options with containers": partial(_stepped, partial(torch.optim.Adam, betas=[0.1, 0.2])),
    "no state": partial(torch.optim.SGD, lr=0.1),
    "SGD": partial(_stepped, partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "Adagrad": partial(_stepped, torch.optim.Adagrad),
    "Adafactor": partial(_stepped, torch.optim.Adafactor),
    "LBFGS": lambda parameters: _stepped(torch.optim.LBFGS, parameters[:1]),
    "a schedule": lambda parameters: (
        torch.optim.lr_scheduler.StepLR(_stepped(torch.optim.Adam, parameters), 1).optimizer
    ),
    "state of another dtype": _with_wide_state,
    "groups": lambda parameters: _stepped(torch.optim.Adam, [{"params": [one]} for one in parameters]),
    "no parameters in a group": lambda parameters: torch.optim.SGD([{"params": []}, {"params": parameters}], lr=1),
    "names of its own": lambda parameters: _stepped(torch.optim.Adam, [("a", parameters[0]), ("b", parameters[1])]),
    "state of no parameter": _with_state(lambda _: {"count": torch.tensor(3), 0: 1}),
    "numbers for keys": _with_state(lambda parameters: {parameters[0]: {1: torch.rand(1)}}),
    "keys that are like paths": _with_state(
        lambda parameters: {parameters[0]: {"x.y": torch.rand(1)}, parameters[1]: {"\u00e4": torch.rand(1)}}
    ),
    "state in containers": _with_state(lambda parameters: {parameters[0]: {"x": [torch.rand(1), {"y": None}]}}),
    "state that has a gradient": _with_state(lambda parameters: {parameters[0]: {"x": nn.Parameter(torch.rand(1))}}),
    "state that is nothing": _with_state(lambda parameters: {parameters[0]: {}}),
    "state that is no dict": _with_state(lambda parameters: {parameters[0]: torch.rand(1)}),
    "state that is shared": _with_shared_state,
}


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_plain_optimizer_is_saved_as_if_its_state_dict_were_asked(
    make: Any, monkeypatch: pytest.MonkeyPatch, *, is_named: bool
) -> None:
    parameters = _parameters()
    optimizer = make(parameters)
    state = {"parameters": parameters} if is_named else {}
    state = {**state, "optimizer": optimizer, "more": [make(_parameters())]}
    assert PlainOptimizers().holds(optimizer)
    found = capture(bind(state))
    monkeypatch.setattr(PlainOptimizers, "holds", lambda *_: False)
    _assert_same(found, capture(bind(state)))


def test_a_small_plain_optimizer_costs_no_state_dict_of_its_own() -> None:
    parameters = _parameters()
    state = {"parameters": parameters, "optimizer": _stepped(torch.optim.Adam, parameters)}
    with _calls_of(torch.optim.Optimizer.state_dict) as called:
        capture(bind(state))
    assert called == []


class SayingAdam(torch.optim.Adam):
    pass


def _changed(change: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(_parameters())
    change(optimizer)
    return optimizer


NOT_PLAIN_OPTIMIZERS = {
    "a type of somebody's": lambda: SayingAdam(_parameters()),
    "a method of the instance": lambda: _changed(lambda one: setattr(one, "state_dict", dict)),
    "a hook before": lambda: _changed(lambda one: one.register_state_dict_pre_hook(lambda *_: None)),
    "a hook after": lambda: _changed(lambda one: one.register_state_dict_post_hook(lambda *_: None)),
    "another one in it": lambda: _changed(lambda one: setattr(one, "inner", torch.optim.SGD(_parameters(), lr=1))),
    "state of another type": lambda: _changed(lambda one: setattr(one, "state", OrderedDict())),
}


@pytest.mark.parametrize("make", NOT_PLAIN_OPTIMIZERS.values(), ids=NOT_PLAIN_OPTIMIZERS)
def test_an_optimizer_that_may_say_more_of_itself_is_asked(make: Any) -> None:
    assert not PlainOptimizers().holds(make())


def test_no_optimizer_is_plain_while_pytorchs_own_code_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.optim.Optimizer.state_dict

    @functools.wraps(own)
    def replaced(optimizer: torch.optim.Optimizer) -> Any:
        return own(optimizer)

    monkeypatch.setattr(torch.optim.Optimizer, "state_dict", replaced)
    assert not PlainOptimizers().holds(torch.optim.Adam(_parameters()))


def test_state_of_a_tensor_that_is_no_parameter_is_refused_by_pytorch() -> None:
    parameters = _parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    optimizer.state[torch.rand(1)] = {"x": torch.rand(1)}
    with pytest.raises(KeyError):
        capture(bind({"parameters": parameters, "optimizer": optimizer}))


def test_ties_are_found_between_tensors_of_different_types() -> None:
    weight = nn.Parameter(torch.rand(3))
    leaves = {"a": weight, "b": weight.detach(), "c": weight.detach()[:2], "d": torch.rand(3)}
    assert tied_names(leaves) == {"b": "a"}


# -- the collector -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _collecting() -> Any:
    yield
    gc.enable()


@pytest.mark.parametrize("is_on", [True, False])
def test_the_collector_is_afterwards_as_it_was_before_also_after_an_error(*, is_on: bool) -> None:
    (gc.enable if is_on else gc.disable)()
    seen = []

    def rest() -> None:
        with collector_at_rest(), collector_at_rest():
            seen.append(gc.isenabled())
            with collector_awake():
                seen.append(gc.isenabled())
            seen.append(gc.isenabled())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rest()
    assert seen == [False, is_on, False]
    assert gc.isenabled() == is_on


class Watching:
    """An object that notes whether garbage is collected while it is asked."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def state_dict(self) -> dict[str, object]:
        self.seen.append(gc.isenabled())
        return {"n": 1}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.seen.append(gc.isenabled())


def test_garbage_is_collected_while_objects_of_the_state_are_asked(tmp_path: Path) -> None:
    watching = Watching()
    cloudckpt.save({"it": watching}, tmp_path / "c")
    cloudckpt.load({"it": watching}, tmp_path / "c")
    assert len(watching.seen) >= 3
    assert all(watching.seen)
    assert gc.isenabled()


def _passes_of_a_load(count: int, path: Path) -> int:
    cloudckpt.save({"layers": [nn.Linear(1, 1) for _ in range(count)]}, path / f"{count}", progress="off")
    again = {"layers": [nn.Linear(1, 1) for _ in range(count)]}
    usual = gc.get_threshold()
    gc.collect()
    gc.set_threshold(50, 10**6, 10**6)
    try:
        before = gc.get_stats()[0]["collections"]
        cloudckpt.load(again, path / f"{count}", progress="off")
        return int(gc.get_stats()[0]["collections"]) - before
    finally:
        gc.set_threshold(*usual)


def test_the_collectors_passes_during_a_load_do_not_grow_with_the_state(tmp_path: Path) -> None:
    _passes_of_a_load(2, tmp_path)  # what a first load imports is not what is counted
    few, many = _passes_of_a_load(20, tmp_path), _passes_of_a_load(120, tmp_path)
    assert many - few < 10  # of some 20 new objects for each module


def test_a_list_of_plain_modules_is_named_as_torch_names_each() -> None:
    layers = [Various(), nn.Linear(2, 2)]
    flat = capture(bind({"layers": layers}))
    assert list(flat.leaves) == [f"layers.{n}.{name}" for n, layer in enumerate(layers) for name in layer.state_dict()]
    assert flat.paths["layers.0.first.weight"] == ["layers", 0, "first.weight"]
    assert flat.notes["layers.1"] == {"metadata": {"version": 1}}
    assert flat.notes["layers.0"] == {"metadata": {"version": 3}}
