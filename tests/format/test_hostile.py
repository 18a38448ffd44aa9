"""Whoever can choose every byte of a checkpoint gets a `ManifestError` and nothing else: no code, no path, no memory.

Each case is one object as a reader would meet it, with a right seal and a right frame, so that nothing but its content
speaks against it. Reading means all that is done with such an object before a shard is asked for.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import pickle
import random
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zstandard

from cloudckpt.errors import FormatVersionError, ManifestError
from cloudckpt.format import codec
from cloudckpt.format.index import Index
from cloudckpt.format.manifest import MANIFEST_LIMIT_BYTES, Manifest, decode_claim
from cloudckpt.format.tree import unflatten
from cloudckpt.keys import checkpoint_prefix, shard_key
from cloudckpt.options import KIB, MIB
from cloudckpt.store.base import check_key

ATTEMPT = "0123456789abcdef"
MANIFEST: dict[str, Any] = {
    "format_version": 1,
    "state": "committed",
    "step": 7,
    "epoch": 1,
    "attempt": ATTEMPT,
    "created_at": "2026-01-02T03:04:05.678+00:00",
    "world_size": 1,
    "total_bytes": 96,
    "tensor_count": 1,
    "shard_count": 1,
    "index": {"size_bytes": 300, "sha256": "ab" * 32},
    "metrics": {"loss": 0.5},
    "metadata": {"run": "seven"},
    "environment": {"python": "3.11"},
    "summary": {"seconds": 1.5},
}
# What rank 0 wrote, column by column: one shard of 96 bytes with two digests, one piece at byte 64 of it.
SECTION = b"".join(
    (
        b"\x01\x60",  # the shard's size
        bytes(16),  # its digests
        b"\x01\x00",  # the piece's tensor
        b"\x01\x00",  # its shard
        b"\x01\x40",  # its gap
        b"\x01\x00\x01\x02",  # its offset and size along the first axis
        b"\x01\x00\x01\x04",  # and along the second
    )
)
SECTION_FRAME = zstandard.ZstdCompressor().compress(SECTION)
INDEX: dict[str, Any] = {
    "format_version": 1,
    "attempt": ATTEMPT,
    "block_bytes": 64,
    "tensors": {"w": ["float32", [2, 4], 0]},
    "values": {"lr": 0.5},
    "paths": {"w": ["model", "w"], "lr": ["optimizer", "lr"]},
    "ranks": [[0, "", 1, 96, 1, len(SECTION_FRAME), len(SECTION), xxhash.xxh3_64_hexdigest(SECTION_FRAME)]],
}
CLAIM: dict[str, Any] = {
    "format_version": 1,
    "epoch": 1,
    "nonce": ATTEMPT,
    "created_at": "2026-01-02T03:04:05.678+00:00",
    "host": "node-1",
    "pid": 1,
    "resumed_from": None,
}


def manifest_object(record: object) -> bytes:
    """Write a manifest as its format says, whatever is in it."""
    text = record if isinstance(record, bytes) else json.dumps(record, indent=1).encode()
    bare = re.sub(rb"\n?}\s*\Z", b',\n "sha256": ""\n}\n', text)
    return bare.replace(b'"sha256": ""\n}\n', b'"sha256": "%s"\n}\n' % hashlib.sha256(bare).hexdigest().encode())


def index_object(record: object, frame: bytes = SECTION_FRAME) -> bytes:
    """Write an index whose header is `record`, with one section."""
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    head = zstandard.ZstdCompressor().compress(text)
    return b"cloudckpt index\n" + struct.pack("<Q", len(head)) + head + frame


def claim_object(record: object) -> bytes:
    return record if isinstance(record, bytes) else json.dumps(record).encode()


def read_manifest(data: bytes) -> None:
    manifest = Manifest.decode(data, key="manifest.json")
    manifest.metric_values()
    manifest.metadata_values()
    manifest.created()


def read_index(data: bytes) -> None:
    index = Index.decode(data, key="index.bin")
    leaves: dict[str, object] = {name: codec.decode(value, key=name) for name, value in index.values.items()}
    unflatten({**dict.fromkeys(index.tensors), **leaves}, index.paths)


def read_claim(data: bytes) -> None:
    decode_claim(data, key="epochs/0000000001.json")


KINDS: dict[str, tuple[dict[str, Any], Callable[[object], bytes], Callable[[bytes], None]]] = {
    "manifest": (MANIFEST, manifest_object, read_manifest),
    "index": (INDEX, index_object, read_index),
    "claim": (CLAIM, claim_object, read_claim),
}
"""Kind of object → (a right record, how it is written, how it is read)."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_objects_that_the_cases_spoil_are_right(kind: str) -> None:
    record, write, read = KINDS[kind]

    read(write(record))


