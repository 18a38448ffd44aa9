"""An import holds what its source holds, bit for bit beside the reader of that, and is a checkpoint like others."""

from __future__ import annotations

import json
import os
import signal
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

import cloudckpt
from cloudckpt import CheckpointExistsError, CheckpointManager, Options, OptionsError, SourceError
from cloudckpt.convert import blob, from_torch, importing
from cloudckpt.store import RetryingStore, open_store
from tests.convert.alike import assert_alike, of_every_dtype, training

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
# A tensor of some hundred bytes is cut as one of many megabytes is.
SMALL = Options(shard_bytes=128)


def imported(source: Path | str, url: Path | str, **options: Any) -> cloudckpt.Checkpoint:
    return cloudckpt.import_(source, url, **{"options": SMALL, **options}, progress="off")


def read(checkpoint: cloudckpt.Checkpoint) -> dict[str, Any]:
    return cloudckpt.read(checkpoint.url, progress="off")


def lightning() -> dict[str, Any]:
    """Return what Lightning writes to a `.ckpt`, of what it admits."""
    model, optimizer, scheduler = training()
    best = {"best_model_score": torch.tensor(float("inf")), "best_k_models": {}, "monitor": "loss", "wait": 0}
    return {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4, "completed": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": best},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
        "hparams_name": "kwargs",
        "hyper_parameters": OrderedDict(lr=0.01, nan=float("inf")),
    }


# -- torch ----------------------------------------------------------------------------------------------------


def test_a_file_of_torch_save_is_imported_as_torch_load_reads_it(tmp_path: Path) -> None:
    state = {"all": of_every_dtype(), "nested": [1, (2.5, torch.ones(2)), {"a": None, 3: torch.arange(4)}]}
    torch.save(state, tmp_path / "x.pt")
    assert_alike(torch.load(tmp_path / "x.pt", weights_only=True), read(imported(tmp_path / "x.pt", tmp_path / "out")))


def test_an_older_file_of_torch_save_is_imported_if_it_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"w": whole, "t": whole.T, "n": [1]}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    wanted = torch.load(tmp_path / "x.pt", weights_only=True)
    assert_alike(wanted, read(imported(tmp_path / "x.pt", tmp_path / "out")))
    monkeypatch.setattr(from_torch, "_OLDER_LIMIT_BYTES", 100)
    with pytest.raises(SourceError, match="write it anew"):
        imported(tmp_path / "x.pt", tmp_path / "other")


def test_a_lightning_file_is_imported_whole_and_its_model_is_loaded_from_it(tmp_path: Path) -> None:
    torch.save(lightning(), tmp_path / "last.ckpt")
    checkpoint = imported(tmp_path / "last.ckpt", tmp_path / "out")
    assert_alike(lightning(), read(checkpoint), types=False)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    cloudckpt.load({"state_dict": model}, checkpoint.url, strict=False, progress="off")
    assert_alike(training()[0].state_dict(), model.state_dict())


def test_views_of_one_memory_are_imported_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(60.0).view(6, 10)
    state = {
        "whole": whole,
        "part": whole[1:4, 2:7],
        "turned": whole.T,
        "one": whole[2, 3],
        "wide": torch.ones(1).expand(3, 4),
    }
    state["conjugate"] = torch.randn(5, dtype=torch.complex64).conj()
    state["negative"] = torch.randn(3, 4, dtype=torch.complex64).conj().T.imag
    torch.save(state, tmp_path / "x.pt")
    assert_alike(torch.load(tmp_path / "x.pt", weights_only=True), read(imported(tmp_path / "x.pt", tmp_path / "out")))


