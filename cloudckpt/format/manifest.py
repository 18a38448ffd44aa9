"""The manifest: the one small, readable object whose creation makes a checkpoint exist.

A pure value with strict decoding: JSON, indented for people, that ends with the SHA-256 of itself, so that no bit
of it can change unseen; it names the index by size and SHA-256, and the index names the shards. No clock and no
store here.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Literal, cast

import msgspec

from cloudckpt.errors import ManifestError, OptionsError
from cloudckpt.format import codec
from cloudckpt.format.codec import JsonValue
from cloudckpt.format.codec.walk import is_text
from cloudckpt.format.record import (
    INDEX_LIMIT_BYTES,
    NUMBER_LIMIT,
    SHARING_VERSION,
    decode_record,
    encode_record,
    moment_of,
)
from cloudckpt.keys import EPOCH_LIMIT, STEP_LIMIT, checkpoint_prefix, is_attempt, shown

__all__ = [
    "MANIFEST_LIMIT_BYTES",
    "EpochClaim",
    "IndexRef",
    "Manifest",
    "Reference",
    "decode_claim",
    "digest_of",
    "metadata_to_json",
    "metrics_to_json",
    "record_of_call",
]

# A manifest is a few KiB; user metadata may make it larger, but it is read in one request and held in memory.
MANIFEST_LIMIT_BYTES = 4 << 20
# Of it, for all that is not the caller's own: counts, versions, the data path.
_OWN_BYTES = 64 << 10

_SHA256 = re.compile(r"\A[0-9a-f]{64}\Z")
# How every manifest ends, in every version. The seal covers the bytes as they stand, not what they decode to: so
# damage is told from a newer version, and a later release reads what this one sealed.
_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"\n}\n\Z')
_SEAL_BYTES = len('"sha256": ""\n}\n') + 64

Metric = float | Literal["nan", "inf", "-inf"]


def digest_of(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal, as `sha256sum` prints it."""
    return hashlib.sha256(data).hexdigest()


class IndexRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The index that a manifest commits: its size and SHA-256; its key follows from the attempt."""

    size_bytes: int
    sha256: str

    def is_possible(self) -> bool:
        """Tell whether an index that a reader takes can have this size and digest."""
        return 0 < self.size_bytes <= INDEX_LIMIT_BYTES and _SHA256.match(self.sha256) is not None


class Reference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another checkpoint of the same root that holds some shards: how many, and their bytes; the index says which.

    It holds them itself: nothing refers to a reference.
    """

    step: int
    epoch: int
    attempt: str
    shard_count: int
    total_bytes: int

    @property
    def prefix(self) -> str:
        """Where that checkpoint stands, or stood, below the root, with its slash."""
        return checkpoint_prefix(self.step, self.epoch)

    def is_possible(self) -> bool:
        """Tell whether there can be such a checkpoint, with such shards."""
        is_place = 0 <= self.step < STEP_LIMIT and 0 < self.epoch < EPOCH_LIMIT and is_attempt(self.attempt)
        return is_place and 0 < self.shard_count < NUMBER_LIMIT and 0 < self.total_bytes < NUMBER_LIMIT


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record of one decision on one checkpoint.

    Attributes:
        format_version: of this schema.
        state: `committed`, or `void`: a sweep decided that the attempt never may commit.
        step: training step, or None for a checkpoint outside a root.
        epoch: incarnation of the saving job, 0 outside a root.
        attempt: which attempt's objects make up the checkpoint.
        claim: the nonce of the claim by which its epoch was written; "" outside a root.
        created_at: RFC 3339 in UTC, by the coordinator's clock; for people, never for decisions between jobs.
        world_size: ranks that saved.
        total_bytes: bytes of all shards.
        tensor_count: tensors.
        shard_count: shards.
        index: the index object, None when void.
        metrics: what the caller measured; non-finite ones as text.
        metadata: the caller's own, in the codec's JSON.
        environment: versions, platform, device and data path of the job that saved.
        summary: what the save did: seconds, requests, retries; and how long its line of history has been at work.
        references: of version 2, in which they may be none: who else holds shards of it. Left out of version 1.
        sha256: of this manifest with the field itself empty; always the last field.
    """

    format_version: int
    state: Literal["committed", "void"]
    step: int | None
    epoch: int
    attempt: str
    claim: str = ""
    created_at: str
    world_size: int = 1
    total_bytes: int = 0
    tensor_count: int = 0
    shard_count: int = 0
    index: IndexRef | None = None
    metrics: dict[str, Metric] = {}
    metadata: dict[str, JsonValue] = {}
    environment: dict[str, str] = {}
    summary: dict[str, float] = {}
    references: list[Reference] | msgspec.UnsetType = msgspec.UNSET
    sha256: str = ""

    def encode(self) -> bytes:
        """Return the object's bytes, sealed with their own digest.

        What `decode` refuses is never written: a checkpoint that nobody can read would be worse than none.

        Raises:
            OptionsError: metrics and metadata make it larger than a manifest may be; or it holds what no reader takes.
        """
        bare = msgspec.structs.replace(self, sha256="")
        sealed = encode_record(msgspec.structs.replace(self, sha256=digest_of(encode_record(bare))))
        if len(sealed) > MANIFEST_LIMIT_BYTES:
            raise OptionsError(
                f"the manifest of step {self.step} has {len(sealed)} bytes, more than {MANIFEST_LIMIT_BYTES}; "
                "move large metadata into the state"
            )
        try:
            self.decode(sealed, key=f"of step {self.step}")
        except ManifestError as exc:
            raise OptionsError(f"nothing is committed that no reader would take: {exc}") from exc
        return sealed

    @classmethod
    def decode(cls, data: bytes, *, key: str) -> Manifest:
        """Read a manifest back; `key` names it in errors.

        Raises:
            ManifestError: not a manifest of a known version, or not byte for byte what its writer sealed.
        """
        if len(data) > MANIFEST_LIMIT_BYTES:
            raise ManifestError(f"manifest {key} has {len(data)} bytes; restore an older step", key=key)
        if not _is_sealed(data):
            raise ManifestError(f"manifest {key} was changed after it was written; restore an older step", key=key)
        manifest = decode_record(data, cls, key=key, newest=SHARING_VERSION)
        for problem in manifest.problems():
            raise ManifestError(f"manifest {key} is inconsistent: {problem}; restore an older step", key=key)
        return manifest

    def problems(self) -> list[str]:
        """Return what in it contradicts itself or cannot be."""
        problems = []
        counts = (self.epoch, self.world_size, self.total_bytes, self.tensor_count, self.shard_count, self.step or 0)
        if any(not 0 <= count < NUMBER_LIMIT for count in counts):
            problems.append("a count is negative or absurd")
        if not is_attempt(self.attempt):
            problems.append(f"attempt {self.attempt[:40]!r} is no attempt id")
        if not self._has_time():
            problems.append(f"created_at {self.created_at[:40]!r} is no time with an offset")
        if (self.index is not None) != (self.state == "committed"):
            problems.append(f"its state is {self.state}, and it has {'an' if self.index else 'no'} index")
        if self.index is not None and not self.index.is_possible():
            problems.append("its index has no digest, or a size that is not read")
        return problems + self._reference_problems()

    def _reference_problems(self) -> list[str]:
        if (self.references is msgspec.UNSET) != (self.format_version < SHARING_VERSION):
            return [f"references do not go with its format version {self.format_version}"]
        held = self.held_elsewhere
        places = {(one.step, one.epoch) for one in held} | {(self.step or 0, self.epoch)}
        if not all(one.is_possible() for one in held) or len(places) <= len(held):
            return ["it refers to a checkpoint that cannot be, twice to one, or to itself"]
        shards, size_bytes = sum(one.shard_count for one in held), sum(one.total_bytes for one in held)
        if shards > self.shard_count or size_bytes > self.total_bytes:
            return [f"it refers to {shards} shards with {size_bytes} bytes, more than it has"]
        return []

    @property
    def held_elsewhere(self) -> list[Reference]:
        """Who else holds shards of it; nobody, of a checkpoint that is complete in itself."""
        return [] if self.references is msgspec.UNSET else self.references

    @property
    def sent_bytes(self) -> int:
        """Bytes of its own shards, which were sent when it was saved."""
        return self.total_bytes - sum(one.total_bytes for one in self.held_elsewhere)

    @property
    def is_sharing(self) -> bool:
        """Whether others may refer to shards of it, or it to theirs."""
        return self.format_version >= SHARING_VERSION

    def _has_time(self) -> bool:
        try:
            self.created()
        except ValueError:
            return False
        return True

    def metric_values(self) -> dict[str, float]:
        """Return the metrics as numbers."""
        return {name: float(value) for name, value in self.metrics.items()}

    def metadata_values(self) -> dict[str, object]:
        """Return the caller's metadata as Python values."""
        return {name: codec.decode(value, key=f"metadata.{name}") for name, value in self.metadata.items()}

    def created(self) -> datetime:
        """Return when the coordinator wrote it, by its own clock."""
        return moment_of(self.created_at)


