"""What Lightning saves is found again under its paths, and a run that is killed goes on with the same losses."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import cloudckpt
from cloudckpt import CheckpointManager, CheckpointNotFoundError, FencedError, OptionsError, UnsupportedValueError
from raw_access import FreshPrefix

# The benchmarks' peers have Lightning in an environment without the others.
pytest.importorskip("ray", reason="make integrations installs the frameworks")
lightning = pytest.importorskip("lightning", reason="make integrations installs the frameworks")

from lightning.fabric.plugins import TorchCheckpointIO  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.demos.boring_classes import BoringModel  # noqa: E402

from cloudckpt.integrations.lightning import (  # noqa: E402
    CloudCheckpointIO,
    CloudModelParallelStrategy,
    CloudPreemption,
    CloudRandomState,
    _is_stub,
)
from tests.integrations.interrupted import Job  # noqa: E402
from tests.integrations.striking import BEFORE_COMMIT  # noqa: E402

# Lightning warns of many things, such as few workers.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

LINE = re.compile(r'{"rank": (\d+), "step": (\d+), "loss": "([^"]+)"}')
EPOCHS = 2

IN_SAVE = f"{BEFORE_COMMIT}:6"
AFTER_COMMIT = "cloudckpt.integrations.lightning:CloudCheckpointIO:_lay:6"


class Training:
    """One run after the other of the example, each in a folder of its own, as on a new machine."""

    def __init__(self, tmp_path: Path, url: str, options: dict[str, Any] | None, *arguments: str) -> None:
        self._tmp_path, self._url, self._options, self._arguments = tmp_path, url, options, arguments
        self._count = 0

    def run(
        self, *, halt: int | str | None = None, strike: signal.Signals = signal.SIGKILL
    ) -> tuple[dict[Any, str], int]:
        """Return (rank, step) → the bits of its loss, and the exit status.

        Args:
            halt: the step or the call at which it is struck; by SIGTERM its first rank alone.
            strike: with which signal.
        """
        self._count += 1
        folder = self._tmp_path / f"machine-{self._count}"
        folder.mkdir()
        arguments = ("--epochs", str(EPOCHS), *self._arguments)
        with Job("train_lightning.py", self._url, self._options, *arguments, folder=folder, halt=halt) as job:
            output, code = job.follow(lambda: job.strike(strike, by_group=strike == signal.SIGKILL))
        return {(int(rank), int(step)): loss for rank, step, loss in LINE.findall(output)}, code


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[Any, str]]:
    """The losses of a run that is left alone, once for each kind."""
    known: dict[tuple[str, ...], dict[Any, str]] = {}

    def losses(*arguments: str) -> dict[Any, str]:
        if arguments not in known:
            folder = tmp_path_factory.mktemp("alone")
            known[arguments], code = Training(folder, str(folder / "root"), None, *arguments).run()
            assert code == 0
        return known[arguments]

    return losses


EXIT_PREEMPTED = 143
TWO = ("--ranks", "2")


@pytest.mark.parametrize(
    ("arguments", "halt"),
    [
        pytest.param((), 10, id="in an epoch"),
        pytest.param((), IN_SAVE, id="in a save"),
        pytest.param((), AFTER_COMMIT, id="between a commit and the removal of what it replaces"),
        pytest.param(("--background",), IN_SAVE, id="in a save in the background"),
        pytest.param(TWO, 10, id="DDP, in an epoch", marks=pytest.mark.slow),
        pytest.param(TWO, IN_SAVE, id="DDP, in a save"),
        pytest.param((*TWO, "--shard"), 10, id="FSDP2, in an epoch"),
        pytest.param((*TWO, "--shard"), IN_SAVE, id="FSDP2, in a save", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_goes_on_elsewhere_with_the_same_losses(
    tmp_path: Path,
    s3_url: FreshPrefix,
    alone: Callable[..., dict[Any, str]],
    arguments: tuple[str, ...],
    halt: int | str,
) -> None:
    training = Training(tmp_path, s3_url.url, s3_url.storage_options, *arguments)
    before, code = training.run(halt=halt)
    assert code == -signal.SIGKILL
    after, code = training.run()
    assert code == 0
    assert 0 < min(step for _, step in after) <= max(step for _, step in before) + 1, "it began anew, or lost steps"
    reference = alone(*(one for one in arguments if one != "--background"))
    assert before | after == reference
    assert after == {key: loss for key, loss in reference.items() if key in after}


@pytest.mark.parametrize("arguments", [(), TWO], ids=["1 rank", "DDP"])
def test_a_run_that_is_told_to_end_saves_where_it_is(
    tmp_path: Path, s3_url: FreshPrefix, alone: Callable[..., dict[Any, str]], arguments: tuple[str, ...]
) -> None:
    training = Training(tmp_path, s3_url.url, s3_url.storage_options, *arguments)
    before, code = training.run(halt=7, strike=signal.SIGTERM)
    # Lightning kills the others of a rank that it has started and that ends otherwise.
    assert code == (0 if arguments else EXIT_PREEMPTED)
    after, code = training.run()
    assert code == 0
    assert min(step for _, step in after) == max(step for _, step in before) + 1, "steps were lost"
    assert before | after == alone(*arguments)


@pytest.mark.slow
def test_what_two_ranks_have_sharded_goes_on_with_one_and_is_read_whole(tmp_path: Path, s3_url: FreshPrefix) -> None:
    of_two, options = (*TWO, "--shard", "--epochs", "1"), s3_url.storage_options
    before, code = Training(tmp_path, s3_url.url, options, *of_two).run()
    assert code == 0
    io = CloudCheckpointIO(s3_url.url, local=tmp_path, storage_options=options)
    read = torch.load(tmp_path / "checkpoints" / "last.ckpt")
    assert read["state_dict"]["net.0.weight"].shape == (32, 16)
    assert read["hyper_parameters"] == {"width": 32}
    io.teardown()
    (tmp_path / "one").mkdir()
    after, code = Training(tmp_path / "one", s3_url.url, options, "--ranks", "1", "--shard").run()
    assert code == 0
    assert min(step for _, step in after) == max(step for _, step in before) + 1


# -- in this process ---------------------------------------------------------------------------------------------


class Model(BoringModel):  # type: ignore[misc]
    def __init__(self, width: int = 3, extra: object = None) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, index: int) -> Any:
        found = super().training_step(batch, index)
        self.log("loss", found["loss"])
        return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own as the one where the program runs."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "root")


def trainer_of(io: Any, epochs: int, **more: Any) -> Any:
    arguments: dict[str, Any] = {"monitor": "loss", "save_top_k": 2, "save_last": True} | more
    return lightning.Trainer(
        plugins=[io],
        callbacks=[ModelCheckpoint("checkpoints", **arguments), CloudRandomState()],
        max_epochs=epochs, limit_train_batches=2, limit_val_batches=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip


def names_in(root: str) -> list[str]:
    with CheckpointManager(root, save_rng=False, progress="off") as manager:
        return sorted(str(one.metadata["lightning"]["path"]) for one in manager.checkpoints())  # type: ignore[index]


def test_the_root_holds_what_lightning_keeps_and_no_more(here: Path, root: str) -> None:
    trainer = trainer_of(CloudCheckpointIO(root), 4)
    trainer.fit(Model())
    kept = sorted(f"checkpoints/{path.name}" for path in (here / "checkpoints").iterdir())
    assert len(kept) == 3
    assert names_in(root) == kept
    assert all(_is_stub(here / name) for name in kept)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_top_k": -1, "save_last": None},
        {"save_top_k": 0, "save_last": True},
        {"save_top_k": 1, "mode": "max", "filename": "best"},
        {"monitor": None, "every_n_train_steps": 1, "save_top_k": 1},
        {"monitor": None, "filename": "same", "save_top_k": -1, "every_n_epochs": 1},
        {"enable_version_counter": False, "filename": "same", "save_top_k": 2},
        {"save_top_k": 2, "save_last": "link"},
        {"save_weights_only": True},
        {"every_n_epochs": 2, "filename": "deep/{epoch}-{loss:.3f}"},
    ],
    ids=str,
)
def test_names_and_contents_are_those_of_files(here: Path, root: str, arguments: dict[str, Any]) -> None:
    kept: list[dict[str, Any]] = []
    for make in (TorchCheckpointIO, lambda: CloudCheckpointIO(root)):
        can_resume = "save_weights_only" not in arguments  # Lightning itself refuses to go on from these
        for epochs, start in ((2, None), (4, "last" if can_resume else None)):
            lightning.seed_everything(1)
            trainer = trainer_of(make(), epochs, **arguments)
            trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, CloudRandomState)]
            trainer.fit(Model(), ckpt_path=start)
        folder = here / "checkpoints"
        kept.append({str(one): torch.load(one) for one in sorted(folder.rglob("*.ckpt"))})
        shutil.rmtree(folder)
    stock, ours = kept
    assert list(stock) == list(ours)
    assert all(same(stock[name], ours[name]) for name in stock)


def test_last_is_found_where_no_file_is(here: Path, root: str) -> None:
    trainer_of(CloudCheckpointIO(root), 2).fit(Model())
    for path in (here / "checkpoints").iterdir():
        path.unlink()
    trainer = trainer_of(CloudCheckpointIO(root), 3)
    trainer.fit(Model(), ckpt_path="last")
    assert trainer.global_step == 6


def test_a_model_is_loaded_from_a_stub_with_its_hyperparameters(here: Path, root: str) -> None:
    trainer = trainer_of(CloudCheckpointIO(root), 2)
    model = Model(width=5)
    trainer.fit(model)
    loaded = Model.load_from_checkpoint(here / "checkpoints" / "last.ckpt")
    assert loaded.hparams.width == 5
    assert torch.equal(loaded.layer.weight, model.layer.weight)


def test_the_best_is_tested_after_training(here: Path, root: str) -> None:
    trainer = trainer_of(CloudCheckpointIO(root), 2)
    trainer.fit(Model())
    trainer.test(ckpt_path="best", verbose=False)
    assert trainer.ckpt_path == trainer.checkpoint_callback.best_model_path


def test_a_stub_leads_to_no_root_that_this_process_has_not_opened(
    here: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    CloudCheckpointIO(root).save_checkpoint({"a": 1}, "x.ckpt")
    monkeypatch.setattr("cloudckpt.integrations.lightning._ROOTS", {})
    with pytest.raises(CheckpointNotFoundError, match=r"first make CloudCheckpointIO\('file://.*root'\)"):
        torch.load(here / "x.ckpt")


def test_a_path_is_saved_again_and_stands_for_the_newer(here: Path, root: str) -> None:
    io = CloudCheckpointIO(root)
    for number in range(3):
        io.save_checkpoint({"number": number, "epoch": 0, "global_step": number}, "x.ckpt")
    assert io.load_checkpoint("x.ckpt")["number"] == 2
    assert names_in(root) == ["x.ckpt"]


def test_a_linked_name_loads_what_it_links_to(here: Path, root: str) -> None:
    trainer = trainer_of(CloudCheckpointIO(root), 2, save_last="link", save_top_k=1)
    trainer.fit(Model())
    assert (here / "checkpoints" / "last.ckpt").is_symlink()
    again = trainer_of(CloudCheckpointIO(root), 3)
    again.fit(Model(), ckpt_path="last")
    assert again.global_step == 6


def test_a_file_of_torch_save_is_loaded_and_removed_as_ever(here: Path, root: str) -> None:
    torch.save({"epoch": 3}, here / "old.ckpt")
    io = CloudCheckpointIO(root)
    assert io.load_checkpoint("old.ckpt") == {"epoch": 3}
    io.remove_checkpoint("old.ckpt")
    assert not (here / "old.ckpt").exists()


def test_a_path_without_a_checkpoint_is_named_with_those_that_there_are(here: Path, root: str) -> None:
    io = CloudCheckpointIO(root)
    io.save_checkpoint({"a": 1}, "runs/x.ckpt")
    with pytest.raises(CheckpointNotFoundError, match=r"^Checkpoint file not found: runs/y.ckpt .*there: runs/x.ckpt"):
        io.load_checkpoint("runs/y.ckpt")
    assert io.load_checkpoint(f"{io.url}/runs/x.ckpt") == {"a": 1}


def test_what_cannot_be_done_is_refused_with_what_can(here: Path, root: str) -> None:
    io = CloudCheckpointIO(root)
    with pytest.raises(OptionsError, match="give storage_options to CloudCheckpointIO"):
        io.save_checkpoint({}, "x.ckpt", storage_options={"key": "k"})
    with pytest.raises(OptionsError, match="give ModelCheckpoint and save_checkpoint a local path"):
        io.save_checkpoint({}, "s3://bucket/x.ckpt")
    with pytest.raises(OptionsError, match="is not below"):
        io.load_checkpoint("s3://bucket/x.ckpt")
    with pytest.raises(UnsupportedValueError, match=r"hyper_parameters\.net is a Linear.*ignore="):
        io.save_checkpoint({"hyper_parameters": {"net": nn.Linear(1, 1)}}, "x.ckpt")
    (here / "folder.ckpt").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.ckpt"):
        io.save_checkpoint({}, "folder.ckpt")
    assert names_in(root) == []


def test_a_stub_of_what_is_gone_goes_and_files_of_others_stay(here: Path, root: str) -> None:
    io = CloudCheckpointIO(root)
    for name in ("x.ckpt", "y.ckpt"):
        io.save_checkpoint({"a": 1}, name)
    stub = (here / "x.ckpt").read_bytes()
    io.remove_checkpoint("x.ckpt")
    (here / "x.ckpt").write_bytes(stub)
    (here / "y.ckpt").write_bytes(b"a file of another program")
    torch.save({}, here / "z.ckpt")
    CloudCheckpointIO(root)
    assert sorted(path.name for path in here.iterdir()) == ["y.ckpt", "z.ckpt"]
    assert (here / "y.ckpt").read_bytes() == b"a file of another program"


def test_nothing_is_laid_outside_of_the_local_folder(here: Path, root: str, caplog: pytest.LogCaptureFixture) -> None:
    outside = here.parent / "outside" / "x.ckpt"
    CloudCheckpointIO(root).save_checkpoint({"a": 1}, outside)
    outside.unlink()
    CloudCheckpointIO(root)
    assert not outside.exists()
    assert "give CloudCheckpointIO local= a folder above them" in caplog.text
    CloudCheckpointIO(root, local=here.parent)
    assert outside.exists()


def test_what_is_pinned_stays_when_lightning_removes_it(here: Path, root: str) -> None:
    io = CloudCheckpointIO(root)
    io.save_checkpoint({"a": 1}, "x.ckpt")
    io.manager().pin(0)
    io.save_checkpoint({"a": 2}, "x.ckpt")
    assert io.load_checkpoint("x.ckpt") == {"a": 2}
    assert names_in(root) == ["x.ckpt", "x.ckpt"]


def test_a_save_in_the_background_is_seen_by_the_next_call(here: Path, root: str) -> None:
    io = CloudCheckpointIO(root, background=True)
    tensor = torch.zeros(3)
    io.save_checkpoint({"w": tensor}, "x.ckpt")
    tensor += 1
    assert torch.equal(io.load_checkpoint("x.ckpt")["w"], torch.zeros(3))
    io.save_checkpoint({"w": tensor}, "x.ckpt")
    io.teardown()
    assert names_in(root) == ["x.ckpt"]


def test_a_job_that_another_has_followed_saves_no_more(here: Path, root: str) -> None:
    older, newer = CloudCheckpointIO(root), CloudCheckpointIO(root)
    older.save_checkpoint({"a": 1}, "x.ckpt")
    newer.save_checkpoint({"a": 2}, "x.ckpt")
    with pytest.raises(FencedError):
        older.save_checkpoint({"a": 3}, "x.ckpt")
    assert newer.load_checkpoint("x.ckpt") == {"a": 2}


def test_it_goes_to_another_process_without_its_manager(here: Path, root: str) -> None:
    io = CloudCheckpointIO(root)
    io.save_checkpoint({"a": 1}, "x.ckpt")
    assert pickle.loads(pickle.dumps(io)).load_checkpoint("x.ckpt") == {"a": 1}


def test_a_strategy_that_saves_past_the_plugin_is_refused_before_training(here: Path, root: str) -> None:
    strategy = lightning.pytorch.strategies.ModelParallelStrategy()
    strategy.checkpoint_io = CloudCheckpointIO(root)
    with pytest.raises(OptionsError, match="take CloudModelParallelStrategy"):
        CloudRandomState().setup(SimpleNamespace(strategy=strategy), None, "fit")


def test_a_strategy_of_ours_wants_the_plugin_before_training(here: Path) -> None:
    with pytest.raises(OptionsError, match=r"call Trainer\(plugins=\[CloudCheckpointIO\(url\)\]"):
        CloudModelParallelStrategy().setup(None)


def test_a_run_that_would_not_be_saved_at_its_end_is_refused_before_training() -> None:
    with pytest.raises(OptionsError, match="give ModelCheckpoint save_on_exception=True"):
        CloudPreemption().on_train_start(SimpleNamespace(callbacks=[ModelCheckpoint("checkpoints")]), None)


def test_fabric_saves_and_loads_a_state(here: Path, root: str) -> None:
    fabric = lightning.Fabric(plugins=[CloudCheckpointIO(root)], accelerator="cpu", devices=1)
    model = nn.Linear(2, 2)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "step": 7}
    fabric.save("checkpoints/x.ckpt", state)
    weight = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    state["step"] = 0
    fabric.load("checkpoints/x.ckpt", state)
    assert state["step"] == 7
    assert torch.equal(model.weight, weight)


def test_tensors_come_to_the_device_that_is_asked_for(here: Path, root: str) -> None:
    io = CloudCheckpointIO(root)
    io.save_checkpoint({"nested": [{"w": torch.ones(2)}]}, "x.ckpt")
    assert io.load_checkpoint("x.ckpt", map_location="meta")["nested"][0]["w"].device.type == "meta"
    with pytest.raises(OptionsError, match="give a device"):
        io.load_checkpoint("x.ckpt", map_location={"cuda:0": "cpu"})


def test_a_checkpoint_is_read_without_lightning(here: Path, root: str) -> None:
    trainer = trainer_of(CloudCheckpointIO(root), 1)
    model = Model()
    trainer.fit(model)
    with CheckpointManager(root, save_rng=False, progress="off") as manager:
        newest = manager.checkpoints()[-1]
    assert newest.metrics == {"epoch": 0.0, "global_step": 2.0}
    read: Any = cloudckpt.read(newest.url, "state_dict.*", progress="off")
    assert torch.equal(read["state_dict"]["layer.weight"], model.layer.weight)


# -- what a path means on this machine ---------------------------------------------------------------------------


def numbered(number: int) -> dict[str, Any]:
    return {"w": torch.full((2,), float(number)), "epoch": number, "global_step": number}


def step_of(io: CloudCheckpointIO, path: str | Path) -> int:
    return int(io.load_checkpoint(path)["global_step"])


def link_as_lightning_does(place: Path, target: str) -> None:
    place.unlink(missing_ok=True)
    place.symlink_to(target)


def test_a_run_that_begins_to_link_its_last_goes_on_from_what_is_linked(here: Path, root: str) -> None:
    every = {"save_top_k": -1, "monitor": None}
    trainer_of(CloudCheckpointIO(root), 1, **every).fit(Model())
    for epochs in (3, 4):
        trainer = trainer_of(CloudCheckpointIO(root), epochs, save_last="link", **every)
        trainer.fit(Model(), ckpt_path="last")
        assert step_of(trainer.strategy.checkpoint_io, "checkpoints/last.ckpt") == 2 * epochs
        names = [path.name for path in (here / "checkpoints").iterdir()]
        assert not [name for name in names if "-v" in name], "epochs were run again"


def test_a_link_to_what_is_newer_stays_and_wins_over_what_was_saved_there(here: Path, root: str) -> None:
    io = CloudCheckpointIO(root)
    io.save_checkpoint(numbered(1), "last.ckpt")
    io.save_checkpoint(numbered(2), "two.ckpt")
    link_as_lightning_does(here / "last.ckpt", "two.ckpt")
    # Whatever the clock says: what it leads to was not there before.
    os.utime(here / "last.ckpt", (0, 0), follow_symlinks=False)
    again = CloudCheckpointIO(root)
    assert (here / "last.ckpt").is_symlink()
    assert step_of(again, "last.ckpt") == 2
    assert torch.load(here / "last.ckpt")["global_step"] == 2


@pytest.mark.parametrize(("age_s", "step"), [(3600, 1), (-3600, 2)], ids=["later", "earlier"])
def test_a_link_to_what_is_older_wins_if_it_was_made_later(here: Path, root: str, age_s: int, step: int) -> None:
    io = CloudCheckpointIO(root)
    io.save_checkpoint(numbered(1), "one.ckpt")
    io.save_checkpoint(numbered(2), "last.ckpt")
    link_as_lightning_does(here / "last.ckpt", "one.ckpt")
    saved = io.find(io.place("one.ckpt"))
    assert saved is not None
    made = saved.created_at.timestamp() + age_s
    os.utime(here / "last.ckpt", (made, made), follow_symlinks=False)
    again = CloudCheckpointIO(root)
    assert step_of(again, "last.ckpt") == step
    assert torch.load(here / "last.ckpt")["global_step"] == step


def test_a_later_link_to_nothing_is_told_and_a_save_replaces_it(here: Path, root: str) -> None:
    io = CloudCheckpointIO(root)
    io.save_checkpoint(numbered(1), "last.ckpt")
    link_as_lightning_does(here / "last.ckpt", "gone.ckpt")
    os.utime(here / "last.ckpt", (2**33, 2**33), follow_symlinks=False)
    with pytest.raises(CheckpointNotFoundError, match=r"last\.ckpt"):
        CloudCheckpointIO(root).load_checkpoint("last.ckpt")
    io.save_checkpoint(numbered(2), "last.ckpt")
    assert not (here / "last.ckpt").is_symlink()
    assert step_of(CloudCheckpointIO(root), "last.ckpt") == 2
    assert names_in(root) == ["last.ckpt"]


def test_a_file_under_two_spellings_is_one_checkpoint(here: Path, root: str) -> None:
    scratch = here.parent / "scratch"
    scratch.mkdir()
    (here / "checkpoints").symlink_to(scratch)
    spellings = "checkpoints/x.ckpt", str(scratch / "x.ckpt"), "checkpoints/../scratch/x.ckpt"
    io = CloudCheckpointIO(root)
    for number, spelling in enumerate(spellings):
        io.save_checkpoint(numbered(number), spelling)
        assert [step_of(io, one) for one in spellings] == [number] * 3
        assert torch.load(scratch / "x.ckpt")["global_step"] == number
        assert len(names_in(root)) == 1
    io.remove_checkpoint("checkpoints/x.ckpt")
    assert names_in(root) == []
    assert list(scratch.iterdir()) == []


def test_what_is_saved_through_a_linked_folder_is_found_elsewhere_by_that_name(here: Path, root: str) -> None:
    scratch = here.parent / "scratch"
    scratch.mkdir()
    (here / "checkpoints").symlink_to(scratch)
    CloudCheckpointIO(root).save_checkpoint(numbered(1), "checkpoints/x.ckpt")
    (scratch / "x.ckpt").unlink()
    CloudCheckpointIO(root)
    assert torch.load(scratch / "x.ckpt")["global_step"] == 1
    elsewhere = here.parent / "elsewhere"
    CloudCheckpointIO(root, local=elsewhere)
    assert torch.load(elsewhere / "checkpoints" / "x.ckpt")["global_step"] == 1


def test_a_linked_local_folder_is_the_folder_itself(here: Path, root: str) -> None:
    (here.parent / "link").symlink_to(here)
    CloudCheckpointIO(root, local=here.parent / "link").save_checkpoint(numbered(1), here / "x.ckpt")
    assert step_of(CloudCheckpointIO(root), here.parent / "link" / "x.ckpt") == 1
    assert names_in(root) == ["x.ckpt"]


def test_the_newer_of_two_that_were_saved_when_each_spelling_was_a_path_is_meant(here: Path, root: str) -> None:
    scratch = here.parent / "scratch"
    scratch.mkdir()
    io = CloudCheckpointIO(root)
    # Before the link is there they are two paths, as they were to earlier versions with it.
    io.save_checkpoint(numbered(1), scratch / "x.ckpt")
    io.save_checkpoint(numbered(2), "checkpoints/x.ckpt")
    shutil.rmtree(here / "checkpoints")
    (here / "checkpoints").symlink_to(scratch)
    again = CloudCheckpointIO(root)
    assert step_of(again, scratch / "x.ckpt") == step_of(again, "checkpoints/x.ckpt") == 2
    again.save_checkpoint(numbered(3), "checkpoints/x.ckpt")
    assert names_in(root) == ["checkpoints/x.ckpt"]


def test_what_is_saved_and_gets_no_stub_is_saved_all_the_same(
    here: Path, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    (here / "blocked").mkdir()
    io = CloudCheckpointIO(root)
    io.save_checkpoint(numbered(1), "blocked/x.ckpt")
    shutil.rmtree(here / "blocked")
    (here / "blocked").write_bytes(b"a file where the folder was")
    io.save_checkpoint(numbered(2), "blocked/x.ckpt")
    assert re.search(r"1 stub.* could not be laid.*blocked/x\.ckpt.*saved.*root", caplog.text)
    assert step_of(io, "blocked/x.ckpt") == 2
    assert names_in(root) == ["blocked/x.ckpt"], "what it stood for before stays"
    assert step_of(CloudCheckpointIO(root), "blocked/x.ckpt") == 2, "a new process does not begin"
    io.remove_checkpoint("blocked/x.ckpt")
    assert names_in(root) == []


def test_a_name_as_long_as_a_file_may_have_gets_its_stub(here: Path, root: str) -> None:
    name = "x" * 250 + ".ckpt"
    CloudCheckpointIO(root).save_checkpoint(numbered(1), name)
    assert torch.load(here / name)["global_step"] == 1
    assert [path.name for path in here.iterdir()] == [name]


def test_a_root_takes_no_stub_of_one_whose_name_begins_alike(here: Path, root: str) -> None:
    longer = CloudCheckpointIO(f"{root}0")
    longer.save_checkpoint(numbered(10), "checkpoints/ten.ckpt")
    CloudCheckpointIO(root).save_checkpoint(numbered(1), f"checkpoints/{Path(root).name}0.ckpt")
    CloudCheckpointIO(root)
    assert torch.load(here / "checkpoints" / "ten.ckpt")["global_step"] == 10


def test_a_file_that_only_names_what_a_stub_calls_is_none(here: Path, root: str) -> None:
    io = CloudCheckpointIO(root)
    io.save_checkpoint(numbered(1), "one.ckpt")
    words = f"cloudckpt.integrations.lightning opened {io.url}"
    torch.save({"note": words}, here / "note.ckpt")
    (here / "text.ckpt").write_text(words)
    (here / "cut.ckpt").write_bytes((here / "one.ckpt").read_bytes()[:-30])
    CloudCheckpointIO(root)
    assert torch.load(here / "note.ckpt") == {"note": words}
    assert sorted(path.name for path in here.iterdir()) == ["cut.ckpt", "note.ckpt", "one.ckpt", "text.ckpt"]


def test_a_stub_that_was_copied_means_what_it_names(here: Path, root: str) -> None:
    io = CloudCheckpointIO(root)
    io.save_checkpoint(numbered(1), "last.ckpt")
    io.save_checkpoint(numbered(2), "two.ckpt")
    # As Lightning does where links cannot be made.
    for name in ("last.ckpt", "copy.ckpt"):
        shutil.copy(here / "two.ckpt", here / name)
    again = CloudCheckpointIO(root)
    for name in ("last.ckpt", "copy.ckpt"):
        assert step_of(again, name) == torch.load(here / name)["global_step"] == 2


def test_tensors_in_every_container_come_to_the_device(here: Path, root: str) -> None:
    def containers() -> Iterator[tuple[str, Any]]:
        one = torch.ones(1)
        yield from {
            "tuple": (one, [one, (one,)]),
            "ordered": OrderedDict(a=(one,)),
            "defaultdict": defaultdict(list, a=[one]),
            "deque": deque([one, (one,)], maxlen=3),
            "namespace": Namespace(a=(one, Namespace(b=one)), c=1),
            "keys": {(1, 2): one},
        }.items()

    io = CloudCheckpointIO(root)
    io.save_checkpoint(dict(containers()), "x.ckpt")
    read, moved = io.load_checkpoint("x.ckpt"), io.load_checkpoint("x.ckpt", map_location="meta")
    assert str(moved).count("device='meta'") == str(read).count("tensor(") == 10
    for name, value in containers():
        assert type(moved[name]) is type(value)
    assert moved["deque"].maxlen == 3