def put(record: dict[str, Any], way: tuple[Any, ...], value: object) -> dict[str, Any]:
    """Return a copy of `record` with `value` where `way` leads."""
    copied: dict[str, Any] = json.loads(json.dumps(record))
    place: Any = copied
    for step in way[:-1]:
        place = place[step]
    place[way[-1]] = value
    return copied


# -- the cases -----------------------------------------------------------------------------------------------

PATHS = [
    "",
    ".",
    "..",
    "../..",
    "../0123456789abcdef",
    "0123456789abcdef/..",
    "0123456789abcdef/",
    "/0123456789abcdef",
    "//host/share",
    "/etc/passwd",
    "\\\\host\\share",
    "..\\..\\windows",
    "C:\\windows",
    "C:0123456789abcd",
    "~",
    "~root/.ssh",
    "$HOME",
    "%2e%2e%2f%2e%2e",
    "%2e%2e/0123456789",
    "0123456789abcde%",
    "0123456789abcdef?versionId=3",
    "0123456789abcdef#x",
    "0123456789abcdef;x",
    "0123456789abcdef\n",
    "\n0123456789abcdef",
    "0123456789abcdef ",
    "0123456789abcdef.",
    "0123456789abcde\x00",
    "0123456789ABCDEF",
    "0123456789abcdeg",
    "0123456789abcde",
    "0123456789abcdef0",
    "\uff10123456789abcdef",
    "0123456789abcde\u0660",
    "0123456789abcd\u0435f",
    "\u2024\u2024/0123456789abc",
    "\u202e0123456789abcde",
    "s3://other/bucket",
    "file:///etc/passwd",
    "*",
    "[0-9a-f]*",
    "{a,b}",
    "-rf",
    "CON",
    "a" * 4096,
    "../" * 1000,
]
"""What could stand where an attempt id belongs, the only text of an object that becomes part of a key."""

JSON_TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \n ",
    "a list": b"[]",
    "a number": b"1",
    "a text": b'"format_version"',
    "null": b"null",
    "true": b"true",
    "an empty object": b"{}",
    "no version": b'{"state": "void"}',
    "a version of text": b'{"format_version": "1"}',
    "a version of null": b'{"format_version": null}',
    "a version of true": b'{"format_version": true}',
    "a version and a half": b'{"format_version": 1.5}',
    "a version of 1.0": b'{"format_version": 1.0}',
    "a version of 5000 digits": b'{"format_version": ' + b"1" * 5000 + b"}",
    "version 0": b'{"format_version": 0}',
    "version 1 alone": b'{"format_version": 1}',
    "not closed": b'{"format_version": 1',
    "100 thousand lists": b"[" * 100_000,
    "100 thousand lists, closed": b"[" * 100_000 + b"]" * 100_000,
    "100 thousand objects": b'{"a":' * 100_000,
    "deep version": b'{"format_version": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "NaN": b"NaN",
    "UTF-16": json.dumps({"format_version": 1}).encode("utf-16"),
    "UTF-32": json.dumps({"format_version": 1}).encode("utf-32"),
    "a byte order mark": b'\xef\xbb\xbf{"format_version": 1}',
    "UTF-7": b'+AHs-"format_version": 1+AH0-',
    "a comment": b'{"format_version": 1} // x',
    "single quotes": b"{'format_version': 1}",
    "a key without quotes": b"{format_version: 1}",
    "Python": b"{'format_version': __import__('os').getpid()}",
    "YAML": b"!!python/object/apply:os.getpid []",
    "a template": b'{"format_version": "{{ 7 * 7 }}"}',
    "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
}
"""What could stand where JSON belongs."""

