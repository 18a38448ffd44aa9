"""Payloads too large for JSON become parts, and come back exactly; what names parts wrongly is refused."""

from __future__ import annotations

import io
import json
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given

from cloudckpt.errors import ManifestError, UnsupportedValueError
from cloudckpt.format import codec
from cloudckpt.format.codec import encoding
from cloudckpt.format.codec.parts import ALONE_BYTES
from cloudckpt.format.codec.walk import MAX_INLINE_BYTES, SPILL_BYTES
from tests.format.test_codec import assert_kept, everything, fingerprint, lenient, stream_at

Json = Any
LARGE = ALONE_BYTES + 8


def encoded(value: object, **options: None) -> tuple[Json, dict[int, torch.Tensor]]:
    """Return a value's JSON as it is read, and its parts by number, in memory of their own."""
    parts = codec.Parts(**options)
    data = msgspec.json.decode(msgspec.json.encode(codec.encode(value, key="v", parts=parts)))
    tensors = parts.tensors("v")
    names = codec.part_names(tensors)["v"] if tensors else {}
    return data, {number: tensors[name].clone() for number, name in names.items()}


VALUES: dict[str, object] = {
    "bytes": bytes(range(256)) * 5000,
    "bytearray": bytearray(b"ab" * LARGE),
    "text": "aé🙂" * 100_000,
    "text with surrogates": "\udcff" * 100_000,
    "array": np.arange(LARGE, dtype=">i4").reshape(2, -1),
    "array by columns": np.asfortranarray(np.arange(400_000.0).reshape(500, 800)),
    "array view": np.arange(LARGE).reshape(8, -1)[:, ::2],
    "array of text": np.full(100_000, "é", "<U3"),
    "tensor": torch.arange(LARGE, dtype=torch.bfloat16).reshape(2, -1),
    "tensor view": torch.arange(LARGE).reshape(2, -1).t(),
    "complex tensor": torch.arange(200_000).to(torch.complex64).conj(),
    "stream": stream_at(b"z" * LARGE, 7),
    "many": {"a": [np.arange(3000) + i for i in range(100)], "b": [torch.ones(40_000), bytes(LARGE), b"", "x" * 9000]},
    "small after large": [bytes(LARGE), b"a", "b", np.zeros(0), torch.zeros(0, 3)],
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("alone", [{}, {"alone_bytes": None}], ids=["alone", "together"])
def test_a_value_of_any_size_comes_back_and_leaves_little_json(value: object, alone: dict[str, None]) -> None:
    data, parts = encoded(value, **alone)

    assert parts
    assert len(msgspec.json.encode(data)) < 4 * SPILL_BYTES
    twin = codec.decode(data, key="v", parts=parts)
    plain = value.contiguous() if isinstance(value, torch.Tensor) else value
    assert fingerprint(twin) == fingerprint(plain)


@lenient
@given(everything)
def test_any_value_comes_back_from_parts(value: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "SPILL_BYTES", 2)
        patch.setattr(encoding, "_LONG_TEXT", 1)
        parts = codec.Parts(alone_bytes=6)
        data = json.loads(json.dumps(codec.encode(value, key="v", parts=parts)))
        held = parts.tensors("v")
        numbers = codec.part_names(held).get("v", {})
        twin = codec.decode(data, key="v", parts={number: held[name].clone() for number, name in numbers.items()})

    assert fingerprint(twin) == fingerprint(value)


def test_a_small_value_has_no_parts() -> None:
    assert encoded([bytes(SPILL_BYTES // 2), np.zeros(100), "text"])[1] == {}


def test_a_large_payload_is_not_copied_on_the_way_out_nor_in() -> None:
    array, tensor, raw = np.arange(LARGE), torch.arange(LARGE), bytes(LARGE)
    parts = codec.Parts()
    data = codec.encode([array, tensor, raw], key="v", parts=parts)
    held = list(parts.tensors("v").values())

    places = [array.ctypes.data, tensor.data_ptr(), np.frombuffer(raw, np.uint8).ctypes.data]
    assert [part.data_ptr() for part in held] == places

    read = dict(enumerate([part.clone() for part in held], start=1))
    twin: Any = codec.decode(data, key="v", parts=read)
    assert (twin[0].ctypes.data, twin[1].data_ptr()) == (read[1].data_ptr(), read[2].data_ptr())
    twin[0][0] = twin[1][0] = 7  # and may be written


def test_parts_outlive_the_value_that_they_were_taken_from() -> None:
    parts = codec.Parts()
    data = codec.encode([bytes([7]) * LARGE, np.full(LARGE, 5, "u1")], key="v", parts=parts)
    held = parts.tensors("v")
    del parts

    assert [(int(part[0]), int(part[-1])) for part in held.values()] == [(7, 7), (5, 5)]
    assert data == [
        {"$bytes": [1, 0, LARGE]},
        {"$numpy.ndarray": {"dtype": "|u1", "shape": [LARGE], "order": "C", "data": [2, 0, LARGE]}},
    ]


def test_equal_values_have_equal_digests_and_others_have_not() -> None:
    def digest(value: object) -> str:
        parts = codec.Parts()
        codec.encode(value, key="v", parts=parts)
        return parts.digest()

    base = [bytes(LARGE), bytes(SPILL_BYTES + 1)]
    assert digest(base) == digest([bytes(LARGE), bytes(SPILL_BYTES + 1)])
    assert digest([1]) == ""
    others = [[b"\x01" + bytes(LARGE - 1), bytes(SPILL_BYTES + 1)], [bytes(LARGE), bytes(SPILL_BYTES) + b"\x01"]]
    assert digest(base) not in [digest(other) for other in others]


def test_keys_and_sets_stand_whole_in_the_json() -> None:
    key = b"k" * (2 * SPILL_BYTES)
    data, parts = encoded({key: 1, "s": {key, b"other"}})

    assert parts == {}
    assert codec.decode(data, key="v") == {key: 1, "s": {key, b"other"}}
    data, parts = encoded([{key: 1}, b"", torch.zeros(0)])  # what is empty goes nowhere, however much came before it
    assert parts == {}
    assert data[1:] == [{"$bytes": ""}, {"$torch.tensor": {"dtype": "float32", "shape": [0], "data": ""}}]
    with pytest.raises(UnsupportedValueError, match="in metadata, keys and sets"):
        encoded({bytes(MAX_INLINE_BYTES + 1)})


@pytest.mark.parametrize(
    "value", [torch.zeros(1).expand(2**50), np.broadcast_to(np.zeros(1), 2**50)], ids=["tensor", "array"]
)
def test_what_was_expanded_beyond_memory_is_refused(value: object) -> None:
    with pytest.raises(UnsupportedValueError, match=r"v\[0\].*expanded"):
        encoded([value])


PLACES: dict[str, Json] = {
    "no such part": [1, 0, 4],
    "no parts at all": [-1, 0, 4],
    "before its begin": [0, -1, 3],
    "after its end": [0, 4, 9],
    "backwards": [0, 4, 2],
    "nothing": [0, 4, 4],
    "a fraction": [0, 0, 4.0],
    "a truth": [0, False, 4],
    "two numbers": [0, 4],
    "huge": [0, 0, 2**52],
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("tag", ["$bytes", "$bytearray", "$str"])
def test_a_place_that_its_part_has_not_is_refused(place: Json, tag: str) -> None:
    with pytest.raises(ManifestError, match=r"^v\.x .*restore an older step"):
        codec.decode({"x": {tag: place}}, key="v", parts={0: torch.zeros(8, dtype=torch.uint8)})


def test_bytes_that_two_payloads_share_are_refused() -> None:
    part = torch.zeros(8, dtype=torch.uint8)
    assert codec.decode([{"$bytes": [0, 0, 8]}], key="v", parts={0: part}) == [bytes(8)]
    with pytest.raises(ManifestError, match=r"v\[1\]"):
        codec.decode([{"$bytes": [0, 0, 8]}, {"$bytes": [0, 7, 8]}], key="v", parts={0: part})


@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_elements_that_do_not_fill_their_place_are_refused(dtype: str) -> None:
    record = {"dtype": dtype, "shape": [3], "data": [0, 0, 8]}
    with pytest.raises(ManifestError, match="8 bytes where its shape needs"):
        codec.decode({"$torch.tensor": record}, key="v", parts={0: torch.zeros(8, dtype=torch.uint8)})


def test_text_in_a_part_that_is_no_text_is_refused() -> None:
    with pytest.raises(ManifestError, match="malformed str"):
        codec.decode({"$str": [0, 0, 1]}, key="v", parts={0: torch.full((1,), 255, dtype=torch.uint8)})


def test_a_part_is_named_after_its_value() -> None:
    names = [codec.part_name(number, name) for number, name in ((0, "a.b"), (12, "a.b"), (100_000, "x\ny"))]
    assert codec.part_names([*names, "a.b", "cloudckpt.rng.r00000"]) == {
        "a.b": {0: names[0], 12: names[1]},
        "x\ny": {100_000: names[2]},
    }


def test_what_is_decoded_without_parts_is_as_before() -> None:
    assert_kept([io.BytesIO(b"abc"), b"x" * MAX_INLINE_BYTES])
