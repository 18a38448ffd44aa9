"""What a manager is told: plain meanings are taken, wrong ones refused before anything is read, written or changed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import (
    CheckpointExistsError,
    CheckpointManager,
    CheckpointNotFoundError,
    FencedError,
    KeepLast,
    OptionsError,
    StorageError,
)
from tests.ranks.processes import run
from tests.store.gates import Failure, Gate

HOWS = pytest.mark.parametrize("how", ["save", "async_save"])


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((100,), float(step))}


def save(manager: CheckpointManager, how: str, step: int, **options: Any) -> Any:
    """Save either way; return the checkpoint."""
    made = getattr(manager, how)(step, state_of(step), **options)
    return made if how == "save" else made.result()


# -- making one ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "retention",
    [1, KeepLast(1), [KeepLast(1)], lambda checkpoints: checkpoints[-1:]],
    ids=["number", "rule", "rules", "function"],
)
def test_what_stays_may_be_said_in_any_plain_way(tmp_path: Path, retention: Any) -> None:
    with CheckpointManager(tmp_path, retention=retention, prune_grace_s=0) as manager:
        for step in range(3):
            manager.save(step, state_of(step))
        assert manager.all_steps() == [2]


def test_options_may_be_a_mapping(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, options={"concurrency": 2, "retry": {"max_attempts": 3}}) as manager:
        chosen = manager._saves.options
        assert (chosen.concurrency, chosen.retry.max_attempts) == (2, 3)
    with CheckpointManager(tmp_path, options={}) as manager:
        assert manager._saves.options == cloudckpt.Options()


@pytest.mark.parametrize(("given", "is_heeded"), [(True, True), ("auto", True), (False, False), (None, False)])
def test_preemption_is_heeded_by_what_is_said(tmp_path: Path, given: Any, is_heeded: bool) -> None:
    with CheckpointManager(tmp_path, preemption=given) as manager:
        assert (manager._preemption is not None) == is_heeded


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"retention": True}, "retention holds True, which is no rule"),
        ({"retention": "last"}, "retention holds 'last', which is no rule"),
        ({"retention": 0}, "retention is 0; give a whole number from 1"),
        ({"options": {"concurency": 2}}, "options have no 'concurency'; there are .*concurrency"),
        ({"options": {"retry": {"attempts": 2}}}, "options have no 'attempts'; there are max_attempts"),
        ({"options": {"concurrency": "2"}}, "concurrency is '2'; give a whole number"),
        ({"options": [1]}, r"options is \[1\]; give cloudckpt.Options"),
        ({"preemption": "yes"}, "preemption is 'yes'; give True, False, 'auto' or a cloudckpt.Preemption"),
        ({"preemption": 30}, "preemption is 30; give"),
        ({"prune_grace_s": "60"}, "prune_grace_s is '60'; give a number of seconds from 0"),
        ({"prune_grace_s": float("nan")}, "prune_grace_s is nan"),
        ({"storage_options": "anon"}, "storage_options is a str; give a dict"),
        ({"progress": "loud"}, "progress is 'loud'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_arguments_are_named_with_what_to_give(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    root = tmp_path / "root"
    with pytest.raises(OptionsError, match=words):
        CheckpointManager(root, **arguments)
    assert not root.exists()


# -- saving --------------------------------------------------------------------------------------------------


@HOWS
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda ask: ask({"w": torch.ones(2)}, 5),
            r"the state stands where the step belongs; call save\(step, state\)",
        ),
        (lambda ask: ask(5, 7), "state is a int; give a non-empty dict"),
        (lambda ask: ask(5, state_of(5), 0.3), "metrics is 0.3; give a dict of names"),
        (lambda ask: ask(5, state_of(5), {"loss": "low"}), "metric 'loss' is the text 'low'; give a number"),
        (lambda ask: ask(5, state_of(5), None, "run"), "metadata is 'run'; give a dict of names"),
        (lambda ask: ask(5, state_of(5), None, {1: 2}), "metadata key 1 is not a string"),
        (
            lambda ask: ask(5, state_of(5), None, {"log": "x" * (5 << 20)}),
            "metrics and metadata have .* bytes, more than",
        ),
        (lambda ask: ask(5, state_of(5), exists="again"), "exists is 'again'; give 'raise' or 'skip' or 'replace'"),
    ],
    ids=["swapped", "no state", "metrics", "metric", "metadata", "metadata key", "large metadata", "exists"],
)
def test_a_call_that_is_wrong_is_refused_before_anything_is_written(
    tmp_path: Path, how: str, call: Callable[[Any], object], words: str
) -> None:
    root = tmp_path / "root"
    with CheckpointManager(root) as manager, pytest.raises(OptionsError, match=words):
        call(getattr(manager, how))
    assert not root.exists()


def test_a_state_where_the_step_belongs_is_not_printed_whole() -> None:
    with pytest.raises(OptionsError) as caught:
        cloudckpt.format.step_number({"w": list(range(100_000))})
    assert len(str(caught.value)) < 400


@HOWS
def test_a_last_save_of_the_step_that_an_interval_has_saved_may_be_skipped(tmp_path: Path, how: str) -> None:
    with CheckpointManager(tmp_path) as manager:
        save(manager, how, 1)
        first = save(manager, how, 2)
        before = sorted(tmp_path.rglob("*"))
        assert save(manager, how, 2, exists="skip") == first
        assert sorted(tmp_path.rglob("*")) == before
        with pytest.raises(CheckpointExistsError):
            save(manager, how, 2)
        assert save(manager, how, 3, exists="skip").step == 3, "nothing is there yet"


def test_a_last_save_waits_for_the_one_of_its_step_and_saves_anew_if_that_fails(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        with Gate(manager) as gate:
            handle = manager.async_save(4, state_of(4))
            gate.await_request()
            timer = threading.Timer(0.1, gate.open)
            timer.start()
            assert manager.save(4, state_of(4), exists="skip") == handle.result()
        failure = Failure(manager, StorageError("the disk is full", op="put", key="k"))
        failed = manager.async_save(5, state_of(5))
        with pytest.raises(StorageError):
            failed.result()
        failure.is_on = False
        assert manager.save(5, state_of(5), exists="skip").step == 5


def skip_on_all_ranks(url: str) -> tuple[bool, list[int]]:
    with CheckpointManager(url) as manager:
        first = manager.save(3, state_of(3))
        again = manager.async_save(3, state_of(3), exists="skip").result()
        return first == again, manager.all_steps()


def test_all_ranks_skip_the_same_save(tmp_path: Path) -> None:
    assert run(2, skip_on_all_ranks, str(tmp_path)) == [(True, [3])] * 2


# -- steps that are there, and that go -----------------------------------------------------------------------


def test_steps_are_told_as_numbers(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        assert (manager.all_steps(), manager.latest_step()) == ([], None)
        for step in (5, 7, 30):
            manager.save(step, state_of(step))
        assert (manager.all_steps(), manager.latest_step()) == ([5, 7, 30], 30)
    with CheckpointManager(tmp_path) as other:
        other.restore(state_of(0), 5)
        other.save(7, state_of(7))
        assert (other.all_steps(), other.latest_step()) == ([5, 7, 30], 7)


def test_a_deleted_step_is_gone_at_once_and_its_shards_after_the_grace_time(tmp_path: Path) -> None:
    now_s = [0.0]
    with CheckpointManager(tmp_path, prune_grace_s=60, clock=lambda: now_s[0]) as manager:
        for step in (1, 2, 3):
            manager.save(step, state_of(step))
        manager.delete(2)
        assert manager.all_steps() == [1, 3]
        assert list(tmp_path.glob("step-0000000002-*/*/*.safetensors")), "a reader may be in the middle of it"
        with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint of step 2"):
            manager.delete(2)
        now_s[0] = 61.0
        manager.save(4, state_of(4))
        manager._saves.homes[0].pruner.settle()
        assert not list(tmp_path.glob("step-0000000002-*/**/*.safetensors"))
        assert manager.all_steps() == [1, 3, 4]


@HOWS
def test_a_deleted_step_may_be_saved_again_and_is_not_taken_for_saved(tmp_path: Path, how: str) -> None:
    with CheckpointManager(tmp_path, prune_grace_s=0) as manager:
        first = save(manager, how, 2)
        manager.delete(2)
        assert manager.latest_step() is None
        again = save(manager, how, 2, exists="skip")
        assert again.attempt != first.attempt
        state = {"w": torch.zeros(100)}
        assert manager.restore(state) == again
        assert torch.equal(state["w"], torch.full((100,), 2.0))


def test_a_job_that_was_replaced_deletes_nothing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as old:
        old.save(1, state_of(1))
        with CheckpointManager(tmp_path) as new:
            new.save(2, state_of(2))
            with pytest.raises(FencedError):
                old.delete(1)
            assert new.all_steps() == [1, 2]


def delete_on_all_ranks(url: str) -> None:
    with CheckpointManager(url) as manager:
        for step in (1, 2):
            manager.save(step, state_of(step))
        manager.delete(1)
        manager.save(3, state_of(3))


def test_ranks_delete_a_step_together(tmp_path: Path) -> None:
    run(2, delete_on_all_ranks, str(tmp_path))
    assert CheckpointManager(tmp_path).all_steps() == [2, 3]


# -- what a manager returns ----------------------------------------------------------------------------------


def test_checkpoints_can_stand_in_sets(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state_of(1), metrics={"loss": 1.0}, metadata={"tags": ["a"]})
        manager.save(2, state_of(2))
        assert set(manager.checkpoints()) - {manager.latest()} == {manager.checkpoints()[0]}


# -- the environment -----------------------------------------------------------------------------------------


def test_storage_options_of_the_environment_serve_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDCKPT_STORAGE_OPTIONS", '{"key": "k", "secret": "canary-1", "endpoint_url": "https://h:1"}')
    with pytest.raises(OptionsError, match="no_such_option"):
        CheckpointManager("s3://bucket/x", storage_options={"no_such_option": 1})
    assert "https://h:1" in _endpoint(CheckpointManager("s3://bucket/x"))
    given = {"key": "k", "secret": "s", "endpoint_url": "https://other:1"}
    assert "https://other:1" in _endpoint(CheckpointManager("s3://bucket/x", storage_options=given))


def _endpoint(manager: CheckpointManager) -> str:
    return str(vars(manager._store.inner))


def test_storage_options_of_the_environment_are_none_of_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDCKPT_STORAGE_OPTIONS", '{"key": "k"}')
    with CheckpointManager(tmp_path) as manager:
        assert manager.save(1, state_of(1)).step == 1


@pytest.mark.parametrize("text", ["canary-secret", "[1]", '"canary-secret"'])
def test_storage_options_of_the_environment_that_are_none_are_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("CLOUDCKPT_STORAGE_OPTIONS", text)
    with pytest.raises(OptionsError, match="CLOUDCKPT_STORAGE_OPTIONS in the environment is no JSON object") as caught:
        cloudckpt.load(state_of(0), "s3://bucket/x")
    assert "canary" not in str(caught.value)


def test_a_skip_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointManager(tmp_path) as manager, caplog.at_level(logging.INFO):
        manager.save(1, state_of(1))
        manager.save(1, state_of(1), exists="skip")
    assert "step 1 is saved already" in caplog.text