def test_what_was_one_memory_can_be_loaded_where_it_is_one_memory(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        model[1].weight = model[0].weight  # type: ignore[assignment]
        return model

    source, target = tied(), tied()
    torch.save({"model": source.state_dict()}, tmp_path / "x.pt")
    cloudckpt.load({"model": target}, imported(tmp_path / "x.pt", tmp_path / "out").url, progress="off")
    assert_alike(source.state_dict(), target.state_dict())


def test_a_parameter_and_the_version_of_a_state_dict_are_kept(tmp_path: Path) -> None:
    torch.save({"p": {"q": nn.Parameter(torch.ones(2))}, "m": training()[0].state_dict()}, tmp_path / "x.pt")
    checkpoint = imported(tmp_path / "x.pt", tmp_path / "out")
    cloudckpt.export(checkpoint.url, tmp_path / "y.pt", to="torch", progress="off")
    again = torch.load(tmp_path / "y.pt", weights_only=True)
    assert type(again["p"]["q"]) is nn.Parameter
    assert again["m"]._metadata == training()[0].state_dict()._metadata


def test_large_values_are_imported_beside_the_tensors(tmp_path: Path) -> None:
    state = {"text": "long " * 50_000, "raw": bytearray(b"x" * 300_000), "w": torch.ones(3)}
    torch.save(state, tmp_path / "x.pt")
    assert_alike(state, read(imported(tmp_path / "x.pt", tmp_path / "out", options=None)))


# -- safetensors and Hugging Face -----------------------------------------------------------------------------


def test_a_safetensors_file_is_imported_as_its_package_reads_it(tmp_path: Path) -> None:
    held = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in of_every_dtype().items()
        if name.partition(".")[0] not in ("complex128", "complex32", "float8_e8m0fnu", "float4_e2m1fn_x2")
    }
    safetensors.torch.save_file(held, tmp_path / "x.safetensors")
    found = read(imported(tmp_path / "x.safetensors", tmp_path / "out"))
    assert_alike(held, found, types=False)


def test_a_header_whose_length_looks_like_a_pickle_is_one_of_safetensors(tmp_path: Path) -> None:
    text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(0x0280)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert (tmp_path / "x.safetensors").read_bytes().startswith(b"\x80\x02")
    assert read(imported(tmp_path / "x.safetensors", tmp_path / "out"))["w"].tolist() == [0.0, 0.0]


