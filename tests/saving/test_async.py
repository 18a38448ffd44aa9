"""An async save holds the state of its call, one at a time, and what became of it is told once."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    CloudCkptError,
    KeepLast,
    Options,
    OptionsError,
    SaveFailedError,
)
from cloudckpt.errors import EarlierSaveFailedError, StorageError
from cloudckpt.options import KIB
from cloudckpt.saving import SaveHandle
from tests.store.gates import Failure, Gate, anything, is_shard, slow, wait_for

SMALL = Options(shard_bytes=16 * KIB, block_bytes=4 * KIB, span_bytes=16 * KIB)


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((100,), float(step)), "config": {"step": step}}


def refused() -> StorageError:
    return StorageError("the disk is full", op="put", key="k")


def steps_of(manager: CheckpointManager) -> list[int | None]:
    return [checkpoint.step for checkpoint in manager.checkpoints()]


# -- the handle --------------------------------------------------------------------------------------------


def test_a_handle_tells_what_its_save_has_failed_with_and_who_asks_was_told(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        failure = Failure(manager, refused())
        handle = manager.async_save(1, state_of(1))
        assert isinstance(handle.exception(), StorageError)
        failure.is_on = False
        manager.wait()
        done = manager.async_save(2, state_of(2))
        assert done.exception() is None
    with CheckpointManager(tmp_path) as manager, Gate(manager) as gate:
        handle = manager.async_save(3, state_of(3))
        gate.await_request()
        with pytest.raises(TimeoutError, match="step 3 goes on"):
            handle.exception(0.01)
        gate.open()


def test_a_callback_is_called_once_when_its_save_has_ended_or_at_once(tmp_path: Path) -> None:
    called: list[tuple[str, bool]] = []
    with CheckpointManager(tmp_path) as manager, Gate(manager) as gate:
        handle = manager.async_save(1, state_of(1))
        handle.add_done_callback(lambda one: called.append(("first", one.done())))
        handle.add_done_callback(lambda one: called.append(("second", one is handle)))
        gate.await_request()
        assert called == []
        gate.open()
        manager.wait()
        handle.add_done_callback(lambda one: called.append(("late", one.done())))
    assert called == [("first", True), ("second", True), ("late", True)]


def test_a_callback_is_called_of_a_failure_which_it_hides_from_nobody(tmp_path: Path) -> None:
    called: list[int] = []
    manager = CheckpointManager(tmp_path)
    Failure(manager, refused())
    manager.async_save(1, state_of(1)).add_done_callback(lambda handle: called.append(handle.step))
    with pytest.raises(StorageError):
        manager.close()
    assert called == [1]


@pytest.mark.parametrize("call", ["wait", "save", "restore", "close"])
def test_a_callback_that_waits_for_the_manager_is_refused_with_what_to_do(tmp_path: Path, call: str) -> None:
    raised: list[Exception] = []

    def ask(_: SaveHandle) -> None:
        calls = {
            "wait": manager.wait,
            "save": lambda: manager.save(2, state_of(2)),
            "restore": lambda: manager.restore(state_of(0)),
            "close": manager.close,
        }
        try:
            calls[call]()
        except Exception as exc:  # noqa: BLE001 (the test says which)
            raised.append(exc)

    manager = CheckpointManager(tmp_path)
    with Gate(manager) as gate:
        manager.async_save(1, state_of(1)).add_done_callback(ask)
        gate.await_request()
        gate.open()
        manager.wait()
    assert [type(exc) for exc in raised] == [OptionsError]
    assert "begin a thread" in str(raised[0])
    manager.close()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-0000000001-e0001"]


def test_what_a_callback_raises_goes_to_the_log_and_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[int] = []
    with CheckpointManager(tmp_path) as manager:
        handle = manager.async_save(1, state_of(1))
        handle.add_done_callback(lambda _: 1 / 0)
        handle.add_done_callback(lambda one: called.append(one.step))
        assert handle.result() is not None
        manager.wait()
        assert (called, steps_of(manager)) == ([1], [1])
    assert "a callback of the save of step 1 has raised" in caplog.text


def test_a_handle_is_staged_at_once_and_done_when_the_checkpoint_is_committed(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager, Gate(manager) as gate:
        handle = manager.async_save(7, state_of(7), metrics={"loss": 0.5}, metadata={"run": "a"})
        gate.await_request()
        assert (handle.step, handle.staged, handle.done(), handle.is_skipped) == (7, True, False, False)
        assert repr(handle) == "SaveHandle(step=7, under way)"
        with pytest.raises(TimeoutError, match="step 7 goes on"):
            handle.result(0.01)
        with pytest.raises(TimeoutError):
            manager.wait(0.01)
        assert manager.checkpoints() == []
        gate.open()
        checkpoint = handle.result()
        assert checkpoint is not None
        assert checkpoint == manager.latest()
        assert (checkpoint.step, checkpoint.metrics, handle.done()) == (7, {"loss": 0.5}, True)
        assert repr(handle) == "SaveHandle(step=7, committed)"
        assert handle._error is None
        assert handle.result(0.0) is checkpoint


def test_the_training_has_its_memory_back_as_soon_as_async_save_has_returned(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager, Gate(manager) as gate:
        state = {"w": torch.ones(1000), "module": torch.nn.Linear(10, 10)}
        held = [weakref.ref(state["w"]), weakref.ref(state["module"])]
        handle = manager.async_save(1, state)
        gate.await_request()
        del state
        gc.collect()
        assert [ref() for ref in held] == [None, None]
        assert not handle.done()


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager, Gate(manager) as gate:
        first = manager.async_save(1, state_of(1))
        gate.await_request()
        threading.Timer(0.2, gate.open).start()
        second = manager.async_save(2, state_of(2))
        assert first.done()
        assert second.result() == manager.latest()
        assert steps_of(manager) == [1, 2]


@pytest.mark.parametrize("what", ["save", "restore", "wait", "close"])
def test_what_needs_a_quiet_manager_waits_for_the_save_under_way(tmp_path: Path, what: str) -> None:
    with CheckpointManager(tmp_path) as manager, Gate(manager) as gate:
        first = manager.async_save(1, state_of(1))
        gate.await_request()
        threading.Timer(0.2, gate.open).start()
        state = state_of(0)
        acts = {
            "save": lambda: manager.save(2, state),
            "restore": lambda: manager.restore(state),
            "wait": manager.wait,
            "close": manager.close,
        }
        acts[what]()
        assert first.done()
        assert state["config"] == {"step": 1 if what == "restore" else 0}
    assert steps_of(CheckpointManager(tmp_path)) == ([1, 2] if what == "save" else [1])


def test_a_busy_manager_skips_a_save_if_told_to_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointManager(tmp_path) as manager, Gate(manager) as gate, caplog.at_level(logging.INFO):
        first = manager.async_save(1, state_of(1), on_busy="skip")
        gate.await_request()
        skipped = manager.async_save(2, state_of(2), on_busy="skip")
        assert (first.is_skipped, skipped.is_skipped) == (False, True)
        assert (skipped.done(), skipped.staged, skipped.result(), skipped._error) == (True, False, None, None)
        assert repr(skipped) == "SaveHandle(step=2, skipped)"
        assert "step 2 is skipped: another save is under way" in caplog.text
        gate.open()
        first.result()
        assert manager.async_save(3, state_of(3), on_busy="skip").result() is not None
        assert steps_of(manager) == [1, 3]


def test_a_word_that_on_busy_does_not_know_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    root = tmp_path / "root"
    refusal = pytest.raises(OptionsError, match="on_busy is 'drop'; give 'wait' or 'skip'")
    with CheckpointManager(root) as manager, refusal:
        manager.async_save(1, state_of(1), on_busy="drop")  # type: ignore[arg-type]
    assert not root.exists()


def test_a_closed_manager_begins_no_save(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.close()
    with pytest.raises(OptionsError, match="is closed"):
        manager.async_save(1, state_of(1))
    with pytest.raises(OptionsError, match="is closed"):
        manager.prepare(state_of(1))


def test_two_managers_of_one_process_save_at_once(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "a") as one, CheckpointManager(tmp_path / "b") as other:
        with Gate(one) as gate_one, Gate(other) as gate_other:
            handles = [one.async_save(1, state_of(1)), other.async_save(2, state_of(2))]
            gate_one.await_request()
            gate_other.await_request()
        assert [handle.result().step for handle in handles] == [1, 2]  # type: ignore[union-attr]


def test_a_plain_save_goes_on_beside_an_async_one(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "a") as manager, Gate(manager) as gate:
        manager.async_save(1, state_of(1))
        gate.await_request()
        saved = cloudckpt.save(state_of(5), tmp_path / "b")
        assert cloudckpt.read(saved.url)["config"] == {"step": 5}


def test_what_no_rule_keeps_is_pruned_after_an_async_save(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, retention=[KeepLast(2)], prune_grace_s=0) as manager:
        for step in range(5):
            manager.async_save(step, state_of(step))
    assert steps_of(CheckpointManager(tmp_path)) == [3, 4]
    assert not list(tmp_path.glob("step-0000000000-*"))


class Nesting:
    """An object of the user's own that saves while it is being saved."""

    def __init__(self, manager: CheckpointManager, how: str) -> None:
        self.manager = manager
        self.how = how

    def state_dict(self) -> dict[str, Any]:
        getattr(self.manager, self.how)(9, state_of(9))
        return {"x": torch.ones(3)}

    def load_state_dict(self, given: Any) -> None:
        pass


