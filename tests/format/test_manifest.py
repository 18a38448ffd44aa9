"""A manifest says what was written, to people and programs alike, and no bit of it changes unseen."""

from __future__ import annotations

import hashlib
import json
import math
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudckpt.errors import FormatVersionError, ManifestError, OptionsError, UnsupportedValueError
from cloudckpt.format import record
from cloudckpt.format.manifest import (
    MANIFEST_LIMIT_BYTES,
    EpochClaim,
    IndexRef,
    Manifest,
    decode_claim,
    digest_of,
    metadata_to_json,
    metrics_to_json,
)
from cloudckpt.format.record import FORMAT_VERSION, INDEX_LIMIT_BYTES, SHARING_VERSION
from tests.effort import examples

KEY = "step-0000012000-e0003/manifest.json"

COMMITTED = Manifest(
    format_version=FORMAT_VERSION,
    state="committed",
    step=12_000,
    epoch=3,
    attempt="0123456789abcdef",
    created_at="2026-01-02T03:04:05.678+00:00",
    world_size=8,
    total_bytes=1 << 40,
    tensor_count=290,
    shard_count=16_384,
    index=IndexRef(size_bytes=4096, sha256="ab" * 32),
    metrics=metrics_to_json({"val_loss": 1.25, "perplexity": math.inf}),
    metadata=metadata_to_json({"run": "Ω-7", "betas": (0.9, 0.95)}),
    environment={"package.torch": "2.13.0", "root": "s3://bucket/run-7"},
    summary={"seconds": 1.5},
)
VOID = Manifest(
    format_version=FORMAT_VERSION,
    state="void",
    step=12_000,
    epoch=3,
    attempt="0123456789abcdef",
    created_at="2026-01-02T03:04:05.678+00:00",
)
CLAIM = EpochClaim(
    format_version=FORMAT_VERSION,
    epoch=3,
    nonce="00ff00ff00ff00ff",
    created_at="2026-01-02T03:04:05.678+00:00",
    host="node-1",
    pid=4242,
    resumed_from=(11_500, 2),
)

metrics = st.dictionaries(st.text(max_size=9).map("m".__add__), st.floats(), max_size=4)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)
counts = st.integers(0, 2**53 - 1)
manifests = st.builds(
    Manifest,
    format_version=st.just(FORMAT_VERSION),
    state=st.just("committed"),
    step=st.none() | counts,
    epoch=counts,
    attempt=st.text("0123456789abcdef", min_size=16, max_size=16),
    created_at=st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat),
    world_size=counts,
    total_bytes=counts,
    tensor_count=counts,
    shard_count=counts,
    index=st.builds(IndexRef, size_bytes=st.integers(1, INDEX_LIMIT_BYTES), sha256=st.just("0f" * 32)),
    metrics=metrics.map(metrics_to_json),
    metadata=st.dictionaries(st.text(max_size=9), plain_values, max_size=3).map(metadata_to_json),
    environment=st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3),
    summary=st.dictionaries(st.text(max_size=9), st.floats(allow_nan=False, allow_infinity=False), max_size=3),
)


def seal(text: bytes) -> bytes:
    """Seal a manifest by the words of the format: the SHA-256 of its bytes with the last field empty."""
    bare = re.sub(rb'"sha256": "[0-9a-f]*"\n}\n\Z', b'"sha256": ""\n}\n', text)
    return bare.replace(b'"sha256": ""\n}\n', b'"sha256": "%s"\n}\n' % hashlib.sha256(bare).hexdigest().encode())


