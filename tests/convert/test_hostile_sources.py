"""A source that lies, is cut short or carries code is refused by name; nothing is run, and nothing is committed."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

import cloudckpt
from cloudckpt import CloudCkptError, SourceError
from cloudckpt.convert.dcp_metadata import _Unpickler, decode_metadata

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Bomb:
    """Would run a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def refused(source: Path, tmp_path: Path, said: str) -> CloudCkptError:
    """Import what must be refused; nothing may be left of it."""
    with pytest.raises(SourceError, match=said) as error:
        cloudckpt.import_(source, tmp_path / "out", progress="off")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    return error.value


@pytest.fixture(autouse=True)
def _nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "ran").exists()


# -- safetensors ----------------------------------------------------------------------------------------------


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def written(header: object, data: bytes = b"x" * 8, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


LIES: dict[str, tuple[bytes, str]] = {
    "a header longer than the file": (written({"a": entry()}, length=1 << 20), "header would have"),
    "a header of exabytes": (written({"a": entry()}, length=1 << 60), "header would have"),
    "no json": (written(b"{nothing"), "is no JSON"),
    "a name twice": (written(b'{"a":1,"a":2}'), "stands twice"),
    "deep json": (written(b'{"a":' + b"[" * 100_000), "is no JSON"),
    "overlapping tensors": (written({"a": entry(), "b": entry(offsets=(4, 12))}, b"x" * 12), "begin at 4"),
    "one tensor under two names": (written({"a": entry(), "b": entry()}), "begin at 0"),
    "a hole": (written({"a": entry(offsets=(4, 12))}, b"x" * 12), "begin at 4"),
    "bytes beyond the file": (written({"a": entry(shape=[4], offsets=(0, 16))}), "have 16 bytes, and 8 follow"),
    "bytes after the last tensor": (written({"a": entry()}, b"x" * 9), "have 8 bytes, and 9 follow"),
    "a shape of other bytes": (written({"a": entry(shape=[3])}), "'a' is F32"),
    "a shape beyond any memory": (written({"a": entry(shape=[1 << 40, 1 << 40])}), "'a' is F32"),
    "a negative size": (written({"a": entry(shape=[-2])}), "malformed"),
    "a size that is no number": (written({"a": entry(shape=[2.0])}), "malformed"),
    "offsets that go back": (written({"a": entry(offsets=(8, 0))}), "'a' is F32"),
    "an unknown dtype": (written({"a": entry(dtype="F7")}), "dtype 'F7'"),
    "an entry without a shape": (written({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "malformed"),
    "an entry that is none": (written({"a": 5}), "malformed"),
    "nothing": (written({}, b""), "holds nothing"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_safetensors_header_is_refused(lie: str, tmp_path: Path) -> None:
    data, said = LIES[lie]
    (tmp_path / "x.safetensors").write_bytes(data)
    refused(tmp_path / "x.safetensors", tmp_path, said)


def test_names_that_no_state_may_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(written({"cloudckpt.notes": entry()}))
    refused(tmp_path / "x.safetensors", tmp_path, "--under")


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "../x.safetensors"}, "none of its folder"),
        ({"a": "/etc/passwd"}, "none of its folder"),
        ({"a": "missing.safetensors"}, "is not in"),
        ({"b": "x.safetensors"}, "not in 'x.safetensors'|in, and not named for,"),
        ({"a": "x.safetensors", "b": "x.safetensors"}, "'b' is not in 'x.safetensors'"),
        ([], "no weight_map"),
        ({"a": 7}, "none of its folder"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(weight_map: object, said: str, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "x.safetensors").write_bytes(written({"a": entry()}))
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path / "hf", tmp_path, said)


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    for number in (1, 2):
        (tmp_path / "hf" / f"{number}.safetensors").write_bytes(
            written({"a": entry(), f"b{number}": entry(offsets=(8, 16))}, b"x" * 16)
        )
    names = {"a": "1.safetensors", "b1": "1.safetensors", "b2": "2.safetensors"}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(tmp_path / "hf", tmp_path, "stands in several files")


# -- torch ----------------------------------------------------------------------------------------------------


def saved(value: object, *, is_older: bool = False) -> bytes:
    data = io.BytesIO()
    torch.save(value, data, _use_new_zipfile_serialization=not is_older)
    return data.getvalue()


def repacked(data: bytes, change: Callable[[str, bytes], bytes] = lambda name, body: body, **options: Any) -> bytes:
    """Write an archive anew, with other records."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w", **options) as other:
        for name in archive.namelist():
            other.writestr(name, change(name, archive.read(name)))
    return out.getvalue()


def with_record(data: bytes, name: str, body: bytes = b"x") -> bytes:
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(name, body)
    return out.getvalue()


GOOD = saved({"w": torch.arange(100.0), "n": 1})
ARCHIVES: dict[str, tuple[bytes, str]] = {
    "code": (saved({"w": Bomb()}), r"(posix|nt).system, which torch.load\(weights_only=True\) does not admit"),
    "a module": (saved({"w": nn.Linear(2, 2)}), "torch.nn.modules.linear.Linear, which"),
    "a tensor alone": (saved(torch.ones(2)), "holds a Tensor; a checkpoint is a dict"),
    "keys that are no text": (saved({1: torch.ones(2)}), "keys that are no text"),
    "half of a file": (GOOD[: len(GOOD) // 2], "archive cannot be read"),
    "a compressed archive": (repacked(GOOD, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "a record outside": (with_record(GOOD, "../../etc/passwd"), "records outside"),
    "an absolute record": (with_record(GOOD, "/etc/passwd"), "records outside"),
    "a program": (with_record(GOOD, "archive/code/x.py"), "TorchScript program"),
    "another program's archive": (with_record(b"", "archive/readme"), "torch.save did not write"),
    "big-endian": (repacked(GOOD, lambda name, body: b"big" if name.endswith("byteorder") else body), "big-endian"),
    "a short record": (repacked(GOOD, lambda name, body: body[:8] if "/data/" in name else body), "'w' .* reaches to"),
    "a sparse tensor": (saved({"w": torch.eye(3).to_sparse()}), "no dense bytes|cannot be read"),
    "a plain pickle": (pickle.dumps({"w": Bomb()}, protocol=2), "cannot be read by torch.load"),
    "an older file with code": (saved({"w": Bomb()}, is_older=True), "system, which|cannot be read by torch.load"),
    "half of an older file": (saved({"w": torch.ones(99)}, is_older=True)[:300], "cannot be read by torch.load"),
    "a tar archive": (b"x".ljust(257, b"\0") + b"ustar" + b"\0" * 999, "format of before PyTorch 1.6"),
    "nothing": (b"", "not a file that cloudckpt reads"),
    "text": (b"hello" * 100, "not a file that cloudckpt reads"),
}


@pytest.mark.parametrize("lie", ARCHIVES)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning", "ignore:TypedStorage is deprecated:UserWarning")
def test_a_file_that_is_not_weights_alone_is_refused(lie: str, tmp_path: Path) -> None:
    data, said = ARCHIVES[lie]
    (tmp_path / "x.ckpt").write_bytes(data)
    refused(tmp_path / "x.ckpt", tmp_path, said)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_record_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(with_record(GOOD, "archive/data.pkl", b"other"))
    refused(tmp_path / "x.pt", tmp_path, "twice|did not write")


def test_views_that_would_fill_a_disk_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(saved({"w": torch.ones(1).expand(1 << 40)}))
    refused(tmp_path / "x.pt", tmp_path, "repeats itself")


def test_containers_that_hold_each_other_over_and_over_are_refused(tmp_path: Path) -> None:
    nested: list[Any] = [torch.ones(1)]
    for _ in range(60):
        nested = [nested, nested]
    (tmp_path / "x.pt").write_bytes(saved({"w": nested}))
    refused(tmp_path / "x.pt", tmp_path, "repeats itself without end")
    loop: list[Any] = [torch.ones(1)]
    loop.append(loop)
    (tmp_path / "y.pt").write_bytes(saved({"w": loop}))
    refused(tmp_path / "y.pt", tmp_path, "repeats itself without end")


@pytest.mark.parametrize("kind", ["pt", "safetensors", "dcp"])
def test_a_source_that_is_cut_anywhere_is_refused(kind: str, tmp_path: Path) -> None:
    state = {"w": torch.arange(40.0), "v": torch.ones(3)}
    path = tmp_path / f"x.{kind}"
    if kind == "dcp":
        dcp.save(state, checkpoint_id=path)
        path = next(path.glob("*.distcp"))
    elif kind == "pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    data = path.read_bytes()
    source = path.parent if kind == "dcp" else path
    for stop in range(0, len(data), max(1, len(data) // 23)):
        path.write_bytes(data[:stop])
        refused(source, tmp_path, ".")


def test_a_source_that_is_written_meanwhile_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors.torch.save_file({"w": torch.zeros(8)}, tmp_path / "x.safetensors")
    from cloudckpt.convert import importing

    def written_meanwhile(*args: Any, **options: Any) -> Any:
        safetensors.torch.save_file({"w": torch.ones(8)}, tmp_path / "x.safetensors")
        os.utime(tmp_path / "x.safetensors", (1, 1))
        return assembled(*args, **options)

    assembled = importing.assemble
    monkeypatch.setattr(importing, "assemble", written_meanwhile)
    refused(tmp_path / "x.safetensors", tmp_path, "was written while it was read")


# -- DCP ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save({"w": torch.arange(12.0).view(3, 4), "v": {"n": 5}}, checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


def change_metadata(folder: Path, change: Callable[[Any], object]) -> None:
    found = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(found) or found))


def moved(**fields: Any) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        index = next(index for index in found.storage_data if index.fqn == "w")
        found.storage_data[index] = _StorageInfo(**{**vars(found.storage_data[index]), **fields})

    return change


def shaped(name: str, value: Any) -> Callable[[Any], None]:
    return lambda found: setattr(found.state_dict_metadata["w"].chunks[0], name, value)


METADATA: dict[str, tuple[Callable[[Any], object], str]] = {
    "code": (lambda found: Bomb(), "system, which is none of DCP's own types"),
    "code in a place": (lambda found: setattr(found, "planner_data", Bomb()), "none of DCP's own types"),
    "another object": (lambda found: {"w": 1}, "holds a dict"),
    "a file elsewhere": (moved(relative_path="../../secret"), "none of its folder"),
    "an absolute file": (moved(relative_path="/etc/passwd"), "none of its folder"),
    "a file that is not there": (moved(relative_path="__9_9.distcp"), "is not in"),
    "bytes beyond the file": (moved(offset=1 << 40), "cut short or is damaged"),
    "a negative place": (moved(offset=-8), "a place of no bytes"),
    "fewer bytes than the tensor has": (moved(length=8), "48 bytes in 8 stored ones"),
    "an extension": (moved(transform_descriptors=["zstd"]), "stored through extensions"),
    "another shape": (shaped("sizes", torch.Size([4, 3])), "leaves the tensor"),
    "a chunk that leaves the tensor": (shaped("offsets", torch.Size([1, 0])), "leaves the tensor"),
    "a chunk of other dimensions": (shaped("sizes", torch.Size([12])), "other dimensions"),
    "a tensor in part": (shaped("sizes", torch.Size([2, 4])), "have 8 elements of 12"),
    "sizes beyond any memory": (
        lambda found: setattr(found.state_dict_metadata["w"], "size", torch.Size([1 << 40, 1 << 40])),
        "beyond any memory",
    ),
    "chunks that do not cover a tensor": (
        lambda found: setattr(found.state_dict_metadata["w"], "size", torch.Size([4, 4])),
        "have 12 elements of 16",
    ),
    "sizes that are none": (shaped("sizes", ["a", 4]), "sizes that are none"),
    "no places": (lambda found: found.storage_data.clear(), "does not say where"),
    "a path through another": (
        lambda found: setattr(found, "planner_data", {"w": ("a",), "v.n": ("a", "b")}),
        "contradict each other",
    ),
    "a list with a hole": (
        lambda found: setattr(found, "planner_data", {"w": ("a", 1), "v.n": ("v", "n")}),
        "contradict each other",
    ),
}


@pytest.mark.parametrize("lie", METADATA)
def test_a_lying_metadata_file_is_refused(lie: str, folder: Path, tmp_path: Path) -> None:
    change, said = METADATA[lie]
    change_metadata(folder, change)
    with pytest.raises(SourceError, match=said) as error:
        cloudckpt.import_(folder, tmp_path / "out", progress="off")
    assert "older step" not in str(error.value)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_a_part_that_holds_code_is_refused(folder: Path, tmp_path: Path) -> None:
    bomb = saved(Bomb())
    (folder / "__9_9.distcp").write_bytes(bomb)

    def change(found: Any) -> None:
        found.storage_data[MetadataIndex("v.n")] = _StorageInfo("__9_9.distcp", 0, len(bomb))

    change_metadata(folder, change)
    refused(folder, tmp_path, "does not admit")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value)) + value.encode()


# Each would set an attribute of a class of this process, by the slots of pickle's BUILD.
CHANGES = {
    "pathlib's": b"cpathlib\nPurePosixPath\nN}" + text("name") + text("evil") + b"s\x86b0",
    "DCP's": b"ctorch.distributed.checkpoint.metadata\nMetadata\nN}" + text("__init__") + b"Ns\x86b0",
    "the fields of DCP's": b"ctorch.distributed.checkpoint.metadata\nMetadata\n}" + text("version") + b"Nsb0",
    "a file's record": b"ctorch.distributed.checkpoint.filesystem\n_StorageInfo\nN}" + text("length") + b"Ns\x86b0",
}


@pytest.mark.parametrize("change", CHANGES)
def test_metadata_changes_no_class_of_this_process(change: str, folder: Path, tmp_path: Path) -> None:
    kinds = (PurePosixPath, Metadata, _StorageInfo)
    before = [dict(vars(kind)) for kind in kinds]
    data = pickle.dumps(pickle.loads((folder / ".metadata").read_bytes()), protocol=2)
    (folder / ".metadata").write_bytes(data[:2] + CHANGES[change] + data[2:])
    refused(folder, tmp_path, "cannot be read")
    assert [dict(vars(kind)) for kind in kinds] == before


def test_no_type_of_this_process_is_handed_to_metadata() -> None:
    for name in (b"pathlib\nPosixPath", b"torch\nSize", b"torch\nfloat32", b"collections\nOrderedDict"):
        kind = _Unpickler(io.BytesIO(b"\x80\x02c" + name + b"\n.")).load()
        assert kind.__mro__[1].__module__ == "cloudckpt.convert.dcp_metadata"
        assert kind is not _Unpickler(io.BytesIO(b"\x80\x02c" + name + b"\n.")).load()


@pytest.mark.parametrize(
    "data",
    {
        "a memory of gigabytes": b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b".",
        "an extension of this process": b"\x80\x02\x82\x01.",
        "a key whose hash takes for ever": b"\x80\x02}" + b")" + b"2\x86" * 64 + b"Ns.",
    }.values(),
)
def test_what_dcp_never_writes_costs_nothing(data: bytes) -> None:
    with pytest.raises(SourceError, match="damaged or foreign"):
        decode_metadata(data)


def test_a_pickle_that_is_no_pickle_is_refused() -> None:
    for data in (b"", b"\x80\x04", b"garbage", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"Vx\n" * 10 + b"."):
        with pytest.raises(SourceError):
            decode_metadata(data)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("make", [pipe, listening])
@pytest.mark.parametrize("name", ["x.pt", "d/.metadata", "d/model.safetensors", "d/a.safetensors"])
def test_what_is_no_regular_file_is_no_source(
    make: Callable[[Path], None], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    Path(name).parent.mkdir(exist_ok=True)
    make(Path(name))
    if name.endswith("/a.safetensors"):
        Path("d/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    with pytest.raises(SourceError, match="is no regular file") as refused:
        cloudckpt.import_(name.split("/", maxsplit=1)[0], tmp_path / "out", progress="off")
    assert refused.value.key == Path(name).name


@pytest.mark.parametrize("file", ["a" * 5000, "a\0b", "a\nb"])
def test_a_name_that_no_file_can_have_is_named_in_short(file: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    change_metadata(folder, moved(relative_path=file))
    for source in (tmp_path, folder):
        with pytest.raises(SourceError, match="is no name of a file") as refused:
            cloudckpt.import_(source, tmp_path / "out", progress="off")
        assert refused.value.key == file
        assert len(str(refused.value)) < 1000


def test_names_that_clash_are_the_sources_fault(tmp_path: Path) -> None:
    torch.save({"d": {0: torch.ones(1), "0": torch.zeros(1)}}, tmp_path / "x.pt")
    with pytest.raises(SourceError, match=r"'x\.pt' cannot be a checkpoint: two entries .* named 'd\.0'") as refused:
        cloudckpt.import_(tmp_path / "x.pt", tmp_path / "out", progress="off")
    assert refused.value.key == "x.pt"


def test_a_folder_of_nothing_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("x")
    refused(tmp_path / "x", tmp_path, "holds notes.txt: neither")
    shutil.rmtree(tmp_path / "x")
    refused(tmp_path / "x", tmp_path, "holds nothing")