@pytest.mark.parametrize("outer", ["save", "async_save"])
@pytest.mark.parametrize("inner", ["save", "async_save"])
def test_a_save_in_the_middle_of_a_save_is_refused(tmp_path: Path, outer: str, inner: str) -> None:
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(OptionsError, match="in the middle of another save"):
            getattr(manager, outer)(1, {"nesting": Nesting(manager, inner)})
        assert manager.checkpoints() == []
        assert manager.save(2, state_of(2)).step == 2


# -- failures ----------------------------------------------------------------------------------------------


def failed_in_the_background(manager: CheckpointManager) -> None:
    """Have the save of step 1 fail while nobody waits for it; the store is well again then."""
    failure = Failure(manager, refused())
    wait_for(manager.async_save(1, {"w": torch.ones(3)}).done)
    failure.is_on = False
    assert manager._saves.background.is_untold


@pytest.mark.parametrize("ask", ["wait", "close"])
def test_a_failure_that_nobody_waited_for_is_logged_at_once_and_raised_once(
    tmp_path: Path, ask: str, caplog: pytest.LogCaptureFixture
) -> None:
    manager = CheckpointManager(tmp_path)
    failed_in_the_background(manager)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert errors == ["the save of step 1 failed in the background: the disk is full"]
    with pytest.raises(StorageError, match="the disk is full"):
        getattr(manager, ask)()
    manager.wait()
    manager.close()