VALUES: dict[str, bytes] = {
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "-Infinity": b"-Infinity",
    "a float beyond all": b"1e999",
    "an int beyond plain ints": b"9007199254740993",
    "an int of 4000 digits": b"7" * 4000,
    "an int of 5000 digits": b"7" * 5000,
    "a leading zero": b"01",
    "a plus": b"+1",
    "hexadecimal": b"0x10",
    "underscores": b"1_000",
    "half a number": b"1.",
    "an exponent without digits": b"1e",
    "a trailing comma": b"[1,]",
    "a comment": b"1/**/",
    "undefined": b"undefined",
    "a lone surrogate": b'"\\ud800"',
    "surrogates in the wrong order": b'"\\udc00\\ud800"',
    "a bad escape": b'"\\x41"',
    "half an escape": b'"\\u12"',
    "a raw line break": b'"a\nb"',
    "a raw NUL": b'"a\0b"',
    "bytes that are no UTF-8": b'"\xff\xfe"',
    "UTF-8 that is too long": b'"\xc0\xaf"',
    "a surrogate in UTF-8": b'"\xed\xa0\x80"',
    "beyond Unicode": b'"\xf4\x90\x80\x80"',
    "half a character": b'"\xe2\x82"',
    "a name twice": b'{"a": 1, "a": 2}',
    "a name twice, spelled differently": b'{"a": 1, "\\u0061": 2}',
    "70 lists": b"[" * 70 + b"]" * 70,
    "900 lists": b"[" * 900 + b"]" * 900,
    "990 objects": b'{"a":' * 990 + b"1" + b"}" * 990,
    "100 thousand lists": b"[" * 100_000 + b"]" * 100_000,
    "a million values": b"[" + b"0," * 1_000_001 + b"0]",
    "an unknown tag": b'{"$object": "os.system"}',
    "a tag beside a key": b'{"$tuple": [], "a": 1}',
    "a tag of the wrong type": b'{"$bytes": 5}',
    "a tensor without memory for it": b'{"$torch.tensor": {"dtype": "uint8", "shape": [1099511627776], "data": ""}}',
    "an array of objects": b'{"$numpy.ndarray": {"dtype": "|O", "shape": [1], "order": "C", "data": "AAAAAAAAAAA="}}',
    "an int without end": b'{"$int": "0x' + b"f" * 100_000 + b'"}',
    "a range that is none": b'{"$range": [0, 1, 0]}',
    "a fraction without end": b'{"$Fraction": [1, {"$int": "0x' + b"f" * 100_000 + b'"}]}',
    "a decimal without end": b'{"$Decimal": "' + b"9" * 1_000_000 + b'"}',
    "a decimal beyond all exponents": b'{"$Decimal": "1E+999999999999999999999"}',
    "a path as a zone": b'{"$ZoneInfo": "../../../../etc/passwd"}',
    "a package as a zone": b'{"$ZoneInfo": "..os"}',
    "a factory that runs": b'{"$defaultdict": {"factory": "exec", "items": {}}}',
    "a stream at the end of the world": b'{"$BytesIO": {"data": {"$bytes": ""}, "position": 9007199254740993}}',
    "a seed that fills memory": json.dumps(
        {
            "$numpy.Generator": {
                "state": {"bit_generator": "PCG64", "state": {"state": 1, "inc": 1}, "has_uint32": 0, "uinteger": 0},
                "seed": {"entropy": 1, "spawn_key": [], "pool_size": 2**40, "n_children_spawned": 0},
            }
        }
    ).encode(),
    "a deque without end": b'{"$deque": {"items": [], "maxlen": {"$int": "0x8000000000000000"}}}',
    "nested namespaces": b'{"$SimpleNamespace": {"a": ' * 100 + b"1" + b"}}" * 100,
    "bytes in a part that is not there": b'{"$bytes": [1, 0, 1099511627776]}',
    "keys of one hash": json.dumps(
        {"$dict": [[{"$int": hex((number + 1) * (2**61 - 1))}, 0] for number in range(20_000)]}
    ).encode(),
}
"""What could stand where a value of the caller belongs."""

