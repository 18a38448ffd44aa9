"""The manager's promises: what is saved is found, the newest good one is restored, and only what may go goes."""

from __future__ import annotations

import logging
import math
import random
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import cloudckpt
from cloudckpt import (
    CheckpointExistsError,
    CheckpointManager,
    CheckpointNotFoundError,
    FencedError,
    IntegrityError,
    KeepBest,
    KeepLast,
    ManifestError,
    Options,
    OptionsError,
    StateMismatchError,
    UnsupportedValueError,
)
from cloudckpt.options import KIB
from cloudckpt.root import Roots

SMALL = Options(shard_bytes=64 * KIB, block_bytes=4 * KIB, span_bytes=16 * KIB, memory_budget_bytes=1024 * KIB)


def state_of(step: int) -> dict[str, object]:
    return {"w": torch.full((100,), float(step)), "config": {"step": step}}


def save_steps(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(step, state_of(step), metrics={"loss": float(abs(step - 3))})


def steps_at(url: Path) -> list[int | None]:
    with CheckpointManager(url) as manager:
        return [checkpoint.step for checkpoint in manager.checkpoints()]


def objects_at(url: Path) -> set[str]:
    return {str(path.relative_to(url)) for path in url.rglob("*") if path.is_file()}


def test_restore_returns_none_on_a_fresh_start_and_writes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with CheckpointManager(root) as manager:
        assert manager.restore(state_of(0)) is None
        assert manager.latest() is None
        assert manager.checkpoints() == []
    assert not root.exists()


def test_restore_takes_the_newest_and_puts_everything_back(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1, 2)
    state: dict[str, object] = {"w": torch.zeros(100), "config": {}}
    target = state["w"]
    with CheckpointManager(tmp_path) as manager:
        restored = manager.restore(state)
    assert restored is not None
    assert restored.step == 2
    assert state["w"] is target
    assert torch.equal(state["w"], torch.full((100,), 2.0))  # type: ignore[arg-type]
    assert state["config"] == {"step": 2}


def test_restore_of_a_step_takes_that_step(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1, 2, 3)
        state = state_of(0)
        restored = manager.restore(state, step=1)
        assert restored is not None
        assert restored.step == 1
        assert state["config"] == {"step": 1}


def test_restore_of_an_unknown_step_names_the_steps_that_are_there(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1, 2)
        with pytest.raises(CheckpointNotFoundError, match=r"no committed checkpoint of step 7 .* 1, 2"):
            manager.restore(state_of(0), step=7)


def test_restore_best_takes_the_best_and_not_the_newest(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, retention=[KeepLast(5), KeepBest("loss", n=1, mode="min")]) as manager:
        save_steps(manager, 1, 2, 3, 4, 5)
        state = state_of(0)
        restored = manager.restore(state, step="best")
        assert restored is not None
        assert restored.step == 3
        worst = manager.best("loss", mode="max")
        assert worst is not None
        assert worst.step == 5, "of equals (1 and 5) the newer"


def test_restore_best_without_a_rule_says_what_to_pass(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1)
        with pytest.raises(OptionsError, match="KeepBest rule"):
            manager.restore(state_of(0), step="best")
        best = manager.best("loss")
        assert best is not None
        assert manager.restore(state_of(0), step=best) == best


def test_best_never_is_a_checkpoint_whose_metric_is_nan_or_missing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state_of(1), metrics={"loss": math.nan})
        manager.save(2, state_of(2))
        assert manager.best("loss") is None
        manager.save(3, state_of(3), metrics={"loss": math.inf})
        assert manager.best("loss").step == 3  # type: ignore[union-attr]


