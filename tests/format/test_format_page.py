"""FORMAT.md is enough to read a checkpoint: a reader that knows the page alone gets back what was saved.

`Reader` and all below it import nothing of the package and no PyTorch: what it needs beyond this page is zstd, xxh3-64
and SHA-256. Where page and library part, a test here fails.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import random
import re
import struct
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xxhash
import zstandard

import cloudckpt
from cloudckpt import CheckpointManager, Options
from cloudckpt.format.codec import DTYPES
from cloudckpt.format.codec.decoding import _TAGS
from tests.ranks.processes import run

PAGE = (Path(cloudckpt.__file__).parent / "format" / "FORMAT.md").read_text(encoding="utf-8")
CUT = Options(shard_bytes=1024, block_bytes=256, span_bytes=512)

Json = Any


def table_of(page: str, head: str) -> list[list[str]]:
    """Return the cells of the table on the page whose head begins like this."""
    lines = page[page.index(head) :].split("\n\n", maxsplit=1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


ITEM_BYTES = {
    name: int(size) for size, names in table_of(PAGE, "| bytes per element") for name in re.findall(r"`(\w+)`", names)
}


# -- a reader of its own -------------------------------------------------------------------------------------------


def no_name_twice(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


def parse(text: bytes) -> Json:
    return json.loads(text.decode(), object_pairs_hook=no_name_twice)


class Columns:
    """The decoded bytes of a section, taken column by column."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, size_bytes: int) -> bytes:
        taken = self._data[self._at : self._at + size_bytes]
        assert len(taken) == size_bytes
        self._at += size_bytes
        return taken

    def column(self, count: int) -> list[int]:
        width = self.take(1)[0]
        return np.frombuffer(self.take(width * count), f"<i{width}").tolist()

    def is_empty(self) -> bool:
        return self._at == len(self._data)


def summed(differences: list[int]) -> list[int]:
    return np.cumsum(np.asarray(differences, np.int64)).tolist()