NUMBERS = [-1, -(2**31), -(2**63), 2**31 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**300]
NUMBER_PLACES: dict[str, list[tuple[Any, ...]]] = {
    "manifest": [("index", "size_bytes"), ("step",), ("epoch",), ("world_size",), ("total_bytes",), ("shard_count",)],
    "index": [
        ("block_bytes",),
        ("tensors", "w", 1, 0),
        ("tensors", "w", 1, 1),
        ("tensors", "w", 2),
        ("ranks", 0, 0),
        ("ranks", 0, 2),
        ("ranks", 0, 3),
        ("ranks", 0, 4),
        ("ranks", 0, 5),
        ("ranks", 0, 6),
        ("paths", "w", 1),
    ],
    "claim": [("epoch",), ("pid",)],
}
MAY_BE_LARGE = {
    ("step",),
    ("epoch",),
    ("world_size",),
    ("total_bytes",),
    ("shard_count",),
    ("pid",),
}
"""Counts that nothing else contradicts, up to 2**53: a key or a message is all that becomes of them."""

TEXT_PLACES: dict[str, list[tuple[tuple[Any, ...], list[object]]]] = {
    "manifest": [
        (("state",), ["", "COMMITTED", "deleted", None, 1]),
        (("created_at",), ["", "now", "2026-01-02", "2026-01-02T03:04:05", "9" * 5000]),
        (("index", "sha256"), ["", "AB" * 32, "ab" * 31, "ab" * 33, "zz" * 32, "ab" * 32 + "\n", None]),
        (("metrics", "loss"), ["0.5", "Infinity", "NaN", None, True, [0.5]]),
        (("environment", "python"), [3.11, None, ["3.11"]]),
        (("summary", "seconds"), ["1.5", None]),
        (("index",), [None, [], "index.bin", {}]),
        (("metadata",), [None, [], "x"]),
        (("sha256",), ["", "ab" * 32]),
        (("unknown",), [1]),
    ],
    "index": [
        (("tensors", "w", 0), ["", "object", "O", "torch.float32", "__class__", "float32\0", None, 5]),
        (("tensors", "w", 2), ["0", None, 0.5, 1, -2]),
        (("ranks", 0, 7), ["", "AAAA", "0" * 16, "../../etc", None, 5]),
        (("ranks", 0, 1), [path for path in PATHS if path] + [None, 5]),
        (
            ("paths", "w"),
            [[], ["a"] * 66, ["optimizer", "lr"], ["optimizer"], ["model", 1], [["model"]], "model", None],
        ),
        (("paths", "w", 1), [None, {}, {"key": [1]}, {"key": {"$eval": "1"}}, {"tuple": 1}, {"tuple": True}, 1.0]),
        (("values",), [{"w": 1}, [], None, "x"]),
        (("tensors",), [[], None, {}, {"w": []}, {"w": ["float32", [2, 4]]}, {"w": ["float32", [2, 4], 0, 0]}]),
        (("ranks",), [[], {}, None, [[0]], [INDEX["ranks"][0]] * 2, [[*INDEX["ranks"][0], 1]]]),
        (("unknown",), [1]),
    ],
    "claim": [
        (("resumed_from",), ["1/2", [1], [1, 2, 3], [-1, 0], [0.5, 1], {}]),
        (("line",), [None, "1/2", [1], [[1]], [[1, 2, 3]], [[-1, 0]], [[0.5, 1]], {}]),
        (("host",), [None, 5, ["node"]]),
        (("unknown",), [1]),
    ],
}


class Canary:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import cloudckpt.errors; cloudckpt.errors.woken = True",)


def _saved_by_torch() -> bytes:
    data = io.BytesIO()
    torch.save({"format_version": Canary()}, data)
    return data.getvalue()


def _saved_by_numpy() -> bytes:
    data = io.BytesIO()
    np.save(data, np.array([Canary()], dtype=object), allow_pickle=True)
    return data.getvalue()


def _zip_bomb() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b"0" * (32 * MIB))
    return data.getvalue()


