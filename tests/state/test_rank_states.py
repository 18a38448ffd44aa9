"""What ranks have in other orders, in parts or for themselves comes back exactly, or is refused on all of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import cloudckpt
from cloudckpt import CloudCkptError, CloudReader, CloudWriter, PerRank, StateMismatchError
from tests.ranks.processes import run

State = dict[str, Any]


def flattened(value: float) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Linear(3, 3)
        for parameter in model.parameters():
            parameter.data.fill_(value)
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def in_my_order(state: State) -> State:
    return dict(reversed(state.items())) if dist.get_rank() else state


def values_of(model: nn.Module) -> set[float]:
    return {number for parameter in model.parameters() for number in parameter.detach().flatten().tolist()}


def two_orders(url: Path) -> list[str]:
    cloudckpt.save(in_my_order({"model": flattened(1.0), "ema": flattened(2.0)}), url)
    model, ema = flattened(0.0), flattened(0.0)
    cloudckpt.load(in_my_order({"model": model, "ema": ema}), url)
    return [] if (values_of(model), values_of(ema)) == ({1.0}, {2.0}) else [f"{values_of(model)} {values_of(ema)}"]


def test_modules_whose_ranks_talk_are_not_mixed_up_by_another_order_of_keys(tmp_path: Path) -> None:
    assert run(2, two_orders, tmp_path / "c") == [[], []]


class Holding:
    """Has some tensors, and may refuse."""

    def __init__(self, values: list[float], *, is_willing: bool = True) -> None:
        self.values, self.is_willing = [torch.tensor([value]) for value in values], is_willing

    def state_dict(self) -> State:
        return {"values": self.values}

    def load_state_dict(self, state: State) -> None:
        if not self.is_willing:
            raise ValueError("no")
        self.values = state["values"]


def refused(call: Any) -> str:
    try:
        call()
    except CloudCkptError as exc:
        return f"{type(exc).__name__}: {exc}"
    return "nothing was refused"


def other_parts(url: Path) -> list[str]:
    rank = dist.get_rank()
    model = nn.Linear(1, 1)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    optimizer = torch.optim.Adam(model.parameters())
    model.weight.grad = torch.ones(1, 1)
    model.bias.grad = torch.ones(1) if rank else None
    optimizer.step()
    return [
        refused(lambda: cloudckpt.save({"o": Holding([1.0] * (2 + rank))}, url)),
        refused(lambda: cloudckpt.save({"m": nn.Identity(), "opt": optimizer}, url)),
    ]


def test_parts_of_one_object_on_several_ranks_are_not_taken_for_one_state(tmp_path: Path) -> None:
    for found in run(2, other_parts, tmp_path / "c"):
        assert all(text.startswith("SaveFailedError: the ranks hold different states") for text in found), found
        assert "'o: its names' differs between rank 0 and rank 1" in found[0]


def own_state(url: Path) -> list[str]:
    rank = dist.get_rank()
    cloudckpt.save({"m": nn.Linear(1, 1), "p": PerRank(Holding([1.0 + rank])), "n": 1}, url)
    live = Holding([0.0], is_willing=not rank)
    model = nn.Linear(1, 1)
    before = model.weight.clone()
    state: State = {"m": model, "p": PerRank(live), "n": 0}
    problems = [refused(lambda: cloudckpt.load(state, url))]
    if live.values[0].item() or state["n"] or not torch.equal(model.weight, before):
        problems.append("something was changed")
    return problems


def test_what_is_each_ranks_own_is_asked_before_anything_changes_on_any_rank(tmp_path: Path) -> None:
    for found in run(2, own_state, tmp_path / "c"):
        assert len(found) == 1, found
        assert found[0].startswith("StateMismatchError: p refuses the state that was saved: ValueError: no")


def lacking(url: Path) -> list[str]:
    rank = dist.get_rank()
    cloudckpt.save({"m": nn.Identity(), "o": Holding([1.0]), "p": PerRank(Holding([2.0])), "k": 3}, url)
    problems = []
    for name in ("o", "p", "k"):
        state: State = {"m": nn.Identity(), "o": Holding([0.0]), "p": PerRank(Holding([0.0])), "k": 0}
        if rank:
            del state[name]
        try:
            cloudckpt.load(state, url)
        except StateMismatchError as exc:
            problems += [] if exc.unexpected == (name,) else [f"{name}: {exc}"]
        else:
            problems.append(f"{name} is missed in silence")
        fit = cloudckpt.load(state, url, strict=False).fit
        if fit is None or fit.unexpected != ((name,) if rank else ()):
            problems.append(f"{name}: {fit}")
    return problems


def test_what_one_rank_lacks_is_refused_on_all_or_named_on_that_one(tmp_path: Path) -> None:
    assert run(2, lacking, tmp_path / "c") == [[], []]


def saved_by_one(url: Path) -> list[str]:
    rank = dist.get_rank()
    cloudckpt.save({"k": 1, **({} if rank else {"p": PerRank(Holding([1.0]))})}, url)
    live = Holding([0.0])
    strict = refused(lambda: cloudckpt.load({"k": 0, "p": PerRank(live)}, url))
    fit = cloudckpt.load({"k": 0, "p": PerRank(live)}, url, strict=False).fit
    return [strict, "" if fit is None else ",".join(fit.missing), str(live.values[0].item())]


def test_what_a_rank_never_saved_for_itself_is_missed_before_anything_changes(tmp_path: Path) -> None:
    first, second = run(2, saved_by_one, tmp_path / "c")
    assert "in the state and not in the checkpoint: p" in second[0]
    assert (first[1:], second[1:]) == (["", "1.0"], ["p", "0.0"])


def idle(url: Path) -> list[float]:
    dcp.save({"t": torch.ones(2)}, storage_writer=CloudWriter(url))
    state = {"t": torch.zeros(2)}
    dcp.load(state, storage_reader=CloudReader(url))
    return state["t"].tolist()  # type: ignore[no-any-return]


def test_a_rank_that_has_nothing_to_write_under_dcp_does_not_fail_the_save(tmp_path: Path) -> None:
    assert run(2, idle, tmp_path / "c") == [[1.0, 1.0], [1.0, 1.0]]


def other_kinds(url: Path) -> str:
    model = nn.Linear(1, 1)
    return refused(lambda: cloudckpt.save({"a": model if dist.get_rank() else model.state_dict()}, url))


def test_a_module_here_and_a_dict_there_are_refused_by_name(tmp_path: Path) -> None:
    for text in run(2, other_kinds, tmp_path / "c"):
        assert text.startswith("SaveFailedError: the ranks hold different containers")
        assert "'a.weight' is" in text
