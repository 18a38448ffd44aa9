"""An export holds what the checkpoint holds, bit for bit, by the readers that it is made for; or it is refused."""

from __future__ import annotations

import json
import os
import zipfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

import cloudckpt
from cloudckpt import CheckpointManager, ChecksumError, Options, OptionsError, UnsupportedValueError
from cloudckpt.convert import opened
from servers import FreshPrefix
from tests.convert.alike import assert_alike, bits, of_every_dtype, training

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tensor of some hundred bytes be cut as one of many megabytes is."""
    monkeypatch.setattr(opened, "PART_BYTES", 100)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    model, optimizer, scheduler = training()
    nested = {"a": [torch.randn(4, 5), (torch.randn(3), 1)], "plain": {"lr": 0.1, "names": ["x", "y"]}, "step": 7}
    ordered = OrderedDict(w=torch.ones(2))
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "nested": nested, "ordered": ordered}
    return cloudckpt.save(state, tmp_path / "saved", options=Options(shard_bytes=512), progress="off").url


def exported(url: str, target: Path | str, to: Any, **options: Any) -> cloudckpt.Exported:
    return cloudckpt.export(url, target, to=to, progress="off", **options)


# -- torch ----------------------------------------------------------------------------------------------------


def test_a_torch_export_is_read_as_the_checkpoint_is(saved: str, tmp_path: Path) -> None:
    done = exported(saved, tmp_path / "x.pt", "torch")
    read = torch.load(tmp_path / "x.pt", weights_only=True)
    assert_alike(cloudckpt.read(saved, progress="off"), read)
    assert read["model"]._metadata == training()[0].state_dict()._metadata
    assert (done.files, done.left_out, done.total_bytes) == (("x.pt",), {}, (tmp_path / "x.pt").stat().st_size)


def test_a_torch_export_has_every_dtype(tmp_path: Path) -> None:
    state = of_every_dtype()
    cloudckpt.save(dict(state), tmp_path / "saved", progress="off")
    exported(str(tmp_path / "saved"), tmp_path / "x.pt", "torch")
    assert_alike(state, torch.load(tmp_path / "x.pt", weights_only=True))


def test_the_sums_of_a_torch_export_are_right(saved: str, tmp_path: Path) -> None:
    exported(saved, tmp_path / "x.pt", "torch")
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None


def test_a_torch_export_keeps_parameters(tmp_path: Path) -> None:
    state: dict[str, Any] = {"p": nn.Parameter(torch.ones(3)), "g": torch.ones(2, requires_grad=True)}
    cloudckpt.save({"held": state}, tmp_path / "saved", progress="off")
    exported(str(tmp_path / "saved"), tmp_path / "x.pt", "torch")
    read = torch.load(tmp_path / "x.pt", weights_only=True)["held"]
    assert type(read["p"]) is nn.Parameter
    assert read["g"].requires_grad


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (deque([1]), "bad"),
        (Path("x"), "bad"),
        (defaultdict(list, k=torch.ones(1)), "bad.k"),
    ],
)
@pytest.mark.parametrize("to", ["torch", "dcp"])
def test_a_value_that_torch_would_call_code_is_refused_by_name_or_left_out(
    value: object, name: str, to: str, tmp_path: Path
) -> None:
    cloudckpt.save({"bad": value, "good": torch.ones(2)}, tmp_path / "saved", progress="off")
    with pytest.raises(UnsupportedValueError, match=repr(name)) as refused:
        exported(str(tmp_path / "saved"), tmp_path / "out", to)
    assert refused.value.key == name
    assert not (tmp_path / "out").exists()
    assert list(exported(str(tmp_path / "saved"), tmp_path / "out", to, leave_out=True).left_out) == [name]


# -- safetensors and Hugging Face -----------------------------------------------------------------------------


def test_a_safetensors_export_holds_the_tensors_below_the_prefix(saved: str, tmp_path: Path) -> None:
    done = exported(saved, tmp_path / "x.safetensors", "safetensors", prefix="model.")
    assert_alike(training()[0].state_dict(), read_safetensors(tmp_path), types=False)
    assert {why for name, why in done.left_out.items() if name.startswith("optimizer.")} == {
        "it is not below the prefix 'model.'"
    }


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def test_a_safetensors_export_has_every_dtype_that_it_can_and_refuses_the_others_by_name(tmp_path: Path) -> None:
    state = of_every_dtype()
    cloudckpt.save(dict(state), tmp_path / "saved", progress="off")
    with pytest.raises(UnsupportedValueError, match="safetensors has no name for complex128"):
        exported(str(tmp_path / "saved"), tmp_path / "x.safetensors", "safetensors")
    done = exported(str(tmp_path / "saved"), tmp_path / "x.safetensors", "safetensors", leave_out=True)
    read = read_safetensors(tmp_path)
    assert {name: bits(tensor) for name, tensor in read.items()} == {
        name: bits(tensor) for name, tensor in state.items() if name not in done.left_out
    }
    dtypes = {name.partition(".")[0] for name in done.left_out}
    assert dtypes == {"complex128", "complex32", "float8_e8m0fnu", "float4_e2m1fn_x2"}


def test_safetensors_of_several_files_have_their_index(saved: str, tmp_path: Path) -> None:
    done = exported(saved, tmp_path / "x.safetensors", "safetensors", prefix="model.", max_shard_bytes=150)
    index = json.loads((tmp_path / "x.safetensors.index.json").read_text())
    assert done.files[-1] == "x.safetensors.index.json"
    assert len(done.files) > 3
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / file, "pt") as opened_file:
            assert bits(opened_file.get_tensor(name)) == bits(training()[0].state_dict()[name])
            assert opened_file.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in training()[0].state_dict().values())


def test_values_are_refused_by_name_where_only_tensors_can_be(saved: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedValueError, match=r"'optimizer.param_groups': it is a value.*prefix"):
        exported(saved, tmp_path / "x.safetensors", "safetensors")
    assert list(tmp_path.glob("x*")) == []


def test_tied_tensors_are_refused_by_safetensors_and_left_to_the_model_by_hugging_face(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight  # type: ignore[assignment]
    cloudckpt.save({"model": model}, tmp_path / "saved", progress="off")
    url = str(tmp_path / "saved")
    with pytest.raises(UnsupportedValueError, match=r"'model.1.weight': it is the same memory as '0.weight'"):
        exported(url, tmp_path / "x.safetensors", "safetensors", prefix="model.")
    done = exported(url, tmp_path / "hf", "huggingface", prefix="model.")
    assert list(done.left_out) == ["model.1.weight"]
    with safetensors.safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert list(file.keys()) == ["0.weight"]
        assert file.metadata() == {"format": "pt", "1.weight": "0.weight"}


def test_files_that_describe_a_model_go_beside_its_weights_and_other_weights_do_not(saved: str, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"):
        (tmp_path / "config" / name).write_text(name)
    done = exported(saved, tmp_path / "hf", "huggingface", prefix="model.", config=tmp_path / "config")
    assert done.files == ("config.json", "tokenizer.json", "model.safetensors")
    assert (tmp_path / "hf" / "config.json").read_text() == "config.json"
    assert not (tmp_path / "hf" / "model.safetensors.index.json").exists()


# -- DCP ------------------------------------------------------------------------------------------------------


def test_a_dcp_export_is_loaded_by_stock_dcp(saved: str, tmp_path: Path) -> None:
    exported(saved, tmp_path / "dcp", "dcp")
    wanted = cloudckpt.read(saved, progress="off")
    blank = emptied(wanted)
    dcp.load(blank, checkpoint_id=tmp_path / "dcp")
    assert_alike(wanted, blank, types=False)


def test_a_dcp_export_has_every_dtype(tmp_path: Path) -> None:
    state = of_every_dtype()
    cloudckpt.save(dict(state), tmp_path / "saved", progress="off")
    exported(str(tmp_path / "saved"), tmp_path / "dcp", "dcp")
    found = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
    dcp.load(found, checkpoint_id=tmp_path / "dcp")
    assert_alike(state, found)


def emptied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: emptied(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(emptied(child) for child in value)
    return None


# -- places ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "name"), [("torch", "x.pt"), ("safetensors", "x.safetensors"), ("dcp", "d"), ("huggingface", "h")]
)
def test_an_export_that_is_there_is_replaced_only_when_that_was_asked_for(
    to: str, name: str, saved: str, tmp_path: Path
) -> None:
    options = {"prefix": "model."} if to in ("safetensors", "huggingface") else {}
    exported(saved, tmp_path / name, to, **options)
    before = files_below(tmp_path / name)
    with pytest.raises(OptionsError, match="already, and nothing was written"):
        exported(saved, tmp_path / name, to, **options)
    assert files_below(tmp_path / name) == before
    exported(saved, tmp_path / name, to, overwrite=True, **options)
    after = files_below(tmp_path / name)
    # The files of another folder for DCP have other names, so that the old one is whole until the new one is.
    assert len(after) == len(before) if to == "dcp" else after.keys() == before.keys()


def files_below(path: Path) -> dict[str, bytes]:
    files = path.rglob("*") if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def test_files_of_an_older_export_go_and_those_of_others_stay(saved: str, tmp_path: Path) -> None:
    exported(saved, tmp_path / "hf", "huggingface", prefix="model.", max_shard_bytes=150)
    (tmp_path / "hf" / "README.md").write_text("mine")
    exported(saved, tmp_path / "hf", "huggingface", prefix="model.", overwrite=True)
    assert sorted(files_below(tmp_path / "hf")) == ["README.md", "model.safetensors"]


def test_nothing_that_reads_as_an_export_is_left_where_a_byte_of_the_checkpoint_is_wrong(
    saved: str, tmp_path: Path
) -> None:
    shard = sorted((tmp_path / "saved").rglob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    for to, name in (("torch", "x.pt"), ("dcp", "dcp/.metadata")):
        with pytest.raises(ChecksumError):
            exported(saved, tmp_path / name.split("/", maxsplit=1)[0], to)
        assert not (tmp_path / name).exists()
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


def test_of_a_root_the_newest_checkpoint_is_exported(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "root", progress="off") as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.full((2,), float(step))})
    done = exported(str(tmp_path / "root"), tmp_path / "x.pt", "torch")
    assert "step-0000000002" in done.source
    assert torch.load(tmp_path / "x.pt", weights_only=True)["w"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("to", "target", "options", "said"),
    [
        ("pickle", "x", {}, "give one of safetensors"),
        ("safetensors", "x.bin", {}, "let its name end in .safetensors"),
        ("torch", "x.pt", {"prefix": "model."}, "prefix is for safetensors"),
        ("dcp", "x", {"max_shard_bytes": 5}, "max_shard_bytes is for safetensors"),
        ("torch", "x.pt", {"config": "c"}, "config is for huggingface"),
        ("torch", "", {}, "names no file"),
        ("huggingface", "h", {"max_shard_bytes": -1}, "give a whole number from 1"),
        ("safetensors", "x.safetensors", {"prefix": "modle."}, "nothing in .* begins with 'modle.'"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_written(
    to: str, target: str, options: dict[str, Any], said: str, saved: str, tmp_path: Path
) -> None:
    place = f"{tmp_path}/out/{target}" if target else ""
    with pytest.raises(OptionsError, match=said):
        exported(saved, place, to, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["torch", "safetensors", "huggingface", "dcp"])
def test_exports_to_a_bucket_come_back_from_there(to: str, saved: str, s3_url: FreshPrefix, tmp_path: Path) -> None:
    name = {"torch": "/x.pt", "safetensors": "/x.safetensors"}.get(to, "")
    options = {"prefix": "model."} if to in ("safetensors", "huggingface") else {}
    remote = {"target_storage_options": s3_url.storage_options}
    done = exported(saved, f"{s3_url.url}/out{name}", to, **options, **remote)
    assert done.total_bytes > 0
    cloudckpt.import_(
        f"{s3_url.url}/out{name}",
        tmp_path / "back",
        source_storage_options=s3_url.storage_options,
        under="model" if options else "",
        progress="off",
    )
    wanted = cloudckpt.read(saved, "model" if options else None, progress="off")
    found = cloudckpt.read(tmp_path / "back", progress="off")
    assert_alike(wanted, found, types=False)


def test_nothing_but_a_file_is_replaced_by_an_export(saved: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / "x.pt"
    path.parent.mkdir()
    makes: dict[str, Callable[[], object]] = {
        "no regular file": lambda: os.mkfifo(path),
        "a directory": path.mkdir,
        "a symbolic link to elsewhere": lambda: path.symlink_to("elsewhere"),
    }
    for words, make in makes.items():
        make()
        kind = path.lstat().st_mode
        with pytest.raises(OptionsError, match=f"is {words}.* nothing was written"):
            exported(saved, path, "torch", overwrite=True)
        assert path.lstat().st_mode == kind
        assert list(path.parent.iterdir()) == [path]
        path.rmdir() if path.is_dir() else path.unlink()
