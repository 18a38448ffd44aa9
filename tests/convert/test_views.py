"""A tensor that lies in its file in another order, or with holes, is read in linear time and with little memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import Options, SourceError
from cloudckpt.convert import from_torch
from cloudckpt.convert.blob import Blob
from cloudckpt.options import KIB
from tests.convert.test_hostile_sources import entry, written
from tests.store.fault_store import FaultStore

Tensor = torch.Tensor
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.view(32, 64).t(),
    "a column": lambda x: x.view(32, 64)[:, :1],
    "a cut": lambda x: x.view(8, 16, 16)[1:7, 3:9, ::3],
    "permuted": lambda x: x.view(4, 8, 64).permute(2, 0, 1),
    "permuted with holes": lambda x: x.view(4, 8, 64)[:, ::2].permute(2, 1, 0),
    "repeated": lambda x: x[:64].view(64, 1).expand(64, 32),
    "of complex numbers": lambda x: x.to(torch.complex64).view(32, 64).t().conj(),
    "negative": lambda x: torch.complex(x, x).conj().imag.view(32, 64)[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("sizes", [(16 << 20, 64 << 10), (512, 64)])
def test_a_view_comes_bitwise_in_pieces_of_any_size(
    view: str, sizes: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_torch, "_WINDOW_BYTES", sizes[0])
    monkeypatch.setattr(from_torch, "_HOLE_BYTES", sizes[1])
    tensor = VIEWS[view](torch.arange(2048, dtype=torch.float32))
    torch.save({"t": tensor}, tmp_path / "x.pt")
    options = Options(shard_bytes=KIB, block_bytes=KIB)
    cloudckpt.import_(tmp_path / "x.pt", tmp_path / "out", options=options, progress="off")
    assert torch.equal(cloudckpt.read(tmp_path / "out")["t"], tensor.resolve_conj().resolve_neg())  # type: ignore[arg-type]


@pytest.mark.parametrize(("view", "most"), [("transposed", 1.0), ("a column", 1.0), ("permuted with holes", 4.0)])
def test_a_view_is_read_once_and_never_in_more_memory_than_it_has_or_a_window(
    view: str, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_torch, "_WINDOW_BYTES", 512)
    read: list[int] = []
    whole = Blob.read_into

    def counted(blob: Blob, start: int, memory: memoryview) -> None:
        if blob.key == "x.pt" and memory.nbytes >= 4 and len(armed):
            read.append(memory.nbytes)
        whole(blob, start, memory)

    armed: list[int] = []
    monkeypatch.setattr(Blob, "read_into", counted)
    base = torch.arange(2048, dtype=torch.float32)
    tensor = VIEWS[view](base)
    torch.save({"t": tensor}, tmp_path / "x.pt")
    gather = from_torch._Gathered.read

    def gathered(one: from_torch._Gathered, start: int, memory: memoryview) -> None:
        armed.append(1)
        gather(one, start, memory)
        armed.clear()

    monkeypatch.setattr(from_torch._Gathered, "read", gathered)
    options = Options(shard_bytes=KIB, block_bytes=KIB)
    cloudckpt.import_(tmp_path / "x.pt", tmp_path / "out", options=options, progress="off")
    assert sum(read) <= most * base.nbytes + 512
    assert max(read) <= max(512, tensor.nbytes)


@pytest.mark.parametrize("count", [1, 200])
def test_a_file_costs_a_request_for_each_of_its_ends_and_a_tensor_two(count: int, tmp_path: Path) -> None:
    torch.save({str(number): torch.full((4096,), float(number)) for number in range(count)}, tmp_path / "x.pt")
    client = FaultStore()
    client.bucket.raw_put("x.pt", (tmp_path / "x.pt").read_bytes())
    archive = from_torch.Archive.open(Blob.of(client, "x.pt"))
    opened = [op.verb for op in client.trace]
    assert opened == ["head", "get"] if count == 1 else ["head", "get", "get"]
    tensor = archive.content[str(count - 1)]  # type: ignore[index]
    found = torch.empty(4096)
    archive.reader("x", tensor)(0, memoryview(found.numpy()).cast("B"))
    assert [op.verb for op in client.trace[len(opened) :]] == ["get", "get"]
    assert torch.equal(found, torch.full((4096,), float(count - 1)))


def test_the_boxes_of_a_range_are_its_elements_in_order() -> None:
    x = torch.arange(24).view(2, 3, 4)
    for start, stop in itertools.combinations(range(25), 2):
        boxes = from_torch._boxes(x.shape, start, stop)
        parts = [x[tuple(slice(*one) for one in box)].reshape(-1) for box in boxes]
        assert torch.equal(torch.cat(parts), torch.arange(start, stop))


def refused(source: Path, tmp_path: Path, said: str) -> str:
    with pytest.raises(SourceError, match=said) as error:
        cloudckpt.import_(source, tmp_path / "out", progress="off")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    return str(error.value)


@pytest.mark.parametrize("is_archive", [True, False])
def test_a_tensor_of_the_meta_device_is_refused_by_name(is_archive: bool, tmp_path: Path) -> None:
    state = {"m": torch.ones(3, device="meta")}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=is_archive)
    refused(tmp_path / "x.pt", tmp_path, "'m' has no bytes.*meta device")


def test_an_intact_file_is_not_called_damaged(tmp_path: Path) -> None:
    torch.save({"n": 10**4000}, tmp_path / "x.pt")
    assert "damaged" not in refused(tmp_path / "x.pt", tmp_path, "its pickle is whole")


def test_a_shape_that_no_index_holds_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(written({"a": entry(shape=[0, 2**51], offsets=(0, 0))}, b""))
    refused(tmp_path / "x.safetensors", tmp_path, "beyond what a checkpoint names")
    (tmp_path / "y.safetensors").write_bytes(written({"a": entry(shape=[0, 2**51 - 1], offsets=(0, 0))}, b""))
    assert cloudckpt.import_(tmp_path / "y.safetensors", tmp_path / "out", progress="off").total_bytes >= 0
