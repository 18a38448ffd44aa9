"""A restore of a part of a state takes that part exactly, and leaves all else of it as it is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cloudckpt
from cloudckpt import CheckpointManager, OptionsError, StateMismatchError


class Counting:
    """An object with state that counts how often it was asked, and given one."""

    def __init__(self, count: int) -> None:
        self.count, self.calls = count, 0

    def state_dict(self) -> dict[str, Any]:
        self.calls += 1
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls += 1
        self.count = state["count"]


def new_state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "loaders": {"train": Counting(seed), "eval": Counting(-seed)},
        "step": seed,
        "history": [float(seed)],
    }


def looked_at(state: dict[str, Any]) -> dict[str, Any]:
    moments = [part.clone() for parts in state["optimizer"].state.values() for part in parts.values()]
    return {
        "model": [parameter.detach().clone() for parameter in state["model"].parameters()],
        "optimizer": [*moments, state["optimizer"].param_groups[0]["lr"]],
        "loaders.train": state["loaders"]["train"].count,
        "loaders.eval": state["loaders"]["eval"].count,
        "step": state["step"],
        "history": list(state["history"]),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    ("only", "taken"),
    [
        ("model", ["model"]),
        (["optimizer"], ["optimizer"]),
        (["model", "step"], ["model", "step"]),
        (("loaders",), ["loaders.train", "loaders.eval"]),
        (["loaders.eval", "history"], ["loaders.eval", "history"]),
    ],
    ids=str,
)
def test_what_is_named_is_restored_and_nothing_else_is_touched(tmp_path: Path, only: Any, taken: list[str]) -> None:
    saved, state = new_state(1), new_state(2)
    cloudckpt.save(saved, tmp_path / "c")
    there, before = looked_at(saved), looked_at(state)
    random.seed(7)
    drawing = random.getstate()

    checkpoint = cloudckpt.load(state, tmp_path / "c", only=only)

    after = looked_at(state)
    assert {name: same(after[name], there[name]) for name in after} == {name: name in taken for name in after}
    assert {name: same(after[name], before[name]) for name in after} == {name: name not in taken for name in after}
    assert checkpoint.fit is not None
    assert (checkpoint.fit.missing, checkpoint.fit.unexpected) == ((), ())
    assert random.getstate() == drawing


def test_objects_that_are_not_named_are_not_even_asked(tmp_path: Path) -> None:
    cloudckpt.save(new_state(1), tmp_path / "c")
    state = new_state(2)
    cloudckpt.load(state, tmp_path / "c", only=["model", "loaders.eval"])
    assert state["loaders"]["train"].calls == 0


def test_a_value_of_a_type_that_this_program_lacks_keeps_no_other_part_away(tmp_path: Path) -> None:
    class Mine:
        pass

    cloudckpt.register(Mine, name="test_only.Mine", encode=lambda _: 1, decode=lambda _: Mine())
    cloudckpt.save({"mine": Mine(), "step": 5}, tmp_path / "c")
    cloudckpt.register(Mine, name="test_only.Mine", encode=lambda _: 1, decode=lambda _: 0)  # type: ignore[arg-type, return-value]
    state: dict[str, Any] = {"mine": None, "step": 0}
    cloudckpt.load(state, tmp_path / "c", only="step")
    assert state == {"mine": None, "step": 5}


def test_a_manager_leaves_the_generators_too_and_goes_on_from_that_checkpoint(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, progress="off") as manager:
        manager.save(1, new_state(1))
        state = new_state(2)
        torch.manual_seed(9)
        before = torch.get_rng_state()
        found = manager.restore(state, only="step")
        assert found is not None
        assert state["step"] == 1
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("only", "told"),
    [
        ("modle", r"only names 'modle', .*; near it: model;"),
        (["model", "optimiser"], r"'optimiser', .*near it: optimizer;"),
        ("loaders.evl", r"near it: loaders\.eval;"),
        ("model.weight", r"it holds history, loaders\.eval, loaders\.train, model, optimizer, step; nothing"),
        ([], "only is \\[\\]"),
        ("", "names ''"),
        ([3], "only is \\[3\\]"),
    ],
)
def test_a_name_that_the_state_has_not_is_refused_with_those_that_are_near(
    tmp_path: Path,
    only: Any,
    told: str,
) -> None:
    cloudckpt.save(new_state(1), tmp_path / "c")
    state = new_state(2)
    before = looked_at(state)
    with pytest.raises(OptionsError, match=told):
        cloudckpt.load(state, tmp_path / "c", only=only)
    assert same([*looked_at(state).values()], [*before.values()])


def test_a_part_that_does_not_fit_is_refused_as_ever(tmp_path: Path) -> None:
    cloudckpt.save(new_state(1) | {"model": nn.Linear(3, 3)}, tmp_path / "c")
    with pytest.raises(StateMismatchError, match=r"model\.weight is \(2, 3\) here and \(3, 3\) there"):
        cloudckpt.load(new_state(2), tmp_path / "c", only="model")


def test_a_part_that_the_checkpoint_lacks_is_missing(tmp_path: Path) -> None:
    cloudckpt.save({"step": 1}, tmp_path / "c")
    with pytest.raises(StateMismatchError, match="in the state and not in the checkpoint: model"):
        cloudckpt.load(new_state(2), tmp_path / "c", only="model")


def test_memory_that_what_stays_has_too_is_not_written_into(tmp_path: Path) -> None:
    def shared(seed: int) -> dict[str, Any]:
        model = nn.Linear(3, 2)
        nn.init.constant_(model.weight, seed)
        return {"model": model, "copy": dict(model.state_dict()), "step": seed}

    cloudckpt.save(shared(1), tmp_path / "c")
    state = shared(2)
    with pytest.raises(StateMismatchError, match=r"copy\.weight shares memory with model\.weight, which is not to be"):
        cloudckpt.load(state, tmp_path / "c", only="copy")
    assert torch.equal(state["model"].weight, torch.full((2, 3), 2.0))
    cloudckpt.load(state, tmp_path / "c", only=["model", "copy"])
    assert torch.equal(state["model"].weight, torch.ones(2, 3))
    assert state["step"] == 2
