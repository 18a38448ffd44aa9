"""The format as pure values: names, shards, index, manifest, and plain values as JSON. FORMAT.md is its text.

No input or output, no threads, no clock: bytes in, values out, or an error that says what is wrong with them.
"""

from cloudckpt.format import codec
from cloudckpt.format.boxes import Box, BoxTable, Column, ragged_places, row_products
from cloudckpt.format.builder import IndexBuilder
from cloudckpt.format.codec import DTYPE_NAMES, DTYPES, JsonValue, register, register_code
from cloudckpt.format.content import content_kind, content_of, hasher_of
from cloudckpt.format.header import Holder
from cloudckpt.format.index import BoxPlace, Index, ShardEntry
from cloudckpt.format.layout import Piece, ShardLayout, Span, lay_out, plan_spans, split_box
from cloudckpt.format.manifest import (
    MANIFEST_LIMIT_BYTES,
    EpochClaim,
    IndexRef,
    Manifest,
    Metric,
    decode_claim,
    digest_of,
    record_of_call,
)
from cloudckpt.format.near import told_near
from cloudckpt.format.pin import PIN_LIMIT_BYTES, PinRecord
from cloudckpt.format.record import FORMAT_VERSION, SHARING_VERSION, lone_surrogates, moment_of
from cloudckpt.format.section import ChunkEntry, Origins, Section, TensorEntry, Tensors
from cloudckpt.format.shard import SAFETENSORS_NAMES, block_digests, has_blocks, verify_blocks
from cloudckpt.format.sums import SUMS_LIMIT_BYTES, SUMS_SUFFIX, FileSums, SumsRecord
from cloudckpt.format.tiling import untiled
from cloudckpt.format.tree import NOTES, Flat, PathElement, flatten, flatten_at, unflatten
from cloudckpt.keys import (
    EPOCH_LIMIT,
    EPOCHS_PREFIX,
    MANIFEST_NAME,
    PINS_PREFIX,
    SHARD_SUFFIX,
    STEPS_BEGIN,
    EpochMark,
    check_name,
    checkpoint_prefix,
    epoch_key,
    index_key,
    is_attempt,
    mark_key,
    marked_epoch,
    name_key,
    new_attempt,
    parse_checkpoint_prefix,
    parse_epoch_key,
    parse_name_key,
    parse_pin_key,
    pin_key,
    shard_key,
    shown,
    step_number,
)

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "EPOCHS_PREFIX",
    "EPOCH_LIMIT",
    "FORMAT_VERSION",
    "MANIFEST_LIMIT_BYTES",
    "MANIFEST_NAME",
    "NOTES",
    "PINS_PREFIX",
    "PIN_LIMIT_BYTES",
    "SAFETENSORS_NAMES",
    "SHARD_SUFFIX",
    "SHARING_VERSION",
    "STEPS_BEGIN",
    "SUMS_LIMIT_BYTES",
    "SUMS_SUFFIX",
    "Box",
    "BoxPlace",
    "BoxTable",
    "ChunkEntry",
    "Column",
    "EpochClaim",
    "EpochMark",
    "FileSums",
    "Flat",
    "Holder",
    "Index",
    "IndexBuilder",
    "IndexRef",
    "JsonValue",
    "Manifest",
    "Metric",
    "Origins",
    "PathElement",
    "Piece",
    "PinRecord",
    "Section",
    "ShardEntry",
    "ShardLayout",
    "Span",
    "SumsRecord",
    "TensorEntry",
    "Tensors",
    "block_digests",
    "check_name",
    "checkpoint_prefix",
    "codec",
    "content_kind",
    "content_of",
    "decode_claim",
    "digest_of",
    "epoch_key",
    "flatten",
    "flatten_at",
    "has_blocks",
    "hasher_of",
    "index_key",
    "is_attempt",
    "lay_out",
    "lone_surrogates",
    "mark_key",
    "marked_epoch",
    "moment_of",
    "name_key",
    "new_attempt",
    "parse_checkpoint_prefix",
    "parse_epoch_key",
    "parse_name_key",
    "parse_pin_key",
    "pin_key",
    "plan_spans",
    "ragged_places",
    "record_of_call",
    "register",
    "register_code",
    "row_products",
    "shard_key",
    "shown",
    "split_box",
    "step_number",
    "told_near",
    "unflatten",
    "untiled",
    "verify_blocks",
]
