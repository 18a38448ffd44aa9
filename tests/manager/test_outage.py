"""A store that is down for a while ends no training that was told to go on, and with a fallback costs no checkpoint."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from cloudckpt import (
    CheckpointExistsError,
    CheckpointManager,
    CheckpointNotFoundError,
    FencedError,
    Options,
    OptionsError,
    RetryExhaustedError,
    RetryPolicy,
    SaveFailedError,
    StorageError,
    UnsupportedValueError,
)
from cloudckpt.errors import (
    BucketNotFoundError,
    CommitUnknownError,
    CreateNotEnforcedError,
    FormatVersionError,
    RankLostError,
    StalledError,
    TransientError,
    is_outage,
)
from cloudckpt.manager.tolerance import Tolerance
from cloudckpt.options import KIB
from cloudckpt.report import Journal, Progress
from cloudckpt.store import open_store
from tests.ranks.processes import run
from tests.store.gates import before

HASTY = Options(
    shard_bytes=16 * KIB,
    block_bytes=4 * KIB,
    span_bytes=16 * KIB,
    retry=RetryPolicy(max_attempts=2, backoff_base_s=0.001, deadline_s=5, request_timeout_s=5),
)
VERBS = ("put", "create", "stream", "read", "head", "list", "delete")
HOWS = pytest.mark.parametrize("how", ["save", "async_save"])


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((20_000,), float(step)), "config": {"step": step}}


def anything(_: str) -> bool:
    return True


class Outage:
    """Requests of a manager to its first root fail as long as it is on."""

    def __init__(self, manager: CheckpointManager, *, when: Callable[[str], bool] = anything) -> None:
        self.is_on = False
        self.count = 0
        self._when = when
        for verb in VERBS:
            before_any(manager, verb, self._fail)

    def _fail(self, key: str) -> None:
        if self.is_on and self._when(key):
            self.count += 1
            raise TransientError("503 SlowDown")

    def __enter__(self) -> Self:
        self.is_on = True
        return self

    def __exit__(self, *_: object) -> None:
        self.is_on = False


def before_any(manager: CheckpointManager, verb: str, act: Callable[[str], object]) -> None:
    if verb != "delete":
        before(manager, act, verb=verb, when=anything)
        return
    inner: Any = manager._store.inner
    real = inner.delete

    def delete(keys: Any) -> Any:
        for key in keys:
            act(key)
        return real(keys)

    inner.delete = delete


def manager_of(tmp_path: Path, **options: Any) -> CheckpointManager:
    given = {"fallback": tmp_path / "nvme", "options": HASTY, **options}
    return CheckpointManager(tmp_path / "bucket", **given)


def save_and_wait(manager: CheckpointManager, how: str, step: int) -> None:
    getattr(manager, how)(step, state_of(step))
    manager.wait()


def steps_at(root: Path) -> list[int]:
    with CheckpointManager(root) as manager:
        return manager.all_steps()


def assert_restores(tmp_path: Path, step: int) -> None:
    state: dict[str, Any] = {"w": torch.zeros(20_000), "config": {}}
    with manager_of(tmp_path) as fresh:
        restored = fresh.restore(state)
    assert restored is not None
    assert (restored.step, state["config"]) == (step, {"step": step})
    assert torch.equal(state["w"], torch.full((20_000,), float(step)))


# -- a second root -------------------------------------------------------------------------------------------


@HOWS
def test_an_outage_of_thirty_saves_loses_no_step(tmp_path: Path, how: str) -> None:
    with manager_of(tmp_path) as manager:
        outage = Outage(manager)
        for step in range(1, 41):
            outage.is_on = 5 < step <= 35
            getattr(manager, how)(step, state_of(step))
            # The interval before is safe by now; of a save that has returned, that very step.
            safe = {int(path.parent.name[5:15]) for path in tmp_path.glob("*/step-*/manifest.json")}
            assert max(safe, default=0) >= (step if how == "save" else step - 1)
            if how == "async_save" and step in (5, 35):
                manager.wait()  # so that the outage begins and ends between two saves
        manager.wait()
        assert manager.all_steps() == list(range(1, 41))
        assert manager.latest_step() == 40
    assert steps_at(tmp_path / "nvme") == list(range(6, 36))
    assert steps_at(tmp_path / "bucket") == [*range(1, 6), *range(36, 41)], "the first takes over again"
    assert_restores(tmp_path, 40)


@HOWS
@pytest.mark.parametrize("place", ["shard", "index", "manifest"])
def test_a_save_that_fails_in_its_middle_goes_to_the_fallback_with_the_same_bytes(
    tmp_path: Path, how: str, place: str
) -> None:
    ends = {"shard": "0002.safetensors", "index": "index.bin", "manifest": "manifest.json"}[place]
    with manager_of(tmp_path) as manager:
        manager.save(1, state_of(1))
        with Outage(manager, when=lambda key: key.endswith(ends)) as outage:
            state = state_of(2)
            getattr(manager, how)(2, state)
            state["w"].fill_(-1.0)  # an async save has its copy
            manager.wait()
            assert outage.count
        latest = manager.latest()
    assert latest is not None
    assert latest.url.startswith(f"file://{tmp_path / 'nvme'}")
    assert_restores(tmp_path, 2)


def test_training_may_go_on_from_the_fallback_and_return_to_the_first_root(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        manager.save(1, state_of(1))
        with Outage(manager):
            manager.save(2, state_of(2))
    with manager_of(tmp_path) as manager:
        restored = manager.restore(state_of(0))
        assert restored is not None
        assert restored.step == 2
        assert manager.save(3, state_of(3)).epoch > restored.epoch  # type: ignore[union-attr]
    assert_restores(tmp_path, 3)


def test_a_line_that_went_back_is_newer_than_what_the_fallback_has(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        manager.save(1, state_of(1))
        with Outage(manager):
            manager.save(900, state_of(900))
        manager.restore(state_of(0), 1)
        manager.save(2, state_of(2))
        assert manager.latest_step() == 2
    assert_restores(tmp_path, 2)
    with manager_of(tmp_path) as manager:
        manager.restore(state_of(0), 900)
        with Outage(manager):
            manager.save(3, state_of(3))
        assert manager.latest_step() == 3
        manager.save(4, state_of(4))
    assert_restores(tmp_path, 4)


@pytest.mark.parametrize("down", [{300}, {10}, {300, 10}, {200, 20}], ids=str)
def test_a_lower_step_is_the_newest_of_both_roots(tmp_path: Path, down: set[int]) -> None:
    with manager_of(tmp_path) as manager:
        outage = Outage(manager)
        for step in (100, 200, 300, 10, 20):
            outage.is_on = step in down
            manager.save(step, state_of(step))
            outage.is_on = False
            assert manager.latest_step() == step
    assert_restores(tmp_path, 20)


def test_a_job_that_begins_in_an_outage_is_newer_than_the_one_before(tmp_path: Path) -> None:
    for job in range(1, 5):
        with manager_of(tmp_path) as manager:
            manager.restore(state_of(0))
            outage = Outage(manager)
            for step in range(10 * job, 10 * job + 3):
                outage.is_on = (step + job) % 2 == 0
                manager.save(step, state_of(step))
            outage.is_on = False
            assert manager.latest_step() == 10 * job + 2
    assert_restores(tmp_path, 42)


def test_a_step_that_was_saved_to_the_fallback_is_saved(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        with Outage(manager):
            first = manager.save(1, state_of(1))
        assert manager.save(1, state_of(1), exists="skip") == first
        manager.delete(1)
        with pytest.raises(CheckpointNotFoundError):
            manager.delete(1)
        assert manager.all_steps() == []


def test_each_root_keeps_what_the_rules_keep(tmp_path: Path) -> None:
    with manager_of(tmp_path, retention=2, prune_grace_s=0) as manager:
        outage = Outage(manager)
        for step in range(1, 13):
            outage.is_on = 4 < step <= 8
            manager.save(step, state_of(step))
    assert steps_at(tmp_path / "bucket") == [11, 12]
    assert steps_at(tmp_path / "nvme") == [7, 8]


def test_a_line_through_both_roots_is_pruned_in_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for job in range(3):
        with manager_of(tmp_path, retention=2, prune_grace_s=0) as manager:
            manager.restore(state_of(0))
            outage = Outage(manager)
            for step in range(10 * job, 10 * job + 8):
                outage.is_on = (step - 10 * job >= 4) == (job != 1)  # the last of a job is now here, now there
                manager.save(step, state_of(step))
            outage.is_on = False
    assert (steps_at(tmp_path / "bucket"), steps_at(tmp_path / "nvme")) == ([22, 23], [26, 27])
    assert "retention leaves them alone" not in caplog.text


def test_a_line_is_known_also_where_the_other_root_has_the_claims(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, state_of(step))
    with manager_of(tmp_path) as manager:
        manager.restore(state_of(0))
        with Outage(manager):
            manager.save(4, state_of(4))
    with manager_of(tmp_path, retention=1, prune_grace_s=0) as manager:
        manager.restore(state_of(0))
        manager.save(5, state_of(5))
        assert manager.all_steps() == [4, 5], "of the first root all that led there went"


def test_a_job_that_forgot_to_restore_removes_nothing_in_either_root(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        outage = Outage(manager)
        for step in (101, 102, 103, 104):
            outage.is_on = step > 102
            manager.save(step, state_of(step))
        outage.is_on = False
    with manager_of(tmp_path, retention=1, prune_grace_s=0) as manager:
        outage = Outage(manager)
        for step in (1, 2, 3, 4):
            outage.is_on = step > 2
            manager.save(step, state_of(step))
        outage.is_on = False
        assert manager.all_steps() == [2, 4, 101, 102, 103, 104]


def test_a_step_that_stands_in_both_roots_is_deleted_in_both(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with CheckpointManager(first, fallback=second) as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.zeros(4)})
        shutil.copytree(first / "step-0000000002-e0001", second / "step-0000000002-e0001")
        manager.delete(2)
        assert manager.all_steps() == [1]


def test_a_job_that_goes_back_to_what_only_the_fallback_has_begins_anew_on_both(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        outage = Outage(manager)
        manager.save(1, state_of(1))
        manager._saves.homes[1].catalog.claims.claim(above=5)
        with outage:
            manager.save(2, state_of(2))
            manager.save(3, state_of(3))
        newest = manager.latest()
        assert newest is not None
        assert newest.epoch == 7
        manager.restore(state_of(0), 2)
        manager.save(3, state_of(30))
        latest = manager.latest()
        assert latest is not None
        assert latest.epoch > newest.epoch
        assert latest.url.startswith(f"file://{tmp_path / 'bucket'}")


def test_a_new_line_is_above_all_that_was_seen_of_a_root_that_is_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        with manager_of(tmp_path) as manager:
            manager.restore(state_of(0))
            manager.save(step, state_of(step))
    with manager_of(tmp_path) as manager:
        manager.restore(state_of(0), 1)
        with Outage(manager):
            manager.save(2, state_of(20))
    with manager_of(tmp_path) as manager:
        state = state_of(0)
        manager.restore(state)
    assert state["config"] == {"step": 20}
    assert "nobody knows which epochs" not in caplog.text


def test_a_new_line_is_above_an_epoch_that_the_job_has_owned_itself(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        manager.save(50, state_of(50))
        manager.save(100, state_of(100))
        manager.restore(state_of(0), 50)
        manager.save(60, state_of(60))
        manager.restore(state_of(0), 50)
        with Outage(manager):
            manager.save(55, state_of(55))
        assert manager.latest_step() == 55
    assert_restores(tmp_path, 55)


def test_that_nothing_was_ever_seen_of_a_root_that_is_down_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with manager_of(tmp_path) as manager, Outage(manager):
        manager.save(1, state_of(1))
    assert "nobody knows which epochs the other root of this job has" in caplog.text


def refuse(key: str) -> None:
    raise TransientError(f"503 SlowDown for {key}")


@HOWS
def test_what_a_save_left_where_the_store_was_down_is_taken_back(tmp_path: Path, how: str) -> None:
    with manager_of(tmp_path) as manager:
        manager.save(1, state_of(1))
        before(manager, refuse, verb="put", when=lambda key: "step-0000000002" in key and key.endswith("index.bin"))
        save_and_wait(manager, how, 2)
        assert sorted(path.name for path in (tmp_path / "bucket").glob("step-*")) == ["step-0000000001-e0001"]
    assert_restores(tmp_path, 2)


def test_what_may_be_committed_where_the_store_was_down_is_not_taken_back(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        manager.save(1, state_of(1))
        inner: Any = manager._store.inner
        create = inner.create

        def lose(key: str, data: bytes) -> None:
            create(key, data)
            if key.endswith("manifest.json"):
                outage.is_on = True
                raise TransientError("the answer was lost")

        inner.create = lose
        outage = Outage(manager, when=lambda key: "step-0000000002" in key)
        manager.save(2, state_of(2))
        outage.is_on = False
    for root in ("bucket", "nvme"):
        with CheckpointManager(tmp_path / root) as manager:
            state = state_of(0)
            manager.restore(state, 2)
            assert state["config"] == {"step": 2}


def test_what_cannot_be_read_is_listed_of_both_roots_and_hides_nothing(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        outage = Outage(manager)
        for step in (1, 2, 3):
            outage.is_on = step > 1
            manager.save(step, state_of(step))
        outage.is_on = False
        for root, step in (("bucket", 1), ("nvme", 2)):
            manifest = next((tmp_path / root).glob(f"step-{step:010d}-*/manifest.json"))
            manifest.chmod(0o600)
            manifest.write_bytes(b"garbage")
    with manager_of(tmp_path) as manager:
        assert [one.step for one in manager.unreadable()] == [1, 2]
        assert manager.all_steps() == [3]


def test_a_corrupt_checkpoint_in_one_root_leads_to_the_next_older_one_wherever_that_is(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        outage = Outage(manager)
        for step in (1, 2, 3, 4):
            outage.is_on = step % 2 == 0
            manager.save(step, state_of(step))
    for step, root in ((4, "nvme"), (3, "bucket")):
        shard = next((tmp_path / root).glob(f"step-{step:010d}-*/*/*.safetensors"))
        shard.chmod(0o600)
        shard.write_bytes(shard.read_bytes()[:-1])
        assert_restores(tmp_path, step - 1)


def test_a_root_that_cannot_be_read_is_never_taken_for_empty(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        with Outage(manager):
            manager.save(1, state_of(1))
        with Outage(manager):
            for ask in (manager.latest, lambda: manager.restore(state_of(0)), manager.checkpoints):
                with pytest.raises(StorageError):
                    ask()


def test_a_copy_that_went_in_waves_is_not_all_there_any_more_and_the_save_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    waves = Options(**{**{name: getattr(HASTY, name) for name in HASTY.__slots__}, "memory_budget_bytes": 32 * KIB})
    with manager_of(tmp_path, options=waves) as manager:
        manager.save(1, state_of(1))
        with Outage(manager, when=lambda key: key.endswith("manifest.json")), pytest.raises(StorageError):
            manager.async_save(2, state_of(2)).result()
        assert "raise memory_budget_bytes to hold the state" in caplog.text
        with Outage(manager):
            # Asked first, and given up before any of the copy is.
            manager._saves.homes[0].epoch.is_doubted = True
            assert manager.async_save(3, state_of(3)).result() is not None
    assert_restores(tmp_path, 3)


@HOWS
def test_what_is_no_outage_does_not_go_to_the_fallback(tmp_path: Path, how: str) -> None:
    with manager_of(tmp_path) as manager:
        manager.save(1, state_of(1))
        for step, state, kind in (
            (1, state_of(1), CheckpointExistsError),
            (2, {"f": print}, UnsupportedValueError),
            (-1, state_of(1), OptionsError),
        ):
            with pytest.raises(kind):
                getattr(manager, how)(step, state)
        with manager_of(tmp_path) as newer:
            newer.save(2, state_of(2))
            with pytest.raises(FencedError):
                save_and_wait(manager, how, 3)
    assert not (tmp_path / "nvme").exists()


def test_the_report_names_what_went_to_the_fallback(tmp_path: Path) -> None:
    with manager_of(tmp_path, sweep_after_s=None) as manager:
        with Outage(manager):
            manager.save(1, state_of(1))
        (trouble,) = manager.report().troubles
    assert trouble == f"step 1 is saved to file://{tmp_path}/nvme, because file://{tmp_path}/bucket is down"


def test_a_fallback_that_is_the_root_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"the fallback is .* itself; give another root"):
        CheckpointManager(tmp_path, fallback=f"file://{tmp_path}")


def outage_of_all_ranks(root: str, how: str) -> tuple[list[int], str]:
    with manager_of(Path(root)) as manager:
        outage = Outage(manager)
        for step in range(1, 7):
            # Only one rank's way to the store is broken, but all go where all are heard.
            outage.is_on = 2 < step <= 4 and int(os.environ["RANK"]) == 1
            getattr(manager, how)(step, state_of(step))
            manager.wait()
        outage.is_on = False
        state: dict[str, Any] = {"w": torch.zeros(20_000), "config": {}}
        restored = manager.restore(state, 4)
        assert restored is not None
        assert state["config"] == {"step": 4}
        return manager.all_steps(), restored.url


@HOWS
def test_all_ranks_go_to_the_fallback_together(tmp_path: Path, how: str) -> None:
    for steps, url in run(2, outage_of_all_ranks, str(tmp_path), how):
        assert steps == [1, 2, 3, 4, 5, 6]
        assert url.startswith(f"file://{tmp_path}/nvme/")
    assert steps_at(tmp_path / "nvme") == [3, 4]


# -- saves that may fail -------------------------------------------------------------------------------------


@HOWS
def test_an_outage_need_not_end_training(tmp_path: Path, how: str) -> None:
    with CheckpointManager(tmp_path, options=HASTY, on_error="warn", max_failures=10) as manager:
        outage = Outage(manager)
        for step in range(1, 9):
            outage.is_on = 2 < step <= 6
            made = getattr(manager, how)(step, state_of(step))
            manager.wait()
            if how == "save":
                assert (made is None) == outage.is_on
            elif outage.is_on:
                with pytest.raises(RetryExhaustedError):
                    made.result()
        assert manager.all_steps() == [1, 2, 7, 8]
        assert len(manager.report().troubles) == 4
        assert "step 3 was NOT saved, 1 in a row; at 10 it ends training" in manager.report().troubles[0]


@HOWS
def test_so_many_failed_saves_in_a_row_end_training(tmp_path: Path, how: str) -> None:
    with CheckpointManager(tmp_path, options=HASTY, on_error="warn", max_failures=3) as manager:
        outage = Outage(manager)
        for step, is_down in enumerate([True, True, False, True, True], 1):
            outage.is_on = is_down
            getattr(manager, how)(step, state_of(step))
            manager.wait()
        outage.is_on = True
        with pytest.raises(RetryExhaustedError) as caught:
            save_and_wait(manager, how, 6)
        assert caught.value.__notes__ == ["3 saves in a row failed, and max_failures is 3"]
        outage.is_on = False
        assert manager.all_steps() == [3]


@HOWS
def test_a_first_save_may_fail_too(tmp_path: Path, how: str) -> None:
    with CheckpointManager(tmp_path / "r", options=HASTY, on_error="warn") as manager:
        with Outage(manager):
            getattr(manager, how)(1, state_of(1))
            manager.wait()
        getattr(manager, how)(2, state_of(2))
        manager.wait()
        assert manager.all_steps() == [2]


@HOWS
def test_what_is_no_outage_is_raised_in_any_case(tmp_path: Path, how: str) -> None:
    with CheckpointManager(tmp_path, options=HASTY, on_error="warn", max_failures=100) as manager:
        manager.save(1, state_of(1))
        with pytest.raises(CheckpointExistsError):
            getattr(manager, how)(1, state_of(1))
        with pytest.raises(UnsupportedValueError):
            getattr(manager, how)(2, {"f": print})


def failing_on_one_rank(root: str, how: str) -> list[bool]:
    with CheckpointManager(root, options=HASTY, on_error="warn", max_failures=3) as manager:
        outage, ended = Outage(manager), []
        for step in range(1, 6):
            outage.is_on = step > 1 and int(os.environ["RANK"]) == 1
            try:
                getattr(manager, how)(step, state_of(step))
                manager.wait()
                ended.append(False)
            except SaveFailedError:
                ended.append(True)
        return ended


@HOWS
def test_ranks_forgive_and_end_together(tmp_path: Path, how: str) -> None:
    assert run(2, failing_on_one_rank, str(tmp_path), how) == [[False, False, False, True, True]] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"on_error": "ignore"}, "on_error is 'ignore'; give 'raise' or 'warn'"),
        ({"max_failures": 0}, "max_failures is 0; give a whole number from 1"),
        ({"max_failures": True}, "max_failures is True"),
    ],
)
def test_a_tolerance_that_is_none_is_refused(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionsError, match=words):
        CheckpointManager(tmp_path, **arguments)


def test_one_failure_that_is_told_twice_counts_once(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        tolerance = Tolerance(Journal(store, Progress("off")), "warn", 2)
        error = StorageError("down")
        assert [tolerance.forgives(1, error) for _ in range(3)] == [True] * 3
        assert not tolerance.forgives(2, StorageError("down"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StorageError("full"), True),
        (RetryExhaustedError("503"), True),
        (CommitUnknownError("?"), True),
        (StalledError("still"), True),
        (SaveFailedError("", failures={1: RetryExhaustedError("503")}), True),
        (SaveFailedError("", failures={0: RetryExhaustedError("503"), 1: RankLostError("gone")}), False),
        (SaveFailedError("a user's object"), False),
        (BucketNotFoundError("no bucket"), False),
        (CreateNotEnforcedError("overwrote"), False),
        (RankLostError("gone"), False),
        (FencedError("newer"), False),
        (CheckpointExistsError("there"), False),
        (OptionsError("wrong"), False),
        (UnsupportedValueError("f"), False),
        (MemoryError(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_a_store_that_is_down_is_an_outage(error: BaseException, expected: bool) -> None:
    assert is_outage(error) == expected


def of_a_newer_format(manifest: Path) -> None:
    data = manifest.read_bytes().replace(b'"format_version": 1', b'"format_version": 3', 1)
    bare = data[: data.rindex(b'"sha256": "')] + b'"sha256": ""\n}\n'
    manifest.write_bytes(bare.replace(b'"sha256": ""', b'"sha256": "%s"' % hashlib.sha256(bare).hexdigest().encode()))


def test_of_two_roots_a_newest_of_a_newer_format_is_never_passed_over(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    with CheckpointManager(second) as manager:
        manager.save(1, state_of(1))
    with CheckpointManager(first, fallback=second) as manager:
        manager.restore(state_of(0))
        manager.save(2, state_of(2))
        of_a_newer_format(first / "step-0000000002-e0002" / "manifest.json")
        for look in (manager.latest, lambda: manager.restore(state_of(0))):
            with pytest.raises(FormatVersionError):
                look()


def test_of_two_roots_an_older_one_of_a_newer_format_keeps_nobody_from_the_newest(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    with CheckpointManager(first) as manager:
        manager.save(1, state_of(1))
    with CheckpointManager(second, fallback=first) as manager:
        manager.restore(state_of(0))
        manager.save(2, state_of(2))
    of_a_newer_format(first / "step-0000000001-e0001" / "manifest.json")
    with CheckpointManager(second, fallback=first) as manager:
        restored = manager.restore(state_of(0))
        assert restored is not None
        assert restored.step == manager.latest_step() == 2
