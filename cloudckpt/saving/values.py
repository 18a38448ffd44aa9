"""Find out whether the plain values of all ranks are the same, and say where they differ.

    values ──a digest each──▶ rank 0: which differ, on which ranks? ──▶ these values ──▶ the way into each, both ends

A checkpoint holds one rank's. In which order a dict was filled is no difference, except where Python counts it as one
(`OrderedDict`): ranks that walk a set, or a directory, fill their dicts in orders of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import msgspec
import xxhash

from cloudckpt.errors import CloudCkptError, SaveFailedError
from cloudckpt.format import JsonValue, codec
from cloudckpt.ranks import named_ranks

__all__ = ["Difference", "differences_of", "digest_of_values", "digests_of", "refuse_values", "wanted_values"]

_SHOWN = 8
_SHOWN_TEXT = 60
# Tags of dicts whose entries stand in a list; those but the last compare equal in any order.
_DICTS = ("$dict", "$Counter", "$OrderedDict")
_UNORDERED = _DICTS[:-1]
_UNORDERED_TEXTS = tuple(f'"{tag}"'.encode() for tag in _UNORDERED)
_TENSOR = b"tensor"


class Difference(NamedTuple):
    """A value that ranks do not have alike.

    Attributes:
        name: of the value.
        missing: ranks that lack it.
        tensors: ranks that have a tensor of that name.
        variants: ranks that have the same one together.
    """

    name: str
    missing: list[int]
    tensors: list[int]
    variants: list[list[int]]


def digests_of(values: Mapping[str, JsonValue], tensors: Iterable[str] = ()) -> dict[str, bytes]:
    """Return a digest of each value, whatever the order of a dict's keys; and, for names of tensors, that they are."""
    return {name: _digest_of(value) for name, value in values.items()} | dict.fromkeys(tensors, _TENSOR)


def digest_of_values(values: Mapping[str, JsonValue]) -> bytes:
    """Return a digest of all values, in any order."""
    text = msgspec.json.encode(values, order="sorted")
    if _may_be_unordered(text):
        text = msgspec.msgpack.encode(sorted(digests_of(values).items()))
    return xxhash.xxh3_128_digest(text)


def _digest_of(value: JsonValue) -> bytes:
    text = msgspec.json.encode(value, order="sorted")
    if _may_be_unordered(text):
        text = msgspec.json.encode(_sorted(value), order="sorted")
    return xxhash.xxh3_128_digest(text)


def _may_be_unordered(text: bytes) -> bool:
    return any(tag in text for tag in _UNORDERED_TEXTS)


def _sorted(value: JsonValue) -> JsonValue:
    """Bring the entries of every dict that is written as a list into one order."""
    if isinstance(value, list):
        return [_sorted(child) for child in value]
    if not isinstance(value, dict):
        return value
    inner = {key: _sorted(child) for key, child in value.items()}
    tag, content = next(iter(inner.items()), ("", None))
    if tag in _UNORDERED and isinstance(content, list):
        return {tag: sorted(content, key=lambda entry: msgspec.json.encode(entry, order="sorted"))}
    return inner


def differences_of(found: Sequence[Mapping[str, bytes]]) -> list[Difference]:
    """Return which values differ, by the digests of all ranks."""
    differences = []
    for name in sorted({name for digests in found for name in digests}):
        ranks_of: dict[bytes | None, list[int]] = {}
        for rank, digests in enumerate(found):
            ranks_of.setdefault(digests.get(name), []).append(rank)
        missing, tensors = ranks_of.pop(None, []), ranks_of.pop(_TENSOR, [])
        if ranks_of and (missing or tensors or len(ranks_of) > 1):
            differences.append(Difference(name, missing, tensors, list(ranks_of.values())))
    return differences