def hugging_face(folder: Path, *, kinds: tuple[str, ...], shards: int = 2) -> dict[str, torch.Tensor]:
    """Make a folder with a model in several files of some kinds; each kind holds other numbers."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    held = dict(training()[0].state_dict())
    for kind in kinds:
        numbers = held if kind == kinds[0] else {name: tensor + 1 for name, tensor in held.items()}
        stem, save = ("model", safetensors.torch.save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
        names: dict[str, str] = {}
        for number in range(shards):
            file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{kind}" if shards > 1 else f"{stem}.{kind}"
            part = dict(list(numbers.items())[number::shards])
            names |= dict.fromkeys(part, file)
            save(part, folder / file)
        if shards > 1:
            (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return held


@pytest.mark.parametrize("kinds", [("safetensors",), ("bin",), ("safetensors", "bin")])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_hugging_face_folder_is_imported_from_safetensors_if_it_has_them(
    kinds: tuple[str, ...], shards: int, tmp_path: Path
) -> None:
    held = hugging_face(tmp_path / "hf", kinds=kinds, shards=shards)
    checkpoint = imported(tmp_path / "hf", tmp_path / "out", under="model")
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    cloudckpt.load({"model": model}, checkpoint.url, progress="off")
    assert_alike(held, dict(model.state_dict()))


def test_an_index_by_itself_is_a_source(tmp_path: Path) -> None:
    held = hugging_face(tmp_path / "hf", kinds=("safetensors",))
    checkpoint = imported(tmp_path / "hf" / "model.safetensors.index.json", tmp_path / "out")
    assert_alike(held, read(checkpoint), types=False)


# -- DCP ------------------------------------------------------------------------------------------------------


def test_a_dcp_folder_is_imported_as_stock_dcp_loads_it(tmp_path: Path) -> None:
    model, optimizer, _ = training()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "every": {name: tensor for name, tensor in of_every_dtype().items() if "fn_x2" not in name},
        "list": [torch.ones(2), {"deep": torch.zeros(3)}],
        "pair": (torch.ones(3), "x"),
        "step": 5,
    }
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    assert_alike(state, read(imported(tmp_path / "dcp", tmp_path / "out")), types=False)


# -- what becomes of it ---------------------------------------------------------------------------------------


def test_an_import_is_a_step_of_a_root_like_any_other(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "root", progress="off") as manager:
        manager.save(1, {"w": torch.ones(2)})
    torch.save({"w": torch.full((2,), 9.0)}, tmp_path / "x.pt")
    made = imported(tmp_path / "x.pt", tmp_path / "root", step=40, metrics={"loss": 0.5}, metadata={"why": "base"})
    assert (made.step, made.metrics) == (40, {"loss": 0.5})
    assert made.metadata == {"why": "base", "imported_from": (tmp_path / "x.pt").as_uri()}
    state = {"w": torch.zeros(2)}
    with CheckpointManager(tmp_path / "root", progress="off") as manager:
        restored = manager.restore(state)
        assert restored is not None
        assert (restored.step, state["w"].tolist()) == (40, [9.0, 9.0])
        manager.save(41, state)


def test_a_checkpoint_that_is_there_is_replaced_only_when_that_was_asked_for(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    torch.save({"w": torch.zeros(2)}, tmp_path / "y.pt")
    first = imported(tmp_path / "x.pt", tmp_path / "out")
    with pytest.raises(CheckpointExistsError):
        imported(tmp_path / "y.pt", tmp_path / "out")
    assert read(first)["w"].tolist() == [1.0, 1.0]
    assert read(imported(tmp_path / "y.pt", tmp_path / "out", exists="replace"))["w"].tolist() == [0.0, 0.0]


def test_a_step_that_is_there_is_not_imported_once_more(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    imported(tmp_path / "x.pt", tmp_path / "root", step=3)
    with pytest.raises(CheckpointExistsError):
        imported(tmp_path / "x.pt", tmp_path / "root", step=3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "pickle"}, "give one of auto"),
        ({"step": -1}, "step"),
        ({"step": 1, "exists": "replace"}, "for a URL of its own"),
        ({"metadata": {"imported_from": lambda: 0}}, "imported_from"),
    ],
)
def test_a_wrong_call_is_refused_and_nothing_is_committed(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises((OptionsError, cloudckpt.UnsupportedValueError), match=said):
        imported(tmp_path / "x.pt", tmp_path / "out", **options)
    assert list((tmp_path / "out").rglob("manifest.json")) == []


@pytest.mark.parametrize(("leaving_s", "said"), [(60.0, "what was written is removed"), (0.0, "shards may stay below")])
@pytest.mark.parametrize("step", [None, 3])
def test_an_interrupt_removes_what_is_still_being_put_or_says_that_it_may_stay(
    leaving_s: float, said: str, step: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.arange(100)}, tmp_path / "x.pt")
    put, ended = RetryingStore.put, threading.Event()

    def slow(store: RetryingStore, key: str, buffers: Sequence[memoryview]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)  # the interrupt is told meanwhile
        put(store, key, buffers)
        ended.set()

    monkeypatch.setattr(RetryingStore, "put", slow)
    monkeypatch.setattr(importing, "LEAVING_S", leaving_s)
    with pytest.raises(KeyboardInterrupt) as raised:
        cloudckpt.import_(tmp_path / "x.pt", tmp_path / "out", step=step, progress="off")
    assert ended.wait(60)
    (note,) = raised.value.__notes__
    assert said in note
    if leaving_s:
        assert list((tmp_path / "out").rglob("*.safetensors*")) == []
    elif step is not None:
        assert f"cloudckpt sweep {(tmp_path / 'out').as_uri()}" in note


def test_an_interrupt_while_pytorch_reads_is_no_broken_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.arange(100)}, tmp_path / "x.pt")
    calls, at, load, armed = 0, 0, torch.load, None

    def interrupting(name: str) -> None:
        call = vars(blob._Raw).get(name) or vars(blob.SizedFile)[name]

        def called(raw: blob._Raw, *args: Any) -> object:
            nonlocal calls, armed
            calls += raw is armed
            if raw is armed and calls == at:
                armed = None
                signal.raise_signal(signal.SIGINT)
            return call(raw, *args)

        monkeypatch.setattr(blob._Raw, name, called, raising=False)

    def loading(file: Any, **kwargs: Any) -> object:
        nonlocal calls, armed
        calls, armed = 0, file.raw
        return load(file, **kwargs)

    for name in ("readinto", "seek", "tell"):
        interrupting(name)
    monkeypatch.setattr(torch, "load", loading)
    with open_store(tmp_path) as store:
        source = blob.Blob.of(store, "x.pt")
        from_torch.Archive.open(source)
        for at in range(1, calls + 1):  # noqa: B007
            with pytest.raises(KeyboardInterrupt):
                from_torch.Archive.open(source)


def test_an_interrupt_after_the_commit_is_told_that_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.arange(100)}, tmp_path / "x.pt")
    close, todo = RetryingStore.close, [KeyboardInterrupt()]

    def interrupted(store: RetryingStore) -> None:
        close(store)
        if todo:
            raise todo.pop()

    monkeypatch.setattr(RetryingStore, "close", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        imported(tmp_path / "x.pt", tmp_path / "out")
    assert raised.value.__notes__ == [f"{(tmp_path / 'out').as_uri()} is committed"]