def changed(manifest: Manifest, **changes: Any) -> bytes:
    """Return a sealed manifest with other values, which may be of types that it cannot have."""
    record = {**json.loads(manifest.encode()), **changes}
    record["sha256"] = record.pop("sha256")
    return seal(json.dumps(record, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")


# -- round trip ----------------------------------------------------------------------------------------------


@given(manifests)
def test_a_manifest_comes_back_as_it_was(manifest: Manifest) -> None:
    data = manifest.encode()

    found = Manifest.decode(data, key=KEY)

    assert msgspec.structs.replace(found, sha256="") == manifest
    assert found.encode() == data


@pytest.mark.parametrize("manifest", [COMMITTED, VOID], ids=["committed", "void"])
def test_encoding_is_canonical(manifest: Manifest) -> None:
    """The same decision is the same bytes, however often it is written: a read-back can tell ours from another's."""
    data = manifest.encode()

    assert Manifest.decode(data, key=KEY).encode() == data
    assert list(json.loads(data)) == [
        "format_version",
        "state",
        "step",
        "epoch",
        "attempt",
        "claim",
        "created_at",
        "world_size",
        "total_bytes",
        "tensor_count",
        "shard_count",
        "index",
        "metrics",
        "metadata",
        "environment",
        "summary",
        "sha256",
    ]
    assert data == json.dumps(json.loads(data), indent=1, ensure_ascii=False).encode() + b"\n"


def test_what_this_library_wrote_is_not_searched_for_double_names_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    data = COMMITTED.encode()
    monkeypatch.setattr(record, "json", None)
    assert Manifest.decode(data, key=KEY) == msgspec.structs.replace(COMMITTED, sha256=json.loads(data)["sha256"])


def test_the_seal_is_the_digest_of_the_bytes_with_the_seal_empty() -> None:
    data = COMMITTED.encode()

    assert seal(data) == data
    assert Manifest.decode(data, key=KEY).sha256 == json.loads(data)["sha256"]


def test_version_1_as_it_was_first_written_is_read() -> None:
    """An object from a store, byte for byte: whatever changes in the code, this stays readable."""
    data = b"""{
 "format_version": 1,
 "state": "committed",
 "step": 7,
 "epoch": 1,
 "attempt": "0123456789abcdef",
 "created_at": "2026-01-02T03:04:05.678+00:00",
 "world_size": 2,
 "total_bytes": 1000,
 "tensor_count": 3,
 "shard_count": 2,
 "index": {
  "size_bytes": 321,
  "sha256": "abababababababababababababababababababababababababababababababab"
 },
 "metrics": {
  "loss": 0.5,
  "worst": "nan"
 },
 "metadata": {
  "betas": {
   "$tuple": [
    0.9,
    0.95
   ]
  }
 },
 "environment": {
  "package.torch": "2.13.0"
 },
 "summary": {
  "seconds": 1.5
 },
 "sha256": "e097a4fdad25dbbe2168fc3c9c1ce3df889e5390b69f8f20d72704e3a37c40c3"
}
"""

    found = Manifest.decode(data, key=KEY)

    assert (found.step, found.epoch, found.world_size) == (7, 1, 2)
    assert found.index == IndexRef(size_bytes=321, sha256="ab" * 32)
    assert found.metadata_values() == {"betas": (0.9, 0.95)}
    assert found.metric_values()["loss"] == 0.5
    assert math.isnan(found.metric_values()["worst"])


def test_the_seal_does_not_depend_on_how_a_later_release_would_write_it() -> None:
    """Numbers and escapes have several spellings; what was sealed in one is read by a writer of another."""
    data = seal(COMMITTED.encode().replace(b"1.25", b"125.0e-2").replace("Ω".encode(), b"\\u03a9"))

    found = Manifest.decode(data, key=KEY)

    assert (found.metrics["val_loss"], found.metadata["run"]) == (1.25, "Ω-7")


# -- damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", [COMMITTED, VOID], ids=["committed", "void"])
def test_every_flipped_bit_is_found_and_is_never_taken_for_a_newer_version(manifest: Manifest) -> None:
    data = bytearray(manifest.encode())

    missed = []
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        try:
            Manifest.decode(bytes(data), key=KEY)
            missed.append(bit)
        except FormatVersionError:
            missed.append(bit)
        except ManifestError:
            pass
        data[bit // 8] ^= 1 << bit % 8

    assert missed == []


def test_every_truncation_is_found() -> None:
    data = COMMITTED.encode()

    for size in range(len(data)):
        with pytest.raises(ManifestError, match="was changed after it was written"):
            Manifest.decode(data[:size], key=KEY)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\n",
        lambda data: b" " + data,
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b'"epoch": 3', b'"epoch":  3'),
        lambda data: data.replace(b'"epoch": 3', b'"epoch":3'),
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.replace(b"\n ", b"\n  "),
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: json.dumps(json.loads(data), indent=1, sort_keys=True).encode() + b"\n",
        lambda data: data.replace(b' "epoch": 3,\n', b' "epoch": 3,\n "epoch": 3,\n'),
        lambda data: data.replace(b' "step": 12000,\n "epoch": 3,\n', b' "epoch": 3,\n "step": 12000,\n'),
        lambda data: data.replace(b"12000", b"12001"),
        lambda data: data.replace("Ω".encode(), b"\\u03a9"),
        lambda data: data + data,
        lambda data: data.upper(),
        lambda data: b"",
        lambda data: data.replace(b'"sha256": "', b'"sha256": "0', 2),
    ],
)
def test_a_manifest_that_was_written_anew_is_refused(change: Any) -> None:
    data = COMMITTED.encode()
    assert change(data) != data

    with pytest.raises(ManifestError, match=f"{KEY} was changed after it was written; restore an older step") as caught:
        Manifest.decode(change(data), key=KEY)

    assert caught.value.key == KEY