def test_retention_keeps_the_newest_and_the_best_and_removes_the_rest_whole(tmp_path: Path) -> None:
    rules = [KeepLast(2), KeepBest("loss", n=1, mode="min")]
    with CheckpointManager(tmp_path, retention=rules, prune_grace_s=0) as manager:
        save_steps(manager, 1, 2, 3, 4, 5, 6)
    assert steps_at(tmp_path) == [3, 5, 6]
    assert {name.split("/")[0] for name in objects_at(tmp_path) if name.startswith("step-")} == {
        "step-0000000003-e0001",
        "step-0000000005-e0001",
        "step-0000000006-e0001",
    }


def test_shards_of_a_pruned_checkpoint_stay_until_the_grace_time_has_passed(tmp_path: Path) -> None:
    now_s = [0.0]
    rules = [KeepLast(1)]
    with CheckpointManager(tmp_path, retention=rules, prune_grace_s=60, clock=lambda: now_s[0]) as manager:
        save_steps(manager, 1, 2)
        assert any(name.startswith("step-0000000001-e0001/") for name in objects_at(tmp_path))
        assert "step-0000000001-e0001/manifest.json" not in objects_at(tmp_path)
        now_s[0] = 61.0
        save_steps(manager, 3)
        manager._saves.homes[0].pruner.settle()
        assert not any(name.startswith("step-0000000001-e0001/") for name in objects_at(tmp_path))


def test_a_step_that_is_committed_is_never_written_again(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        first = manager.save(4, state_of(4))
        before = objects_at(tmp_path)
        with pytest.raises(CheckpointExistsError, match=r"already committed .*step-0000000004.*another step"):
            manager.save(4, state_of(5))
        assert objects_at(tmp_path) == before
        assert manager.latest() == first


def test_a_new_job_may_save_an_old_step_again_and_its_line_wins(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1, 2, 3)
    with CheckpointManager(tmp_path) as manager:
        manager.restore(state_of(0), step=1)
        manager.save(2, {"w": torch.zeros(100), "config": {"line": "new"}})
        latest = manager.latest()
    assert latest is not None
    assert (latest.epoch, latest.step) == (2, 2)
    assert [(c.epoch, c.step) for c in CheckpointManager(tmp_path).checkpoints()] == [(1, 1), (1, 2), (1, 3), (2, 2)]


def test_an_older_job_is_fenced_and_commits_nothing(tmp_path: Path) -> None:
    zombie = CheckpointManager(tmp_path)
    zombie.save(1, state_of(1))
    with CheckpointManager(tmp_path) as successor:
        successor.restore(state_of(0))
        successor.save(2, state_of(2))
        with pytest.raises(FencedError, match=r"epoch 2 has claimed .* writes as epoch 1.*stop this job"):
            zombie.save(3, state_of(3))
        assert [checkpoint.step for checkpoint in successor.checkpoints()] == [1, 2]
    zombie.close()


def test_a_claim_records_what_the_job_resumed_from(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 5)
    with CheckpointManager(tmp_path) as manager:
        manager.restore(state_of(0))
        save_steps(manager, 6)
    claim = (tmp_path / "epochs" / "0000000002.json").read_text()
    assert '"resumed_from": [\n  5,\n  1\n ]' in claim


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "index", "manifest"])
def test_restore_latest_goes_past_a_corrupt_checkpoint_and_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointManager(tmp_path, options=SMALL) as manager:
        save_steps(manager, 1, 2)
    harm(tmp_path / "step-0000000002-e0001", damage)
    state = state_of(0)
    with CheckpointManager(tmp_path, options=SMALL) as manager, caplog.at_level(logging.WARNING):
        restored = manager.restore(state)
    assert restored is not None
    assert restored.step == 1
    assert torch.equal(state["w"], torch.full((100,), 1.0))  # type: ignore[arg-type]
    assert "NOT restoring" in caplog.text
    assert "step-0000000002-e0001" in caplog.text


