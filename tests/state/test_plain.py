"""Modules that only PyTorch's own code saves are looked at without it, and nobody can tell the difference."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cloudckpt
from cloudckpt.state import bind, capture, collector_at_rest
from cloudckpt.state.collector import collector_awake
from cloudckpt.state.overlap import tied_names
from cloudckpt.state.plain import PlainModules


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
    "another loading": lambda: nn.BatchNorm1d(1),
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


def test_a_small_plain_module_costs_no_state_dict_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(1, 1) for _ in range(3)]
    again = [nn.Linear(1, 1) for _ in range(3)]
    asked: list[str] = []

    def refuse(*_: Any, **__: Any) -> None:
        asked.append("state_dict")

    monkeypatch.setattr(nn.Module, "state_dict", refuse)
    monkeypatch.setattr(nn.Module, "load_state_dict", refuse)
    cloudckpt.save({"layers": layers}, tmp_path / "c")
    cloudckpt.load({"layers": again}, tmp_path / "c")
    assert asked == []
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(layers, again, strict=True))


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


def test_a_list_of_plain_modules_is_named_as_torch_names_each() -> None:
    layers = [Various(), nn.Linear(2, 2)]
    flat = capture(bind({"layers": layers}))
    assert list(flat.leaves) == [f"layers.{n}.{name}" for n, layer in enumerate(layers) for name in layer.state_dict()]
    assert flat.paths["layers.0.first.weight"] == ["layers", 0, "first.weight"]
    assert flat.notes["layers.1"] == {"metadata": {"version": 1}}
    assert flat.notes["layers.0"] == {"metadata": {"version": 3}}