@settings(max_examples=examples(500))
@given(st.integers(0, len(COMMITTED.encode()) - 1), st.integers(0, 40), st.binary(max_size=40))
def test_other_bytes_under_a_right_seal_are_a_manifest_or_refused(start: int, length: int, other: bytes) -> None:
    """What whoever can write to the prefix can do: the reader may meet anything."""
    data = COMMITTED.encode()
    try:
        found = Manifest.decode(seal(data[:start] + other + data[start + length :]), key=KEY)
        found.metric_values()
        found.metadata_values()
        found.created()
    except ManifestError:
        return

    assert found.problems() == []


@pytest.mark.parametrize("changes", [{"world_size": -1}, {"attempt": "x"}, {"created_at": "now"}, {"index": None}])
def test_what_no_reader_would_take_is_never_written(changes: dict[str, Any]) -> None:
    with pytest.raises(OptionsError, match="no reader would take"):
        msgspec.structs.replace(COMMITTED, **changes).encode()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_has_not_is_never_written(number: float) -> None:
    with pytest.raises(OptionsError, match="no reader would take"):
        msgspec.structs.replace(COMMITTED, summary={"worked_s": number}).encode()


# -- what is inside ------------------------------------------------------------------------------------------


def test_a_void_manifest_has_no_index() -> None:
    assert Manifest.decode(VOID.encode(), key=KEY).index is None
    for wrong in (changed(VOID, index={"size_bytes": 1, "sha256": "ab" * 32}), changed(COMMITTED, index=None)):
        with pytest.raises(ManifestError, match=r"its state is (void|committed), and it has (an|no) index"):
            Manifest.decode(wrong, key=KEY)


def test_an_index_larger_than_a_reader_takes_is_refused_before_it_is_asked_for() -> None:
    largest = changed(COMMITTED, index={"size_bytes": INDEX_LIMIT_BYTES, "sha256": "ab" * 32})
    larger = changed(COMMITTED, index={"size_bytes": INDEX_LIMIT_BYTES + 1, "sha256": "ab" * 32})

    assert Manifest.decode(largest, key=KEY).index == IndexRef(size_bytes=INDEX_LIMIT_BYTES, sha256="ab" * 32)
    with pytest.raises(ManifestError, match="a size that is not read"):
        Manifest.decode(larger, key=KEY)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1, -0.0, 5e-324, 1.7976931348623157e308])
def test_every_float_survives_as_a_metric(value: float) -> None:
    manifest = msgspec.structs.replace(COMMITTED, metrics=metrics_to_json({"loss": value}))

    (found,) = Manifest.decode(manifest.encode(), key=KEY).metric_values().values()

    assert repr(found) == repr(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3.0), (True, 1.0), (np.float32(0.5), 0.5), (np.int64(2), 2.0), (torch.tensor(0.25), 0.25)],
)
def test_every_kind_of_number_is_a_metric(value: object, expected: float) -> None:
    assert metrics_to_json({"loss": value}) == {"loss": expected}