def harm(prefix: Path, damage: str) -> None:
    shard = next(prefix.rglob("*.safetensors"))
    if damage == "remove":
        shard.unlink()
        return
    victim = {"index": next(prefix.rglob("index.bin")), "manifest": prefix / "manifest.json"}.get(damage, shard)
    data = bytearray(victim.read_bytes())
    if damage == "truncate":
        del data[-1:]
    else:
        data[len(data) // 2] ^= 4
    victim.chmod(0o600)
    victim.write_bytes(data)


def test_restore_of_a_named_step_never_falls_back(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1, 2)
        harm(tmp_path / "step-0000000002-e0001", "flip")
        with pytest.raises(IntegrityError):
            manager.restore(state_of(0), step=2)


def test_when_no_checkpoint_can_be_read_restore_and_latest_raise_and_never_start_fresh(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1, 2)
    for prefix in tmp_path.glob("step-*"):
        harm(prefix, "manifest")
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(ManifestError, match=r"2 checkpoints are at .* and none can be read"):
            manager.latest()
        with pytest.raises(ManifestError):
            manager.restore(state_of(0))


def test_a_mismatch_is_never_taken_for_corruption(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1, 2)
        state: dict[str, object] = {"w": torch.zeros(7), "config": {}, "extra": 1}
        with pytest.raises(StateMismatchError) as caught:
            manager.restore(state)
    assert caught.value.mismatched == {"w": ((7,), (100,))}
    assert caught.value.missing == ("extra",)
    assert state["config"] == {}


def test_a_checkpoint_that_a_retention_rule_removed_is_gone_and_a_newer_unreadable_one_is_left(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, retention=[KeepLast(1)], prune_grace_s=0) as manager:
        save_steps(manager, 1, 2)
        harm(tmp_path / "step-0000000002-e0001", "manifest")
    with CheckpointManager(tmp_path, retention=[KeepLast(1)], prune_grace_s=0) as manager:
        save_steps(manager, 3)
    assert (tmp_path / "step-0000000002-e0001" / "manifest.json").exists()


def test_an_unsupported_value_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(UnsupportedValueError, match="config") as caught:
            manager.save(1, {"w": torch.zeros(3), "config": {"fn": print}})
        assert "config" in caught.value.key
        assert not any(name.startswith("step-") for name in objects_at(tmp_path))
        manager.save(1, state_of(1))


@pytest.mark.parametrize("step", [-1, 10**10])
def test_a_step_without_a_key_is_refused(tmp_path: Path, step: int) -> None:
    with CheckpointManager(tmp_path) as manager, pytest.raises(OptionsError, match="step"):
        manager.save(step, state_of(0))


def test_should_save_asks_at_every_interval_and_never_without_one(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_every_steps=5) as manager:
        assert [step for step in range(20) if manager.should_save(step)] == [5, 10, 15]
    with CheckpointManager(tmp_path) as manager:
        assert not any(manager.should_save(step) for step in range(20))


def test_generators_continue_where_the_checkpoint_saw_them(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state_of(1))
        expected = [draw() for _ in range(3)]
        manager.restore(state_of(0))
        assert [draw() for _ in range(3)] == expected
    with CheckpointManager(tmp_path, save_rng=False) as manager:
        manager.restore(state_of(0))
        assert [draw() for _ in range(3)] != expected


def test_training_goes_on_bitwise_after_a_restore_into_fresh_objects(tmp_path: Path) -> None:
    def build() -> dict[str, object]:
        model = nn.Sequential(nn.Linear(20, 30), nn.Dropout(0.3), nn.BatchNorm1d(30), nn.Linear(30, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        }

    def train(state: dict[str, object], steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = state["model"](torch.randn(8, 20)).square().mean()  # type: ignore[operator]
            state["optimizer"].zero_grad()  # type: ignore[attr-defined]
            loss.backward()
            state["optimizer"].step()  # type: ignore[attr-defined]
            state["scheduler"].step()  # type: ignore[attr-defined]
            losses.append(loss.item())
        return losses

    state = build()
    with CheckpointManager(tmp_path, options=SMALL) as manager:
        train(state, 3)
        manager.save(2, state)
        expected = train(state, 5)
        fresh = build()
        manager.restore(fresh)
    assert train(fresh, 5) == expected


def test_a_closed_manager_refuses_work_and_closes_again(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.close()
    manager.close()
    with pytest.raises(OptionsError, match="is closed"):
        manager.save(1, state_of(1))


def test_sweep_removes_what_a_killed_job_left_and_nothing_else(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1)
    orphan = tmp_path / "step-0000000002-e0001" / "0123456789abcdef" / "r00000-0000.safetensors"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"half a job")
    with CheckpointManager(tmp_path) as manager:
        assert manager.sweep(older_than_s=0) == [], "the killed job's epoch is still the highest"
        save_steps(manager, 3)
        assert manager.sweep(older_than_s=3600, dry_run=False) == [], "too young"
        found = manager.sweep(older_than_s=0)
        assert [swept.prefix for swept in found] == ["step-0000000002-e0001/"]
        assert orphan.exists()
        manager.sweep(older_than_s=0, dry_run=False)
        assert not orphan.exists()
        assert manager.sweep(older_than_s=0) == []
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1, 3]


def test_a_zombie_cannot_commit_what_a_sweep_has_voided(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1)
        catalog = manager._saves.roots.catalogs[0]
        manifest = Roots([catalog]).all()[0].manifest
        assert catalog.void("step-0000000009-e0001/")
        late = msgspec.structs.replace(manifest, step=9)
        with pytest.raises(CheckpointExistsError):
            catalog.commit(late, prefix="step-0000000009-e0001/")
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1]


def test_a_manifest_copied_to_another_step_is_refused(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1)
        copy = tmp_path / "step-0000000005-e0001"
        (tmp_path / "step-0000000001-e0001").rename(copy)
        with pytest.raises(ManifestError, match="was copied there"):
            manager.latest()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"save_every_steps": 0}, "save_every_steps"),
        ({"prune_grace_s": -1.0}, "prune_grace_s"),
        ({"engine": "s3"}, "engine"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: dict[str, object], word: str) -> None:
    with pytest.raises(OptionsError, match=word):
        CheckpointManager(tmp_path, **arguments)  # type: ignore[arg-type]