CODE: dict[str, Callable[[], bytes]] = {
    "pickle": lambda: pickle.dumps(Canary()),
    "pickle of protocol 0": lambda: pickle.dumps(Canary(), protocol=0),
    "torch.save": _saved_by_torch,
    "numpy.save": _saved_by_numpy,
    "zip bomb": _zip_bomb,
    "gzip bomb": lambda: gzip.compress(b"0" * (32 * MIB)),
    "xz bomb": lambda: lzma.compress(b"0" * (32 * MIB)),
    "zstd bomb": lambda: zstandard.ZstdCompressor().compress(b"0" * (32 * MIB)),
    "zstd in zstd": lambda: zstandard.ZstdCompressor().compress(zstandard.ZstdCompressor().compress(b"{}")),
    "an index in an index": lambda: index_object(index_object(INDEX)),
    "safetensors that is JSON too": lambda: b'{       {"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "a shell script": lambda: b"#!/bin/sh\necho woken\n",
    "a program": lambda: b"\x7fELF" + bytes(1000),
    "zeros": lambda: bytes(4096),
    "an error page": lambda: b"<html><body>503 Slow Down</body></html>",
}


def _spoiled_records(kind: str) -> Iterator[tuple[str, object]]:
    """Yield right JSON that says something wrong."""
    record = KINDS[kind][0]
    for way, values in TEXT_PLACES[kind]:
        yield from ((f"{_dotted(way)} = {value!r:.80}", put(record, way, value)) for value in values)
    for way in NUMBER_PLACES[kind]:
        for number in NUMBERS:
            if not 0 <= number < 2**53 or way not in MAY_BE_LARGE:
                yield f"{_dotted(way)} = {number!r:.40}", put(record, way, number)
    if kind != "claim":
        yield from ((f"attempt {n}: {path!r:.40}", put(record, ("attempt",), path)) for n, path in enumerate(PATHS))


def _spoiled_values(kind: str) -> Iterator[tuple[str, bytes]]:
    """Yield what should be JSON, with one value of the caller's spoiled."""
    place = {"manifest": "metadata", "claim": None}.get(kind, "values")
    if place is not None:
        text = json.dumps(put(KINDS[kind][0], (place,), {"x": "HERE"}), indent=1).encode()
        yield from ((f"value: {name}", text.replace(b'"HERE"', value)) for name, value in VALUES.items())


def _dotted(way: tuple[Any, ...]) -> str:
    return ".".join(map(str, way))


def _named_cases() -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    for kind, (_, write, _) in KINDS.items():
        texts = ((f"JSON: {name}", text) for name, text in JSON_TEXTS.items())
        for name, record in chain(texts, _spoiled_values(kind), _spoiled_records(kind)):
            yield kind, name, partial(write, record)
        yield from ((kind, f"code: {name}", make) for name, make in CODE.items())


CASES = list(_named_cases())
# For seconds, what is proved with the kind that comes first.
_DEAR = ("a million values", "keys of one hash", "xz bomb")