@pytest.mark.parametrize(
    "value",
    [
        *(None, "0.5", b"0.5", [0.5], {"a": 1}, 1j, 10**400, object()),
        *(np.zeros(2), torch.tensor([0.5, 0.5]), torch.empty((), device="meta")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_number_is_no_metric(value: object) -> None:
    with pytest.raises(OptionsError, match="metric 'loss' is"):
        metrics_to_json({"loss": value})


@pytest.mark.parametrize("name", ["", " ", "\t\n", "\u200b", 7, None, "loss\udc80"])
def test_a_metric_without_a_usable_name_is_refused(name: Any) -> None:
    with pytest.raises(OptionsError, match="metric name"):
        metrics_to_json({name: 1.0})


@pytest.mark.parametrize("name", [7, None, "a\udc80"])
def test_metadata_without_a_usable_name_is_refused(name: Any) -> None:
    with pytest.raises(OptionsError, match="metadata key"):
        metadata_to_json({name: 1})


def test_no_metrics_and_no_metadata_are_empty() -> None:
    assert (metrics_to_json(None), metadata_to_json(None)) == ({}, {})


@given(st.dictionaries(st.text(max_size=9), plain_values, max_size=3))
def test_metadata_comes_back_with_its_types(values: dict[str, object]) -> None:
    manifest = msgspec.structs.replace(COMMITTED, metadata=metadata_to_json(values))

    found = Manifest.decode(manifest.encode(), key=KEY).metadata_values()

    assert repr(found) == repr(values)


def test_typed_metadata_comes_back_with_its_types() -> None:
    values = {"dtype": torch.bfloat16, "shape": torch.Size([2, 3]), "raw": b"\0\xff", "seen": {1, 2}, "nan": math.nan}
    manifest = msgspec.structs.replace(COMMITTED, metadata=metadata_to_json(values))

    found = Manifest.decode(manifest.encode(), key=KEY).metadata_values()

    assert repr(found) == repr(values)
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in values.items()}


def test_metadata_that_the_codec_refuses_is_named() -> None:
    with pytest.raises(UnsupportedValueError, match=r"metadata\.model\.layer") as caught:
        metadata_to_json({"model": {"layer": torch.nn.Identity()}})

    assert caught.value.key == "metadata.model.layer"


def test_damaged_metadata_is_named() -> None:
    data = changed(COMMITTED, metadata={"run": {"$eval": "1+1"}})

    with pytest.raises(ManifestError, match=r"metadata\.run"):
        Manifest.decode(data, key=KEY).metadata_values()


def test_a_manifest_that_is_too_large_is_refused_at_the_save() -> None:
    room = MANIFEST_LIMIT_BYTES - len(msgspec.structs.replace(COMMITTED, metadata={"log": ""}).encode())
    fits = msgspec.structs.replace(COMMITTED, metadata={"log": "x" * room})
    too_large = msgspec.structs.replace(COMMITTED, metadata={"log": "x" * (room + 1)})

    assert len(fits.encode()) == MANIFEST_LIMIT_BYTES
    assert msgspec.structs.replace(Manifest.decode(fits.encode(), key=KEY), sha256="") == fits
    with pytest.raises(OptionsError, match="move large metadata into the state"):
        too_large.encode()
    with pytest.raises(ManifestError, match="has 4194305 bytes"):
        Manifest.decode(changed(fits, metadata={"log": "x" * (room + 1)}), key=KEY)


def test_text_that_no_manifest_can_hold_is_refused_at_the_save() -> None:
    with pytest.raises(OptionsError, match=r"'/data/\\udcff' has lone surrogates"):
        msgspec.structs.replace(COMMITTED, environment={"root": "/data/\udcff"}).encode()


def test_created_at_is_read_as_a_time_in_utc() -> None:
    manifest = msgspec.structs.replace(COMMITTED, created_at="2026-01-02T03:04:05.678+02:00")

    found = Manifest.decode(manifest.encode(), key=KEY).created()

    assert found == datetime(2026, 1, 2, 1, 4, 5, 678_000, tzinfo=UTC)
    assert found.tzinfo is UTC


def test_the_digest_is_that_of_sha256sum() -> None:
    assert digest_of(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# -- versions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [SHARING_VERSION + 1, 99, 2**53, 10**30])
def test_a_newer_manifest_says_to_upgrade_whatever_else_it_holds(version: int) -> None:
    data = changed(COMMITTED, format_version=version, state="leased", replicas=[1, 2])

    with pytest.raises(FormatVersionError, match="upgrade cloudckpt to read it") as caught:
        Manifest.decode(data, key=KEY)

    assert caught.value.key == KEY


@pytest.mark.parametrize("version", [0, -1])
def test_a_version_that_never_was_is_not_newer(version: int) -> None:
    with pytest.raises(ManifestError, match=f"has format version {version}; restore") as caught:
        Manifest.decode(changed(COMMITTED, format_version=version), key=KEY)

    assert not isinstance(caught.value, FormatVersionError)


# -- claims --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resumed_from", [None, (11_500, 2), (0, 0)])
def test_a_claim_comes_back_as_it_was(resumed_from: tuple[int, int] | None) -> None:
    claim = msgspec.structs.replace(CLAIM, resumed_from=resumed_from)

    assert decode_claim(claim.encode(), key="epochs/0000000003.json") == claim


def test_a_claim_with_a_line_comes_back_as_it_was() -> None:
    claim = msgspec.structs.replace(CLAIM, line=[(11_500, 2), (70, 1)])

    assert decode_claim(claim.encode(), key="epochs/0000000003.json") == claim


def test_a_newer_claim_says_to_upgrade() -> None:
    data = json.dumps({**json.loads(CLAIM.encode()), "format_version": FORMAT_VERSION + 1, "lease_s": 60}).encode()

    with pytest.raises(FormatVersionError, match="upgrade cloudckpt to read it"):
        decode_claim(data, key="epochs/0000000003.json")


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"epoch": "3"},
        {"epoch": 3.0},
        {"epoch": True},
        {"pid": -1},
        {"pid": 2**60},
        {"resumed_from": [1]},
        {"resumed_from": [1, 2, 3]},
        {"resumed_from": [1, -2]},
        {"resumed_from": "1,2"},
        {"line": None},
        {"line": [[1]]},
        {"line": [[1, -2]]},
        {"host": None},
        {"nonce": 5},
        {"format_version": 0},
        {"format_version": None},
        {"lease_s": 60},
    ],
    ids=str,
)
def test_a_claim_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    data = json.dumps({**json.loads(CLAIM.encode()), **change}).encode()

    with pytest.raises(ManifestError) as caught:
        decode_claim(data, key="epochs/0000000003.json")

    assert caught.value.key == "epochs/0000000003.json"


