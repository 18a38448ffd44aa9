"""Turn a shape of state and a count of parameters into seconds: ours, torch's own, and those of the same bytes alone.

    build ──▶ torch: state_dict, load_state_dict      what the objects themselves ask for
          ──▶ ours: save, load on a local disk
          ──▶ ours: the same contents in one flat dict what bytes, index and commit cost: no part of the structure

Contents are the tensors, and the values of each object (an optimizer's groups, say) as one. Tensors have one element
each, so that structure is all there is. Seconds are processor time; each is the least of some runs. What the structure
adds is the median of what each run found, a state and its flat dict one right after the other: on a busy machine the
same work takes half as long again for minutes (caches are shared), and both of a pair do.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cloudckpt

__all__ = ["SHAPES", "Found", "added_s", "exponent", "measure_structure", "ratio", "summary"]

_WAYS = ("save", "load")

Found = dict[str, float]
"""What was done → seconds."""
State = dict[str, Any]


def _linears(count: int) -> list[nn.Module]:
    return [nn.Linear(1, 1, bias=False) for _ in range(count)]


def _stepped(groups: Any) -> torch.optim.Optimizer:
    """Return an optimizer with the state that a first step makes, without the step."""
    optimizer = torch.optim.Adam(groups, foreach=False)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {"exp_avg": torch.rand_like(parameter), "exp_avg_sq": torch.rand_like(parameter)}
            optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    return optimizer


def _optimizer_per_parameter(count: int) -> State:
    model = nn.Sequential(*_linears(count))
    return {"model": model, "optimizers": [_stepped([parameter]) for parameter in model.parameters()]}


def _group_per_parameter(count: int) -> State:
    model = nn.Sequential(*_linears(count))
    return {"model": model, "optimizer": _stepped([{"params": [parameter]} for parameter in model.parameters()])}


def _list_of_modules(count: int) -> State:
    return {"layers": _linears(count)}


def _one_module(count: int) -> State:
    return {"model": nn.ParameterList(torch.rand(1) for _ in range(count))}


SHAPES: Mapping[str, Callable[[int], State]] = {
    "an optimizer per parameter": _optimizer_per_parameter,
    "a group per parameter": _group_per_parameter,
    "a list of modules": _list_of_modules,
    "one module": _one_module,
}


def measure_structure(shape: str, count: int, directory: Path, runs: int, enough_s: float = math.inf) -> Found:
    """Save and load `count` parameters in one shape, by torch, by us, and flat by us.

    Args:
        shape: of `SHAPES`.
        count: parameters.
        directory: where checkpoints may lie.
        runs: how many, if they are not enough before.
        enough_s: processor seconds after which no other run is begun: torch's own loads may be quadratic.
    """
    if count > 2:  # what a first save and load import is not what is measured
        measure_structure(shape, 2, directory / "first", 1)
    state, other = SHAPES[shape](count), SHAPES[shape](count)
    found: list[Found] = []
    while len(found) < runs and (not found or time.process_time() < enough_s):
        found.append(_measured_once(state, other, directory / f"{len(found)}"))
    return summary(found)


def summary(found: Sequence[Found]) -> Found:
    """Return the least seconds of some runs, and the median of what the structure took in each."""
    least = {name: min(run[name] for run in found) for name in found[0]}
    added = {f"structure_{what}_s": statistics.median(_structure_s(run, what) for run in found) for what in _WAYS}
    return {**least, **added}


def _structure_s(run: Found, what: str) -> float:
    return run[f"{what}_s"] - run[f"flat_{what}_s"]


def _measured_once(state: State, other: State, url: Path) -> Found:
    found: Found = {}
    saved = _timed(found, "torch_save_s", lambda: [each.state_dict() for each in _objects(state)])
    _timed(found, "torch_load_s", lambda: _load_all(_objects(other), saved))
    flat = {"flat": dict(_contents(saved))}
    into = {"flat": dict(_contents([each.state_dict() for each in _objects(other)]))}
    _timed(found, "save_s", lambda: cloudckpt.save(state, url / "state", progress="off"))
    _timed(found, "flat_save_s", lambda: cloudckpt.save(flat, url / "flat", progress="off"))
    _timed(found, "load_s", lambda: cloudckpt.load(other, url / "state", progress="off"))
    _timed(found, "flat_load_s", lambda: cloudckpt.load(into, url / "flat", progress="off"))
    return found


def _timed(found: Found, name: str, call: Callable[[], Any]) -> Any:
    # What is there already is kept out of the collector's passes: one over all of torch takes 0.2 s, at some counts.
    gc.collect()
    gc.freeze()
    began_s = time.process_time()
    result = call()
    found[name] = max(1e-6, time.process_time() - began_s)  # of a few parameters this clock may see nothing
    return result


def _objects(state: State) -> list[Any]:
    return [each for value in state.values() for each in (value if isinstance(value, list) else [value])]


def _load_all(objects: list[Any], states: list[Any]) -> None:
    for each, state in zip(objects, states, strict=True):
        each.load_state_dict(state)


def _contents(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return the tensors in a state by name, and each container without any as one value, as a save has them."""
    if not isinstance(value, dict | list):
        return [(name, value)]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = [each for key, child in inner for each in _contents(child, f"{name}/{key}")]
    return found if any(isinstance(leaf, torch.Tensor) for _, leaf in found) else [(name, value)]


def ratio(found: Found, what: str) -> float:
    """Return what the structure costs us, in units of torch's own `state_dict` (or `load_state_dict`)."""
    return max(0.0, found[f"structure_{what}_s"]) / found[f"torch_{what}_s"]


def added_s(found: Found, what: str) -> float:
    """Return what we take beyond torch's own `state_dict` (or `load_state_dict`), which may itself be quadratic."""
    return max(1e-9, found[f"{what}_s"] - found[f"torch_{what}_s"])


def exponent(counts: tuple[int, int], seconds: tuple[float, float]) -> float:
    """Return by which power of the count the seconds grew: 1 is linear, 2 quadratic."""
    return math.log(seconds[1] / seconds[0]) / math.log(counts[1] / counts[0])