def test_a_rank_without_a_process_group_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(OptionsError, match="WORLD_SIZE is 4 and no process group"):
        CheckpointManager(tmp_path)
    with pytest.raises(OptionsError, match="init_process_group"):
        cloudckpt.save({"a": 1}, tmp_path / "x")


# -- going back ----------------------------------------------------------------------------------------------


def test_a_job_that_goes_back_to_an_older_step_begins_a_newer_line(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, retention=[KeepLast(3)]) as manager:
        save_steps(manager, 97, 98, 99)
        state: dict[str, object] = {"w": torch.zeros(100), "config": {}}
        manager.restore(state, 97)
        save_steps(manager, 50, 51)
        assert [(one.epoch, one.step) for one in manager.checkpoints()] == [(1, 99), (2, 50), (2, 51)]
        restored = manager.restore(state)
        assert restored is not None
        assert (restored.epoch, restored.step) == (2, 51)
        save_steps(manager, 52)
        assert (manager.latest() or restored).epoch == 2, "the newest was restored: the line goes on"
    with CheckpointManager(tmp_path) as other:
        newest = other.restore(state)
        assert newest is not None
        assert (newest.epoch, newest.step) == (2, 52)


def test_a_step_may_be_saved_again_after_going_back_before_it(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1, 2)
        manager.restore({"w": torch.zeros(100), "config": {}}, 1)
        assert manager.save(2, state_of(2)).epoch == 2


