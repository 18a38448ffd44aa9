"""Laws of the structure benchmark: its shapes have as many parameters as it says, and its goals can be missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import structure
from benchmarks.one_process.structures import (
    SHAPES,
    Found,
    _contents,
    _objects,
    exponent,
    measure_structure,
    ratio,
    summary,
)


def _parameters(state: dict[str, Any]) -> set[int]:
    objects = [each for value in state.values() for each in (value if isinstance(value, list) else [value])]
    modules = [each for each in objects if isinstance(each, nn.Module)]
    return {id(parameter) for module in modules for parameter in module.parameters()}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_has_as_many_parameters_as_asked_for_and_is_restored(shape: str, tmp_path: Path) -> None:
    assert len(_parameters(SHAPES[shape](7))) == 7
    found = measure_structure(shape, 7, tmp_path, 1)
    kinds = ("torch_save_s", "torch_load_s", "save_s", "load_s", "flat_save_s", "flat_load_s")
    assert sorted(found) == sorted((*kinds, "structure_save_s", "structure_load_s"))
    assert min(found[kind] for kind in kinds) > 0


def test_each_optimizer_and_each_group_of_its_shape_has_one_parameter() -> None:
    optimizers: list[torch.optim.Optimizer] = SHAPES["an optimizer per parameter"](3)["optimizers"]
    grouped: torch.optim.Optimizer = SHAPES["a group per parameter"](3)["optimizer"]
    groups = [group["params"] for optimizer in [*optimizers, grouped] for group in optimizer.param_groups]
    assert [len(params) for params in groups] == [1] * 6
    assert all(
        sorted(optimizer.state_dict()["state"][0]) == ["exp_avg", "exp_avg_sq", "step"] for optimizer in optimizers
    )


def test_the_flat_dict_has_all_tensors_and_the_values_of_each_object_as_one() -> None:
    state = SHAPES["an optimizer per parameter"](2)
    found = dict(_contents([each.state_dict() for each in _objects(state)]))
    tensors = [name for name, leaf in found.items() if isinstance(leaf, torch.Tensor)]
    assert len(tensors) == 2 + 2 * 3
    assert [name for name in found if name not in tensors] == ["/1/param_groups", "/2/param_groups"]
    assert found["/1/param_groups"] == state["optimizers"][0].state_dict()["param_groups"]


def _found(save_s: float) -> Found:
    flat = {"flat_save_s": 1.0, "flat_load_s": 1.0}
    return summary([{"torch_save_s": 0.5, "torch_load_s": 0.5, "save_s": save_s, "load_s": save_s, **flat}])


def test_the_cost_of_structure_is_what_goes_beyond_a_flat_dict_in_units_of_torch() -> None:
    assert ratio(_found(save_s=2.5), "save") == 3.0
    assert ratio(_found(save_s=0.5), "save") == 0.0


def test_runs_of_a_machine_that_was_busy_meanwhile_do_not_change_the_cost_of_structure() -> None:
    run = {"torch_save_s": 0.5, "torch_load_s": 0.5, "save_s": 1.5, "load_s": 1.5, "flat_save_s": 1.0, "flat_load_s": 1}
    before = {**run, "flat_save_s": 0.8, "save_s": 1.3}  # a moment of rest, for one pair alone
    spoilt = {**run, "save_s": 9.0}
    assert ratio(summary([run, before, run, spoilt]), "save") == pytest.approx(1.0)


def test_no_run_is_begun_after_enough_time_but_the_first(tmp_path: Path) -> None:
    measure_structure("one module", 2, tmp_path, runs=10**6, enough_s=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def _spin(*_: object) -> Found:
    while True:
        pass


def test_one_run_that_takes_too_long_is_ended_and_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "measure_structure", _spin)
    words = ["--shapes", "one module", "--counts", "3", "--limit-s", "0.1", "--directory", str(tmp_path)]
    assert structure.main([*words, "--check-goals"]) == 3
    assert "| one module | 3 | took too long |" in capsys.readouterr().out


@pytest.mark.parametrize("count", [10, 100])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_the_exponent_is_the_power_by_which_seconds_grow(power: float, count: int) -> None:
    assert exponent((1, count), (3.0, 3.0 * count**power)) == pytest.approx(power)


def test_a_goal_is_missed_by_a_ratio_by_growth_and_by_what_took_too_long() -> None:
    good = {10: _found(0.55), 100: _found(1.0)}
    dear = {10: _found(0.7), 100: _found(2.5)}
    steep = {10: _found(0.51), 100: _found(1.5)}
    late = {10: _found(0.1)}
    results = {"good": good, "dear": dear, "steep": steep, "late": late}
    assert structure.misses(results, [10, 100]) == [
        "dear: save of 100 takes 3.0 × torch's own",
        "dear: load of 100 takes 3.0 × torch's own",
        "steep: save grows as n^2.00 from 10 to 100",
        "steep: load grows as n^2.00 from 10 to 100",
        "late: took too long",
        "late: took too long",
    ]
    assert "took too long" in structure.table(results, [10, 100])


def test_the_command_line_prints_a_row_for_each_shape_and_count(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--shapes", "one module", "--counts", "3,5", "--runs", "1", "--directory", str(tmp_path)]
    assert structure.main(words) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| one module")]
    assert [row.split(" | ")[1] for row in rows] == ["3", "5"]