def wanted_values(
    values: Mapping[str, JsonValue], differences: Sequence[Difference], rank: int
) -> dict[str, JsonValue]:
    """Return the values that rank 0 needs of this rank to say what differs."""
    return {of.name: values[of.name] for of in differences[:_SHOWN] if any(rank == some[0] for some in of.variants[:2])}


def refuse_values(differences: Sequence[Difference], found: Sequence[Mapping[str, JsonValue]]) -> None:
    """Say which ranks have which values that others have not; a checkpoint would hold one of them only.

    Args:
        differences: what differs.
        found: the `wanted_values` of every rank.
    """
    parts = []
    for name, missing, tensors, variants in differences[:_SHOWN]:
        if missing:
            parts.append(f"{name!r} is missing on {named_ranks(missing)}")
        if tensors:
            holders = sorted(chain.from_iterable(variants))
            parts.append(f"{name!r} is a value on {named_ranks(holders)} and a tensor on {named_ranks(tensors)}")
        if len(variants) > 1:
            one, other = (found[some[0]][name] for some in variants[:2])
            where = f"{name!r} differs between {' and '.join(map(named_ranks, variants))}"
            parts.append(f"{where}: {describe_difference(one, other)}")
    left = len(differences) - _SHOWN
    shown = "; ".join([*parts, *([f"and {left} more"] if left > 0 else [])])
    raise SaveFailedError(
        f"the ranks hold different states, and nothing was written: {shown}. Give every rank the same values; hold an "
        "object whose state is each rank's own in cloudckpt.PerRank, a value of which the first rank's counts for all "
        "in cloudckpt.RankZero, or keep what belongs to one rank out of the state"
    )


# -- where two values differ --------------------------------------------------------------------------------


def describe_difference(one: JsonValue, other: JsonValue) -> str:
    """Return the way to the first place where two values in the codec's JSON differ, and what each has there."""
    way = ""
    while (step := _first_difference(one, other)) is not None:
        key, one, other = step
        way += key
        if one is _NOTHING or other is _NOTHING:
            break
    what = f"{_shown(one)} and {_shown(other)}"
    return f"{what} at {way}" if way else what


_NOTHING: JsonValue = {"$nothing": None}


def _first_difference(one: JsonValue, other: JsonValue) -> tuple[str, JsonValue, JsonValue] | None:
    """Return one step into two containers of a kind, to where they differ; None if they have no such place."""
    (kind, mine), (other_kind, theirs) = _children(one), _children(other)
    if kind != other_kind or mine is None or theirs is None:
        return None
    for key in [*mine, *(key for key in theirs if key not in mine)]:
        left, right = mine.get(key, _NOTHING), theirs.get(key, _NOTHING)
        if left is _NOTHING or right is _NOTHING or _digest_of(left) != _digest_of(right):
            return key, left, right
    return None


def _children(value: JsonValue) -> tuple[str, dict[str, JsonValue] | None]:
    """Return what kind of container a value is, and its contents by how Python would name them; None if it is none."""
    if isinstance(value, list):
        return "list", {f"[{place}]": child for place, child in enumerate(value)}
    if not isinstance(value, dict):
        return type(value).__name__, None
    tag, content = next(iter(value.items()), ("", None))
    if not tag.startswith("$") or tag.startswith("$$") or len(value) > 1:
        return "dict", {f"[{key.removeprefix('$')!r}]": child for key, child in value.items()}
    if tag in _DICTS and isinstance(content, list):
        pairs = [entry for entry in content if isinstance(entry, list)]
        return tag, {f"[{_shown(key)}]": child for key, child in pairs}
    if tag == "$tuple" and isinstance(content, list):
        return tag, {f"[{place}]": child for place, child in enumerate(content)}
    return tag, None


def _shown(value: JsonValue) -> str:
    if value is _NOTHING:
        return "nothing"
    try:
        text = repr(codec.decode(value, key="value"))
    except CloudCkptError:  # a part of what a tag stands for is no value by itself
        text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN_TEXT else f"{text[: _SHOWN_TEXT - 1]}…"