def test_every_flipped_bit_of_a_claim_is_a_claim_or_refused() -> None:
    """A claim has no seal: what it says is for people; the epoch that counts is the one in its key."""
    data = bytearray(CLAIM.encode())
    refused = 0
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        try:
            decode_claim(bytes(data), key="epochs/0000000003.json")
        except ManifestError:
            refused += 1
        data[bit // 8] ^= 1 << bit % 8

    assert 0 < refused < 8 * len(data)


@pytest.mark.parametrize(
    "told", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59+00:00", "9999-12-31T23:59:59-23:59", -1e300, 1e300]
)
@pytest.mark.parametrize("hours", [-14, 14])
def test_a_time_at_the_end_of_all_times_is_shown_in_any_zone(told: str | float, hours: int) -> None:
    moment = record.moment_of(told)
    assert moment.utcoffset() == timedelta(0)
    assert moment.astimezone(timezone(timedelta(hours=hours))) == moment


def test_a_time_is_the_one_that_is_told() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    assert record.moment_of(moment.isoformat()) == moment
    assert record.moment_of("2026-01-02T05:04:05.000678+02:00") == moment
    assert record.moment_of(moment.timestamp()) == moment
    with pytest.raises(ValueError, match="has no offset"):
        record.moment_of("2026-01-02T03:04:05")
