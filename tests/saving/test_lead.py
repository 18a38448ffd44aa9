"""What one save leaves for the next: a plan that is used again, and nothing of one that failed; and how it waits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import Options, RankLostError, SaveFailedError
from cloudckpt.ranks.group import Group
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.destination import own_url
from cloudckpt.saving.lead import PlanMemory, Session, begin_save
from cloudckpt.state.capture import captured
from cloudckpt.store import open_store
from tests.ranks.processes import run


class LosingGroup(Group):
    """Loses a rank while the plan is handed out."""

    def deal(self, phase: str, mine: Callable[[], Any], decide: Callable[[list[Any]], Sequence[Any]]) -> Any:
        super().deal(phase, mine, decide)
        raise RankLostError("rank 1 is gone", ranks=[1])


def _save(state: dict[str, Any], url: Path, group: Group, memory: PlanMemory) -> None:
    store = open_store(str(url))
    try:
        destination = own_url(Catalog(store), is_single_writer=False)
        with Session.of(group, "save", Options()) as session:
            pending = begin_save(session, captured(state), destination, memory=memory)
        pending.finish()
    finally:
        store.close()


def test_a_plan_that_was_lost_on_the_way_leaves_nothing_to_a_later_save_of_the_structure_before(tmp_path: Path) -> None:
    memory = PlanMemory()
    _save({"a": torch.ones(3)}, tmp_path / "1", Group(), memory)
    with pytest.raises(SaveFailedError, match="rank 1 is gone"):
        _save({"b": torch.ones(4)}, tmp_path / "2", LosingGroup(), memory)

    _save({"a": torch.full((3,), 7.0)}, tmp_path / "3", Group(), memory)

    assert torch.equal(cloudckpt.read(tmp_path / "3")["a"], torch.full((3,), 7.0))  # type: ignore[arg-type]
    assert not (tmp_path / "2" / "manifest.json").exists()


def _saves_of_which_the_second_fails(root: str) -> None:
    memory = PlanMemory()
    _save({"a": torch.ones(3)}, Path(root, "1"), Group.of_world(), memory)
    memory.tensors = frozenset({"of another world"})
    with pytest.raises(SaveFailedError, match="of another world"):
        _save({"a": torch.ones(3)}, Path(root, "2"), Group.of_world(), memory)

    _save({"a": torch.full((3,), 7.0)}, Path(root, "3"), Group.of_world(), memory)


def test_a_save_that_failed_leaves_no_plan_to_the_next(tmp_path: Path) -> None:
    run(2, _saves_of_which_the_second_fails, str(tmp_path))

    assert torch.equal(cloudckpt.read(tmp_path / "3")["a"], torch.full((3,), 7.0))  # type: ignore[arg-type]


def _collecting_while_waiting(url: str) -> list[tuple[str, bool]]:
    seen = []
    own = Group.agree, Group.deal

    def agree(group: Group, phase: str, *calls: Any) -> Any:
        seen.append((phase, gc.isenabled()))
        return own[0](group, phase, *calls)

    def deal(group: Group, phase: str, *calls: Any) -> Any:
        seen.append((phase, gc.isenabled()))
        return own[1](group, phase, *calls)

    Group.agree, Group.deal = agree, deal  # type: ignore[method-assign, assignment]
    cloudckpt.save({"a": torch.ones(3)}, url)
    return seen


def test_garbage_is_collected_while_ranks_of_a_save_wait_for_each_other(tmp_path: Path) -> None:
    for seen in run(2, _collecting_while_waiting, str(tmp_path / "c")):
        assert {"save: opening", "save: plan"} <= {phase for phase, _ in seen}
        assert [phase for phase, is_collected in seen if not is_collected] == []