class Reader:
    """A checkpoint in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        data = (folder / "manifest.json").read_bytes()
        seal = re.search(rb'"sha256": "([0-9a-f]{64})"\n}\n\Z', data)
        assert seal is not None
        assert hashlib.sha256(data[: seal.start(1)] + data[seal.end(1) :]).hexdigest() == seal[1].decode()
        self.manifest = parse(data)
        assert self.manifest["format_version"] in (1, 2)
        assert self.manifest["state"] == "committed"
        index = (folder / self.manifest["attempt"] / "index.bin").read_bytes()
        assert len(index) == self.manifest["index"]["size_bytes"]
        assert hashlib.sha256(index).hexdigest() == self.manifest["index"]["sha256"]
        assert index[:16] == b"cloudckpt index\n"
        (size_bytes,) = struct.unpack("<Q", index[16:24])
        self.header = parse(self._frame(index[24 : 24 + size_bytes]))
        for field in ("format_version", "attempt"):
            assert self.header[field] == self.manifest[field]
        self.is_copied = any((folder / one["attempt"]).is_dir() for one in self.manifest.get("references", [])[:1])
        self.names = list(self.header["tensors"])
        self.tensors: dict[str, bytearray] = {}
        for name, (dtype, shape, _) in self.header["tensors"].items():
            self.tensors[name] = bytearray(math.prod(shape) * ITEM_BYTES[dtype])
        self._seen = {name: np.zeros(shape, int) for name, (_, shape, _) in self.header["tensors"].items()}
        self.writers: dict[str, set[int]] = {name: set() for name in self.names}
        self.shards: dict[str, bytes] = {}
        rest = index[24 + size_bytes :]
        for rank in self.header["ranks"]:
            frame, rest = rest[: rank[5]], rest[rank[5] :]
            assert f"{xxhash.xxh3_64_intdigest(frame):016x}" == rank[7]
            section = self._frame(frame)
            assert len(section) == rank[6]
            self._read_section(rank, Columns(section))
        assert rest == b""
        for counts in self._seen.values():
            assert (counts == 1).all()

    @staticmethod
    def _frame(data: bytes) -> bytes:
        assert zstandard.frame_content_size(data) >= 0
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)

    def _read_section(self, rank: list[Json], section: Columns) -> None:
        number, attempt, shard_count, stored_bytes, piece_count = rank[:5]
        sizes_bytes = section.column(shard_count)
        assert sum(sizes_bytes) == stored_bytes
        digests = [section.take(8 * -(-size_bytes // self.header["block_bytes"])) for size_bytes in sizes_bytes]
        keys = [
            f"{attempt or self.header['attempt']}/r{number:05d}-{shard:04d}.safetensors" for shard in range(shard_count)
        ]
        contents: dict[int, bytes] = {}
        if self.header["format_version"] == 2:
            holders, numbers = section.column(shard_count), section.column(shard_count)
            contents = {shard: b"" for shard, is_there in enumerate(section.column(shard_count)) if is_there}
            contents = {shard: section.take(32) for shard in contents}
            for shard, (place, stored) in enumerate(zip(holders, numbers, strict=True)):
                if place:
                    step, epoch, held_by = self.header["holders"][place - 1]
                    above = "" if self.is_copied else f"../step-{step:010d}-e{epoch:04d}/"
                    keys[shard] = f"{above}{held_by}/r{number:05d}-{stored:04d}.safetensors"
        shards = [self._shard(*one) for one in zip(keys, sizes_bytes, digests, strict=True)]
        for shard, content in contents.items():
            data = shards[shard][8 + int.from_bytes(shards[shard][:8], "little") :]
            # BLAKE3 is not among what a reader needs.
            assert self.header["content"] == "blake3" or hashlib.sha256(data).digest() == content
        tensors = [self.names[place] for place in summed(section.column(piece_count))]
        places = summed(section.column(piece_count))
        gaps = section.column(piece_count)
        boxes = self._boxes(section, [len(self.header["tensors"][name][1]) for name in tensors])
        assert section.is_empty()
        stop, before = 0, -1
        for name, place, gap, box in zip(tensors, places, gaps, boxes, strict=True):
            start = gap + (stop if place == before else 0)
            stop = start + math.prod(size for _, size in box) * ITEM_BYTES[self.header["tensors"][name][0]]
            before = place
            self._put(name, box, shards[place][start:stop])
            self.writers[name].add(number)

    @staticmethod
    def _boxes(section: Columns, dimensions: list[int]) -> list[list[tuple[int, int]]]:
        boxes: list[list[tuple[int, int]]] = [[] for _ in dimensions]
        for axis in range(max(dimensions, default=0)):
            having = [box for box, count in zip(boxes, dimensions, strict=True) if count > axis]
            starts, sizes = section.column(len(having)), section.column(len(having))
            for box, start, size in zip(having, starts, sizes, strict=True):
                box.append((start, size))
        return boxes

    def _shard(self, key: str, size_bytes: int, digests: bytes) -> bytes:
        data = (self._folder / key).read_bytes()
        assert len(data) == size_bytes
        step = self.header["block_bytes"]
        for block, start in enumerate(range(0, size_bytes, step)):
            (expected,) = struct.unpack_from("<Q", digests, 8 * block)
            assert xxhash.xxh3_64_intdigest(data[start : start + step]) == expected
        self.shards[key] = data
        return data

    def _put(self, name: str, box: list[tuple[int, int]], data: bytes) -> None:
        dtype, shape, _ = self.header["tensors"][name]
        target = np.frombuffer(self.tensors[name], f"V{ITEM_BYTES[dtype]}").reshape(shape)
        part = tuple(slice(start, start + size) for start, size in box)
        target[part] = np.frombuffer(data, target.dtype).reshape([size for _, size in box])
        self._seen[name][part] += 1

    def _whole(self, name: str, data: Json) -> Json:
        """Return a value whose payloads in parts stand in it as base64."""
        if isinstance(data, list):
            return [self._whole(name, item) for item in data]
        if not isinstance(data, dict):
            return data
        return {
            tag: self._payload(name, *content)
            if tag in ("$bytes", "$bytearray", "$str", "data") and isinstance(content, list)
            else self._whole(name, content)
            for tag, content in data.items()
        }

    def _payload(self, name: str, part: int, start: int, stop: int) -> str:
        raw = self.tensors[f"cloudckpt.value.{part:05d}.{name}"][start:stop]
        assert len(raw) == stop - start > 0
        return base64.b64encode(raw).decode()

    def state(self) -> dict[str, Json]:
        """Return the nested state; a tensor as its type, shape and bytes."""
        leaves: dict[str, Json] = {
            name: (dtype, tuple(shape), bytes(self.tensors[name]))
            for name, (dtype, shape, _) in self.header["tensors"].items()
        }
        for name in [name for name in leaves if name.startswith("cloudckpt.value.")]:
            del leaves[name]
        leaves |= {name: decoded(self._whole(name, value)) for name, value in self.header["values"].items()}
        paths = self.header["paths"]
        return nested([(paths.get(name, [name]), leaf) for name, leaf in leaves.items()])


def nested(leaves: list[tuple[list[Json], Json]]) -> Json:
    """Build what stands below one step, whose leaves have the steps that are left."""
    if not leaves[0][0]:
        ((_, leaf),) = leaves
        return leaf
    below: dict[Json, list[tuple[list[Json], Json]]] = {}
    for (step, *rest), leaf in leaves:
        below.setdefault(key_of(step), []).append((rest, leaf))
    found = {key: nested(inner) for key, inner in below.items()}
    kind = kind_of(leaves[0][0][0])
    return found if kind is dict else kind(found[place] for place in range(len(found)))


def key_of(step: Json) -> Json:
    if not isinstance(step, dict):
        return step
    ((kind, key),) = step.items()
    return key if kind == "tuple" else decoded(key[1] if kind == "defaultdict" else key)


def kind_of(step: Json) -> type:
    if isinstance(step, dict):
        return tuple if "tuple" in step else dict
    return dict if isinstance(step, str) else list


def decoded(data: Json) -> Json:
    """Return a value of the codec's JSON; PyTorch's own as text, types and bytes."""
    if isinstance(data, list):
        return [decoded(item) for item in data]
    if not isinstance(data, dict):
        return data
    tags = [name for name in data if name.startswith("$") and not name.startswith("$$")]
    if not tags:
        return {name.removeprefix("$"): decoded(value) for name, value in data.items()}
    ((tag, content),) = data.items()
    return DECODED[tag](content)


def numpy_scalar(content: Json) -> Json:
    name, value = decoded(content)
    return value if name in ("U", "S") else np.dtype(name).type(value)


DECODED: dict[str, Callable[[Json], Json]] = {
    "$int": lambda text: int(text, 16),
    "$float": float,
    "$str": lambda text: base64.b64decode(text).decode("utf-8", "surrogatepass"),
    "$bytes": base64.b64decode,
    "$bytearray": lambda text: bytearray(base64.b64decode(text)),
    "$complex": lambda parts: complex(*decoded(parts)),
    **dict.fromkeys(("$tuple", "$torch.Size"), lambda items: tuple(decoded(items))),
    **dict.fromkeys(("$dict", "$OrderedDict", "$Counter"), lambda pairs: dict(decoded(pairs))),
    **dict.fromkeys(("$set", "$frozenset"), lambda items: set(decoded(items))),
    "$range": lambda parts: range(*decoded(parts)),
    "$slice": lambda parts: slice(*decoded(parts)),
    "$numpy.scalar": numpy_scalar,
    "$numpy.ndarray": lambda made: np.ndarray(
        made["shape"], made["dtype"], base64.b64decode(made["data"]), order=made["order"]
    ),
    "$torch.tensor": lambda made: (made["dtype"], tuple(made["shape"]), base64.b64decode(made["data"])),
    "$torch.requires_grad": decoded,
    **dict.fromkeys(("$torch.dtype", "$torch.device"), str),
    **dict.fromkeys(("$defaultdict",), lambda record: decoded(record)["items"]),
    "$deque": lambda record: deque(decoded(record["items"]), record["maxlen"]),
    "$argparse.Namespace": lambda names: argparse.Namespace(**decoded(names)),
    "$SimpleNamespace": lambda names: SimpleNamespace(**decoded(names)),
    "$PosixPath": PurePosixPath,
    "$WindowsPath": PureWindowsPath,
    "$PurePosixPath": PurePosixPath,
    "$PureWindowsPath": PureWindowsPath,
    "$date": date.fromisoformat,
    "$datetime": lambda record: _zoned(datetime.fromisoformat(record["text"]), record),
    "$time": lambda record: _zoned(time.fromisoformat(record["text"]), record),
    "$timedelta": lambda parts: timedelta(*parts),
    "$timezone": lambda record: timezone(decoded(record["offset"]), *([record["name"]] if record["name"] else [])),
    "$ZoneInfo": ZoneInfo,
    "$Fraction": lambda parts: Fraction(*decoded(parts)),
    "$Decimal": Decimal,
    "$UUID": UUID,
    "$BytesIO": lambda record: _stream(**decoded(record)),
    "$random.Random": lambda state: random.Random().setstate(decoded(state)),
    "$numpy.Generator": lambda record: decoded(record)["state"],
    "$numpy.RandomState": decoded,
    "$torch.Generator": lambda record: decoded(record)["state"],
    "$registered": lambda parts: (parts[0], decoded(parts[1])),
}


def _zoned(clock: Json, record: Json) -> Json:
    return clock.replace(fold=record["fold"], tzinfo=decoded(record["zone"]))


def _stream(data: bytes, position: int) -> bytes:
    return data[position:]


# -- what it reads -------------------------------------------------------------------------------------------------


def as_read(value: Json) -> Json:
    """Return a state as a reader without PyTorch has it."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype).removeprefix("torch."), tuple(value.shape), raw
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return {key: as_read(item) for key, item in value.items()}
    return type(value)(map(as_read, value)) if type(value) in (list, tuple) else value