def _marks(kind: str, name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if name.endswith(_DEAR) and kind != next(iter(KINDS)) else []


def test_there_are_as_many_cases_as_the_threat_model_asks_for() -> None:
    assert len(CASES) > 200
    assert len(PATHS) >= 40
    assert len({(kind, name) for kind, name, _ in CASES}) == len(CASES), "two cases of one name"


@pytest.mark.parametrize(
    ("kind", "make"),
    [pytest.param(kind, make, id=f"{kind}: {name}", marks=_marks(kind, name)) for kind, name, make in CASES],
)
def test_a_hostile_object_is_refused_and_costs_little(kind: str, make: Callable[[], bytes]) -> None:
    data = make()
    read = KINDS[kind][2]
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError) as caught:
            read(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert not isinstance(caught.value, FormatVersionError)
    assert peak_bytes < 32 * MIB + 32 * len(data)
    assert len(str(caught.value)) < KIB
    assert str(caught.value).isprintable()


def test_no_hostile_object_has_run_code() -> None:
    from cloudckpt import errors

    for name in ("pickle", "pickle of protocol 0", "torch.save", "numpy.save"):
        for _, _, read in KINDS.values():
            with pytest.raises(ManifestError):
                read(CODE[name]())
    assert not hasattr(errors, "woken")
    pickle.loads(CODE["pickle"]())
    assert hasattr(errors, "woken"), "the canary itself is dead"
    del errors.woken


def test_what_carries_the_most_values_for_its_size_costs_bounded_memory() -> None:
    """Empty lists take 24 times the memory of their text, and the limit of a manifest is what keeps that small."""
    text = json.dumps(put(MANIFEST, ("metadata",), {"x": "HERE"}), indent=1).encode()
    data = manifest_object(text.replace(b'"HERE"', b"[" + b"[]," * 100_000 + b"0]"))

    tracemalloc.start()
    try:
        read_manifest(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak_bytes * MANIFEST_LIMIT_BYTES < 512 * MIB * len(data)


@pytest.mark.parametrize("name", [path for path in PATHS if len(path) < 100])
def test_a_name_in_an_index_is_compared_and_never_becomes_a_key(name: str) -> None:
    record = json.loads(json.dumps(INDEX))
    record["tensors"] = {name: record["tensors"]["w"]}
    record["values"] = {f"{name}.lr": 0.5}
    record["paths"] = {}

    index = Index.decode(index_object(record), key="index.bin")

    keys = [shard_key(shard.attempt, shard.rank, shard.number) for shard in index.shards()]
    assert keys == [f"{ATTEMPT}/r00000-0000.safetensors"]
    assert list(index.tensors) == [name]


@pytest.mark.parametrize("number", [0, 2**31, 2**53 - 1])
def test_the_largest_numbers_that_are_read_make_keys_that_a_store_takes(number: int) -> None:
    made = put(put(INDEX, ("ranks", 0, 0), number), ("tensors", "w", 2), number)

    (shard,) = Index.decode(index_object(made), key="index.bin").shards()

    assert (shard.rank, shard.number) == (number, 0)
    key = checkpoint_prefix(7, 1) + shard_key(ATTEMPT, shard.rank, shard.number)
    assert check_key(key) == key


# -- chance --------------------------------------------------------------------------------------------------

TOKENS = [
    *(
        b"-1",
        b"0",
        b"64",
        b"1e999",
        b"null",
        b"true",
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b":",
        b'"',
        b"\\u0000",
        b"\xff",
        b"\n",
    ),
    *(b"9223372036854775808", b'"w"', b"[[], [], 0, 8]", b'"sha256": ""'),
    *(b'{"$tuple": [[]]}', b'{"key": {"$dict": []}}', b'{"tuple": 0}'),
]


def _mutated(text: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.choice([1, 1, 2, 5])):
        at = chance.randrange(len(text) + 1)
        match chance.randrange(5):
            case 0:
                text = text[:at] + bytes([chance.randrange(256)]) + text[at + 1 :]
            case 1:
                text = text[:at] + chance.choice(TOKENS) + text[at + chance.choice([0, 1, 3]) :]
            case 2:
                text = text[:at] + text[at + chance.randrange(1, 20) :]
            case 3:
                text = text[:at] + text[at : at + chance.randrange(1, 60)] + text[at:]
            case 4:
                other = chance.randrange(len(text) + 1)
                text = text[:at] + text[other : other + chance.randrange(1, 20)] + text[at + 1 :]
    return text


def _read_mutants(count: int, seed: int) -> dict[str, int]:
    """Read mutants of all kinds of objects; return how many of each kind were still whole."""
    chance = random.Random(seed)
    whole = dict.fromkeys(KINDS, 0)
    texts = {
        kind: json.dumps(record, indent=chance.choice([None, 1])).encode() for kind, (record, _, _) in KINDS.items()
    }
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        _, write, read = KINDS[kind]
        data = write(_mutated(texts[kind], chance))
        try:
            read(data)
            whole[kind] += 1
        except ManifestError:
            pass
    return whole


def _check_mutants(count: int, seed: int) -> None:
    tracemalloc.start()
    try:
        whole = _read_mutants(count, seed)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    # Some mutants are right (another digit in a time); if all were, or none, nothing was tried.
    assert all(0 < found < count // 8 for found in whole.values())
    assert peak_bytes < 8 * MIB


@pytest.mark.parametrize("seed", range(3))
def test_mutated_objects_are_whole_or_refused(seed: int) -> None:
    _check_mutants(3000, seed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(100, 104))
def test_many_mutated_objects_are_whole_or_refused(seed: int) -> None:
    _check_mutants(100_000, seed)
