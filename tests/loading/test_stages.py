"""Ranks that each have a part of a model, by names of its own, restore what they saved, and miss nothing of others'."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch import nn

import cloudckpt
from cloudckpt import StateMismatchError
from tests.ranks.processes import run


def stage(number: int, value: float) -> nn.Module:
    made = nn.ModuleDict({f"layer{number}": nn.Linear(2, 2), f"norm{number}": nn.BatchNorm1d(2)})
    for tensor in made.state_dict().values():
        tensor.fill_(value + number)
    return made


def saved_and_restored(url: Path) -> list[str]:
    rank = dist.get_rank()
    cloudckpt.save({"model": stage(rank, 5.0), **({"head": stage(9, 1.0)} if rank else {}), "n": 3}, url)
    model = stage(rank, 0.0)
    state: dict[str, object] = {"model": model, **({"head": stage(9, 0.0)} if rank else {}), "n": 0}
    cloudckpt.load(state, url)
    problems = [name for name, tensor in model.state_dict().items() if not bool((tensor == 5 + rank).all())]
    problems += [] if state["n"] == 3 else ["n"]
    if not rank:
        try:
            cloudckpt.load({"model": model}, url)
        except StateMismatchError as exc:
            if exc.unexpected != ("n",):
                problems.append(f"unexpected beside a stage: {exc.unexpected}")
        else:
            problems.append("a value that one rank lacks was left out in silence")
    else:
        try:
            cloudckpt.load(state, url)
        except StateMismatchError:
            pass
        else:
            problems.append("rank 1 did not hear of what rank 0 lacks")
    try:
        cloudckpt.load({"model": stage(0, 0.0), "n": 0}, url)
    except StateMismatchError as exc:
        if set(exc.unexpected) != {"head", *(f"model.{name}" for name in stage(1, 0.0).state_dict())}:
            problems.append(f"unexpected: {exc.unexpected}")
    else:
        problems.append("a stage that no rank has was left out in silence")
    return problems


def test_a_name_is_unexpected_only_if_no_rank_has_it(tmp_path: Path) -> None:
    assert run(2, saved_and_restored, tmp_path / "c") == [[], []]