def filled(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a tensor whose bytes count up; booleans stay booleans."""
    raw = (torch.arange(math.prod(shape) * dtype.itemsize) % (2 if dtype == torch.bool else 251)).to(torch.uint8)
    return raw.view(dtype).reshape(shape)


STATE: dict[str, Json] = {
    "model": {
        "large": filled(torch.float32, 40, 3, 11),
        "wide rows": filled(torch.int16, 3, 700),
        "scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
        "of each type": {name: filled(dtype, 3, 5) for name, dtype in DTYPES.items()},
        "mixed": [filled(torch.uint8, 2), (filled(torch.uint8, 1), "text"), {5: filled(torch.uint8, 3), "k": None}],
        "ordered": OrderedDict([("b", filled(torch.uint8, 2)), (3, OrderedDict(x=filled(torch.uint8, 1)))]),
        "default": defaultdict(list, {"a": filled(torch.uint8, 2), 7: [1]}),
    },
    "plain": {"lr": 1e-3, "betas": (0.9, 0.95), "$": {"$a": 1, "b": [True, None, 1.0, "Ω"]}, "empty": {}},
    "tagged": {
        "int": [2**53 - 1, 2**53, -(2**70)],
        "float": [math.inf, -math.inf, 1e300],
        "text": ["\ud800", b"\x00\xff", bytearray(b"x")],
        "complex": complex(1, -0.5),
        "keys": {1: "one", (2, "b"): "two"},
        "sets": [{3, 1, 2}, frozenset({"a"})],
        "range": [range(1, 9, 2), slice(None, 3)],
        "numpy": [np.float32(0.1), np.int64(-3), np.str_("u"), np.bytes_(b"s")],
        "torch": [torch.Size([2, 3]), torch.bfloat16, torch.device("cuda:1")],
        "beside": [defaultdict(list, {1: [2]}), deque([1], 3), SimpleNamespace(a=1), argparse.Namespace(b=(2,))],
        "times": [date(2026, 1, 2), datetime(2026, 1, 2, 3, fold=1, tzinfo=ZoneInfo("Europe/Berlin")), time(1, 2)],
        "zones": [timezone(timedelta(0)), timezone(timedelta(hours=1), "here"), timedelta(-1, 5)],
        "more": [PurePosixPath("a/b"), PureWindowsPath("C:/a"), Fraction(1, 3), Decimal("1.10"), UUID(int=7)],
        "list without a tensor of its own": [torch.float32, [1, 2]],
    },
}


def test_the_page_is_enough_to_read_a_checkpoint(tmp_path: Path) -> None:
    cloudckpt.save(STATE, tmp_path / "c", metrics={"loss": math.nan}, metadata={"run": (7,)}, options=CUT)

    found = Reader(tmp_path / "c")

    assert found.state() == as_read(STATE)
    assert found.manifest["metrics"] == {"loss": "nan"}
    assert decoded(found.manifest["metadata"]) == {"run": (7,)}
    assert (found.manifest["step"], found.manifest["epoch"]) == (None, 0)
    assert found.manifest["tensor_count"] == len(found.tensors)
    assert found.manifest["shard_count"] == len(found.shards) > 5
    assert found.manifest["total_bytes"] == sum(map(len, found.shards.values()))
    assert set(found.writers["model.large"]) == {found.header["tensors"]["model.large"][2]} == {0}


def test_arrays_and_tensors_among_values_are_read(tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3))
    torch_values = [torch.tensor([1.5, 2.0], dtype=torch.bfloat16), torch.tensor([1.0], requires_grad=True)]
    cloudckpt.save({"w": torch.ones(1), "rng": array}, tmp_path / "c", metadata={"t": torch_values})

    found = Reader(tmp_path / "c")

    assert np.array_equal(found.state()["rng"], array)
    assert found.state()["rng"].dtype == array.dtype
    assert decoded(found.manifest["metadata"]) == {"t": as_read(torch_values)}


def test_payloads_beside_the_json_are_read(tmp_path: Path) -> None:
    value = {
        "alone": [bytes(range(256)) * 5000, np.arange(300_000, dtype=">i4"), "é\udcff" * 400_000],
        "together": [bytearray(b"ab" * 50_000), torch.arange(20_000), np.arange(9000).reshape(3, -1, order="F")],
        "inline": b"x",
    }
    cloudckpt.save({"w": torch.ones(1), "v": SimpleNamespace(**value)}, tmp_path / "c")

    found = Reader(tmp_path / "c")

    parts = {name: shape for name, (_, shape, _) in found.header["tensors"].items() if name != "w"}
    assert list(parts) == [f"cloudckpt.value.{number:05d}.v" for number in range(4)]
    twin = vars(found.state()["v"])
    assert twin["alone"][0] == value["alone"][0]
    assert twin["alone"][2] == value["alone"][2]
    assert np.array_equal(twin["alone"][1], value["alone"][1])
    assert twin["together"][:2] == [value["together"][0], as_read(value["together"][1])]
    assert np.array_equal(twin["together"][2], value["together"][2])
    assert twin["inline"] == b"x"


class Own:
    def state_dict(self) -> dict[str, Json]:
        return {"t": torch.arange(200_000), "n": 3}

    def load_state_dict(self, state: dict[str, Json]) -> None:
        raise NotImplementedError


def test_the_large_state_of_a_rank_is_read(tmp_path: Path) -> None:
    cloudckpt.save({"own": cloudckpt.PerRank(Own())}, tmp_path / "c")

    found = Reader(tmp_path / "c")

    name = "cloudckpt.per_rank.00000-of-00001.own"
    text, tail = bytes(found.tensors[name]).split(b"\0", 1)
    assert (len(text) + 1) % 4096 == len(tail) % 4096 == 0
    found.tensors[f"cloudckpt.value.00000.{name}"] = bytearray(tail)
    assert decoded(found._whole(name, parse(text))) == {"t": as_read(torch.arange(200_000)), "n": 3}


def test_every_shard_is_a_safetensors_object_as_the_page_says(tmp_path: Path) -> None:
    cloudckpt.save(STATE, tmp_path / "c", options=CUT)
    found = Reader(tmp_path / "c")

    names = []
    for key, data in found.shards.items():
        (size_bytes,) = struct.unpack("<Q", data[:8])
        header = parse(data[8 : 8 + size_bytes])
        assert (8 + size_bytes) % 64 == 0
        assert header.pop("__metadata__") == {"cloudckpt": key.split("/")[0]}
        assert len(data) - 8 - size_bytes <= CUT.shard_bytes
        assert [stop for _, stop in offsets_of(header)][-1] == len(data) - 8 - size_bytes
        assert all(
            stop == start for (_, stop), (start, _) in zip(offsets_of(header), offsets_of(header)[1:], strict=False)
        )
        names += header
    assert {"model.scalar", "model.large[0:7,0:3,0:11]", "model.wide rows[0:1,0:512]"} <= set(names)


def offsets_of(header: dict[str, Json]) -> list[tuple[int, int]]:
    return [tuple(entry["data_offsets"]) for entry in header.values()]


def test_a_root_is_read_by_the_page_too(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(12_000, {"w": torch.ones(3)})
    claims = sorted((tmp_path / "epochs").iterdir(), reverse=True)
    assert [path.name for path in claims] == ["0000000001.json", "0000000001.committed"]
    claim = parse(claims[0].read_bytes())
    assert list(claim) == ["format_version", "epoch", "nonce", "created_at", "host", "pid", "resumed_from"]
    assert (claim["format_version"], claim["epoch"], claim["resumed_from"]) == (1, 1, None)

    with CheckpointManager(tmp_path) as manager:
        manager.restore({"w": torch.ones(3)})
        manager.save(12_001, {"w": torch.ones(3)})
    claim = parse((tmp_path / "epochs" / "0000000002.json").read_bytes())
    assert (claim["resumed_from"], claim["line"]) == ([12_000, 1], [[12_000, 1]])

    found = Reader(tmp_path / "step-0000012000-e0001")

    assert (found.manifest["step"], found.manifest["epoch"]) == (12_000, 1)
    generators = decoded(parse(bytes(found.tensors["cloudckpt.rng.r00000"])))
    assert generators["torch"] == as_read(torch.get_rng_state())
    assert found.state()["w"] == as_read(torch.ones(3))


def save_rows(url: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = distribute_tensor(torch.arange(120.0).reshape(12, 10), mesh, [Shard(0)])
    cloudckpt.save({"rows": rows, "one": torch.ones(2), "n": 1}, url, options=CUT)


@pytest.mark.timeout(200)
def test_what_several_ranks_wrote_is_read(tmp_path: Path) -> None:
    run(2, save_rows, str(tmp_path / "c"))

    found = Reader(tmp_path / "c")

    assert found.state() == as_read({"rows": torch.arange(120.0).reshape(12, 10), "one": torch.ones(2), "n": 1})
    assert found.manifest["world_size"] == 2
    assert found.writers["rows"] == {0, 1}
    assert found.header["tensors"]["rows"][2] == -1


# -- what the page says beside -------------------------------------------------------------------------------------


def test_the_page_knows_every_element_type_and_its_size() -> None:
    assert {name: ITEM_BYTES[name] for name in DTYPES} == {name: dtype.itemsize for name, dtype in DTYPES.items()}


def test_the_page_knows_every_tag_and_no_other() -> None:
    tags = {tag for names, _ in table_of(PAGE, "| tag | content") for tag in re.findall(r"`(\$[\w.]+)`", names)}
    assert tags == set(_TAGS)


def test_the_page_lists_the_fields_of_manifest_and_header_in_their_order(tmp_path: Path) -> None:
    cloudckpt.save({"w": torch.ones(1)}, tmp_path / "c")
    with CheckpointManager(tmp_path / "root", reuse_unchanged=True) as manager:
        manager.save(1, {"w": torch.ones(1)})
    newer = Reader(next((tmp_path / "root").glob("step-*")))
    found = Reader(tmp_path / "c")

    for section, old, new in (
        ("## Manifest", found.manifest, newer.manifest),
        ("## Index", found.header, newer.header),
    ):
        table = table_of(PAGE[PAGE.index(section) :], "| field | content")
        fields = [(field, what) for names, what, *_ in table for field in re.findall(r"`(\w+)`", names)]
        assert [field for field, _ in fields] == list(new)
        assert [field for field, what in fields if "in version 2 alone" not in what] == list(old)


def test_what_other_checkpoints_hold_is_found_by_the_page_alone(tmp_path: Path) -> None:
    state = {"base": torch.arange(2_000), "head": torch.zeros(10)}
    with CheckpointManager(tmp_path / "root", reuse_unchanged=True, options=CUT) as manager:
        for step in range(3):
            state["head"] += 1
            url = manager.save(step, state).url  # type: ignore[union-attr]
    cloudckpt.copy(url, tmp_path / "copy")
    folder = next((tmp_path / "root").glob("step-0000000002-*"))
    for found in (Reader(folder), Reader(tmp_path / "copy" / folder.name)):
        assert found.manifest["references"][0]["step"] == 0
        assert found.tensors["base"] == state["base"].numpy().tobytes()
        assert found.tensors["head"] == state["head"].numpy().tobytes()


def lines_of(section: str) -> Iterator[str]:
    yield from PAGE[PAGE.index(section) :].split("\n## ")[0].splitlines()


def test_the_page_counts_the_invariants_without_holes() -> None:
    numbers = [int(line.split(".")[0]) for line in lines_of("## Invariants") if re.match(r"\d+\. ", line)]
    assert numbers == list(range(1, 18))