class EpochClaim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who writes to a root from now on, and what that job resumed from.

    Attributes:
        format_version: of this schema.
        epoch: the claimed epoch.
        nonce: random, so that the claimer recognises its own claim after a lost reply.
        created_at: RFC 3339 in UTC, by the claimer's clock.
        host: name of the claiming machine, for people.
        pid: the claiming process, for people.
        resumed_from: (step, epoch) that the job restored before it claimed, or None.
        line: (step, epoch) for each earlier epoch of the same line of history that has prefixes below the root: its
            checkpoints up to that step belong to the line. Left out where there are none.
    """

    format_version: int
    epoch: int
    nonce: str
    created_at: str
    host: str
    pid: int
    resumed_from: tuple[int, int] | None = None
    line: list[tuple[int, int]] | msgspec.UnsetType = msgspec.UNSET

    def encode(self) -> bytes:
        """Return the object's bytes."""
        return encode_record(self)


def decode_claim(data: bytes, *, key: str) -> EpochClaim:
    """Read a claim back, or raise `ManifestError`."""
    claim = decode_record(data, EpochClaim, key=key)
    links = [*([claim.resumed_from] if claim.resumed_from else []), *(claim.line or [])]
    counts = (claim.epoch, claim.pid, *(count for link in links for count in link))
    if any(not 0 <= count < NUMBER_LIMIT for count in counts):
        raise ManifestError(f"claim {key} is inconsistent: a count is negative or absurd", key=key)
    return claim


def record_of_call(
    metrics: Mapping[str, object] | None, metadata: Mapping[str, object] | None
) -> tuple[dict[str, Metric], dict[str, JsonValue]]:
    """Return both in their JSON form, for a manifest that is written at the end of a save; to be called at its begin.

    Raises:
        OptionsError: metrics are no numbers, names no text, or both together larger than a manifest holds.
        UnsupportedValueError: metadata that the codec refuses.
    """
    told = metrics_to_json(metrics), metadata_to_json(metadata)
    size_bytes = len(encode_record(told))
    if size_bytes > MANIFEST_LIMIT_BYTES - _OWN_BYTES:
        raise OptionsError(
            f"metrics and metadata have {size_bytes} bytes, more than the {MANIFEST_LIMIT_BYTES - _OWN_BYTES} that a "
            "manifest has room for; move large metadata into the state"
        )
    return told


def _refuse_no_mapping(name: str, given: object) -> None:
    if given is not None and not isinstance(given, Mapping):
        raise OptionsError(f"{name} is {shown(given)}; give a dict of names, such as {{'loss': 0.3}}")


def metrics_to_json(metrics: Mapping[str, object] | None) -> dict[str, Metric]:
    """Check metrics and bring them into their JSON form; refuses what is no number."""
    _refuse_no_mapping("metrics", metrics)
    result: dict[str, Metric] = {}
    for name, value in (metrics or {}).items():
        if not isinstance(name, str) or not is_text(name) or not _is_seen(name):
            raise OptionsError(f"metric name {name!r} is not a string of Unicode text that can be seen; give a name")
        number = _number(name, value)
        result[name] = number if math.isfinite(number) else cast("Metric", str(number))
    return result


def _is_seen(name: str) -> bool:
    return any(one.isprintable() and not one.isspace() for one in name)


def _number(name: str, value: object) -> float:
    try:
        if not isinstance(value, str | bytes | bytearray):  # float() would read these too
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError) as exc:  # RuntimeError: a tensor without data
        raise OptionsError(f"metric {name!r} is {value!r}; give a number, e.g. float(loss)") from exc
    raise OptionsError(f"metric {name!r} is the text {value!r}; give a number")


def metadata_to_json(metadata: Mapping[str, object] | None) -> dict[str, JsonValue]:
    """Bring the caller's metadata into the codec's JSON; refuses what the codec refuses."""
    _refuse_no_mapping("metadata", metadata)
    for name in metadata or {}:
        if not isinstance(name, str) or not is_text(name):
            raise OptionsError(f"metadata key {name!r} is not a string of Unicode text")
    return {name: codec.encode(value, key=f"metadata.{name}") for name, value in (metadata or {}).items()}


def _is_sealed(data: bytes) -> bool:
    seal = _SEAL.match(data, max(0, len(data) - _SEAL_BYTES))
    return seal is not None and digest_of(data[: seal.start(1)] + data[seal.end(1) :]) == seal[1].decode()