# -- steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [np.int64(7), torch.tensor(7), np.uint8(7)], ids=["numpy", "torch", "numpy small"])
@pytest.mark.parametrize("how", ["save", "async_save"])
def test_a_whole_number_of_numpy_or_torch_is_a_step(tmp_path: Path, how: str, step: int) -> None:
    with CheckpointManager(tmp_path, save_every_steps=7) as manager:
        assert manager.should_save(step)
        getattr(manager, how)(step, state_of(7))
        manager.wait()
        restored = manager.restore({"w": torch.zeros(100), "config": {}}, step)
        assert restored is not None
        assert (restored.step, type(restored.step)) == (7, int)


@pytest.mark.parametrize("step", [True, np.bool_(True), 1.0, "1", None], ids=repr)
def test_what_is_no_whole_number_is_no_step_and_nothing_is_written(tmp_path: Path, step: object) -> None:
    root = tmp_path / "root"
    with CheckpointManager(root) as manager:
        calls = [
            lambda: manager.save(step, state_of(1)),  # type: ignore[arg-type]
            lambda: manager.async_save(step, state_of(1)),  # type: ignore[arg-type]
            lambda: manager.should_save(step),  # type: ignore[arg-type]
        ]
        for call in calls:
            with pytest.raises(OptionsError, match="give the training step, a whole number"):
                call()
    assert not root.exists()


# -- rules of one's own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_a_rule_that_raises_removes_nothing_and_fails_no_save(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def keep(self, checkpoints: object) -> set[tuple[int, int]]:
            raise KeyError("loss")

    with CheckpointManager(tmp_path, retention=[Broken()]) as manager:
        for step in range(3):
            getattr(manager, how)(step, state_of(step))
        manager.wait()
        assert [one.step for one in manager.checkpoints()] == [0, 1, 2]
    told = r"step 2 is saved, but pruning failed and is left to the next save: .* raised KeyError: 'loss'"
    assert re.search(told, caplog.text)


@pytest.mark.parametrize("name", ["manifest.json", "index.bin"])
@pytest.mark.parametrize("answer", [b"", b"<Error>busy</Error>"])
def test_one_damaged_answer_is_no_reason_to_go_back_to_an_older_step(tmp_path: Path, name: str, answer: bytes) -> None:
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1, 2)
    with CheckpointManager(tmp_path) as other:
        store = other._store.inner  # type: ignore[attr-defined]
        read, damaged = store.read, []

        def read_badly_once(key: str, *, limit_bytes: int) -> bytes:
            if key.endswith(name) and key.startswith("step-0000000002") and not damaged:
                damaged.append(key)
                return answer
            return read(key, limit_bytes=limit_bytes)  # type: ignore[no-any-return]

        store.read = read_badly_once
        restored = other.restore({"w": torch.zeros(100), "config": {}})
    assert restored is not None
    assert (restored.step, len(damaged)) == (2, 1)


class Deaf(logging.Handler):
    """A handler of the log that raises."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("no room for logs")


class Gone:
    """A stream that nobody reads."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError

    def isatty(self) -> bool:
        raise OSError


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_nothing_makes_a_save_raise_once_it_is_committed_and_the_report_says_what_went_wrong(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> object:
        raise KeyError("loss")

    log, deaf = logging.getLogger("cloudckpt.report"), Deaf()
    level = log.level
    log.addHandler(deaf)
    log.setLevel(logging.DEBUG)
    monkeypatch.setattr("sys.stderr", Gone())
    try:
        with CheckpointManager(tmp_path, retention=broken, progress="bar") as manager:
            for step in (1, 2):
                made = getattr(manager, how)(step, state_of(step))
                manager.wait()
                found = made if how == "save" else made.result()
                assert found == manager.latest()
            report = manager.report()
    finally:
        log.removeHandler(deaf)
        log.setLevel(level)
    told = r"step 2 is saved, but pruning failed and is left to the next save: .* raised KeyError: 'loss'"
    assert [one for one in report.troubles if re.match(told, one)]
    assert any("step 2 is saved, but that could not be told" in trouble for trouble in report.troubles)
    assert "trouble   step 2 is saved, but pruning failed" in str(report)