def test_a_failure_in_the_background_keeps_no_async_save_from_being_made_which_then_tells_of_it_once(
    tmp_path: Path,
) -> None:
    with CheckpointManager(tmp_path) as manager:
        failed_in_the_background(manager)
        with pytest.raises(EarlierSaveFailedError, match=r"step 1 failed .*the disk is full; that of step 2") as caught:
            manager.async_save(2, state_of(2))
        handle = caught.value.handle
        assert isinstance(handle, SaveHandle)
        assert handle.result() == manager.latest()
        assert (caught.value.step, type(caught.value.__cause__)) == (1, StorageError)
        assert manager.async_save(3, state_of(3)).result() == manager.latest()
        assert steps_of(manager) == [2, 3]


def test_a_failure_in_the_background_makes_no_later_save_raise_that_is_committed(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    failed_in_the_background(manager)
    assert manager.save(2, state_of(2)) == manager.latest()
    with pytest.raises(StorageError, match="the disk is full"):
        manager.close()


def test_of_two_failures_in_the_background_each_is_told(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        failed_in_the_background(manager)
        failure = Failure(manager, StorageError("the disk is gone", op="put", key="k"))
        with pytest.raises(EarlierSaveFailedError, match="the disk is full"):
            manager.async_save(2, state_of(2))
        with pytest.raises(StorageError, match="the disk is gone"):
            manager.wait()
        failure.is_on = False
        manager.wait()


# -- what follows a save -----------------------------------------------------------------------------------


def test_a_save_does_not_wait_for_what_is_pruned_after_the_one_before(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, retention=[KeepLast(1)], prune_grace_s=0) as manager:
        manager.save(1, state_of(1))
        with Gate(manager, verb="delete", when=anything) as gate:
            handle = manager.async_save(2, state_of(2))
            gate.await_request()
            assert handle.result(0) is not None, "it is done though its pruning is not"
            assert manager.async_save(3, state_of(3)).result() is not None
            gate.open()
            manager.wait()
        assert steps_of(manager) == [3]


def test_a_failure_that_result_told_is_not_raised_again(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        failure = Failure(manager, refused(), when=lambda key: key.endswith("index.bin"))
        handle = manager.async_save(1, state_of(1))
        for _ in range(2):
            with pytest.raises(StorageError, match="the disk is full"):
                handle.result()
        assert repr(handle) == "SaveHandle(step=1, failed)"
        assert isinstance(handle._error, StorageError)
        manager.wait()
        failure.is_on = False
        assert manager.save(1, state_of(1)).step == 1, "nothing was committed, so the step is free"


def test_an_error_of_another_kind_is_told_as_a_failed_save(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        Failure(manager, RuntimeError("of its own"))
        handle = manager.async_save(1, state_of(1))
        with pytest.raises(SaveFailedError, match=r"nothing was committed: .*of its own"):
            handle.result()


def end_block_with_a_failure(root: Path, error: Exception | None = None) -> None:
    with CheckpointManager(root) as manager:
        Failure(manager, refused())
        manager.async_save(1, state_of(1))
        if error is not None:
            raise error


def test_the_end_of_a_with_block_raises_an_untold_failure_but_not_over_an_exception(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StorageError, match="the disk is full"):
        end_block_with_a_failure(tmp_path)
    with pytest.raises(ZeroDivisionError):
        end_block_with_a_failure(tmp_path, ZeroDivisionError())
    assert "while the manager was closed: the disk is full" in caplog.text


def test_a_value_that_cannot_be_saved_is_refused_by_the_call_itself(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(CloudCkptError, match="odd"):
            manager.async_save(1, {"odd": object(), "w": torch.ones(3)})
        manager.wait()
        assert manager.async_save(1, state_of(1)).result() is not None


def test_an_upload_that_fails_while_staging_waits_for_room_is_raised_by_the_call_and_the_memory_comes_back(
    tmp_path: Path,
) -> None:
    tight = Options(shard_bytes=16 * KIB, block_bytes=4 * KIB, span_bytes=16 * KIB, memory_budget_bytes=32 * KIB)
    state = {f"w{number}": torch.full((4096,), float(number)) for number in range(40)}
    with CheckpointManager(tmp_path, options=tight) as manager:
        failure = Failure(manager, refused())
        held = []
        for _ in range(4):
            with pytest.raises(StorageError, match="the disk is full"):
                manager.async_save(1, state)
            manager.wait()
            wait_for(
                lambda: sum(slab.size_bytes for slab in manager._saves._slabs._idle) == manager._saves._slabs.held_bytes
            )
            held.append(manager._saves._slabs.held_bytes)
        assert max(held) <= 32 * KIB
        failure.is_on = False
        checkpoint = manager.async_save(1, state).result()
        assert checkpoint is not None
        found = cloudckpt.read(checkpoint.url)
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_an_interrupt_of_staging_abandons_the_save_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloudckpt.saving import snapshot

    with CheckpointManager(tmp_path, options=SMALL) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(snapshot, "_copies", interrupted)
            with pytest.raises(KeyboardInterrupt):
                manager.async_save(1, state_of(1))
        manager.wait()
        assert manager.checkpoints() == []
        assert manager.async_save(1, state_of(1)).result() == manager.latest()


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


# -- what it costs -----------------------------------------------------------------------------------------


def test_a_save_whose_thread_cannot_start_fails_at_the_call_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "cloudckpt-save":
            raise RuntimeError("can't start new thread")
        start(thread)

    with CheckpointManager(tmp_path) as manager:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(CloudCkptError, match="a thread could not be started: can't start new thread"):
                manager.async_save(1, state_of(1))
        manager.async_save(2, state_of(2)).result()
        assert steps_of(manager) == [2]


@pytest.mark.parametrize("moment", ["before the thread starts", "when it has started"])
def test_an_interrupt_around_the_start_of_the_thread_leaves_no_save_that_never_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name != "cloudckpt-save":
            start(thread)
            return
        if moment == "when it has started":
            start(thread)
        raise KeyboardInterrupt

    with CheckpointManager(tmp_path) as manager:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                manager.async_save(1, state_of(1))
        manager.wait(timeout=60)
        wait_for(lambda: "cloudckpt-save" not in {thread.name for thread in threading.enumerate()})
        assert manager.async_save(2, state_of(2)).result() is not None
        assert steps_of(manager) == [2]


def test_a_handler_of_the_log_that_raises_does_not_keep_a_save_from_ending(tmp_path: Path) -> None:
    class Raising(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise ValueError("I/O operation on closed file")

    log, handler = logging.getLogger("cloudckpt"), Raising()
    manager = CheckpointManager(tmp_path)
    failure = Failure(manager, refused())
    log.addHandler(handler)
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        handle = manager.async_save(1, state_of(1))
        with pytest.raises(StorageError, match="the disk is full"):
            handle.result(timeout=60)
    finally:
        log.removeHandler(handler)
        threading.excepthook = hook
    failure.is_on = False
    manager.close()


def test_the_report_tells_what_the_saves_cost(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        slow(manager, 0.05)
        for step in range(6):
            assert not manager.should_save(step)
            if step % 2:
                manager.async_save(step, state_of(step)).result()
        costs = manager._journal.meter.costs()
        advice = manager.report(mtbf_s=7200)
    assert costs.saves == 3
    assert costs.blocked_s is not None
    assert costs.commit_s is not None
    assert 0 < costs.blocked_s <= costs.commit_s
    assert costs.commit_s >= 0.05
    assert costs.step_s is not None
    assert costs.step_s > 0
    assert str(advice)


@pytest.mark.parametrize("has_optimizer", [False, True])
def test_a_prepared_manager_allocates_nothing_in_its_first_async_save(tmp_path: Path, has_optimizer: bool) -> None:
    module = torch.nn.Linear(500, 200)
    state: dict[str, Any] = {"module": module}
    if has_optimizer:
        state["optimizer"] = torch.optim.AdamW(module.parameters())
    with CheckpointManager(tmp_path, options=SMALL, save_rng=False) as manager:
        manager.prepare(state)
        if has_optimizer:
            module(torch.ones(2, 500)).sum().backward()
            state["optimizer"].step()
        manager.should_save(0)
        for thread in threading.enumerate():
            if thread.name == "cloudckpt-touch":
                thread.join()
        held_bytes = manager._saves._slabs.held_bytes
        manager.async_save(1, state).result()
        assert manager._saves._slabs.held_bytes == held_bytes
        assert held_bytes >= sum(tensor.nbytes for tensor in module.state_dict().values())


def test_memory_is_used_again_from_save_to_save(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, options=SMALL) as manager:
        held = []
        for step in range(10):
            manager.async_save(step, {"w": torch.full((10_000,), float(step))}).result()
            held.append(manager._saves._slabs.held_bytes)
        assert held == [held[0]] * 10


def test_close_lets_go_of_the_memory(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    with Gate(manager, when=anything) as gate:
        manager.async_save(1, state_of(1))
        threading.Timer(0.1, gate.open).start()
        manager.close()
    assert manager._saves._slabs.held_bytes == 0
    assert is_shard(gate.keys[0])
