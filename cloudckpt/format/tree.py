"""Flatten nested state into named leaves and build it again, exactly.

Pure structure: a leaf is a tensor or a value without tensors in it; nothing here looks inside either. Names are
the path joined with dots, as PyTorch's checkpoints name them; the path itself is kept beside the name, so that
integer keys, tuples and keys with dots come back as they were. Building trusts nothing: paths may come from anyone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cloudckpt.errors import ManifestError, OptionsError, UnsupportedValueError
from cloudckpt.format import codec
from cloudckpt.format.codec import JsonValue
from cloudckpt.format.codec.walk import is_key, is_text
from cloudckpt.format.record import lone_surrogates

__all__ = ["NOTES", "PATH_LIMIT", "Flat", "PathElement", "flatten", "unflatten"]

# One step down: a string key; a place in a list; {"key": a key that is no string}; {"tuple": a place in a tuple}.
PathElement = str | int | dict[str, JsonValue]

PATH_LIMIT = 65
"""Steps of one path, at most."""

NOTES = "cloudckpt.notes"
"""The value that holds the notes of all ranks."""

_SHOWN = 200
# Keys chosen to share one hash make a dict quadratic; honest ones share it by a few. A str's hash is salted.
_HASH_TWINS_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Flat:
    """Leaves by name, the path of each in the same order, and notes.

    Attributes:
        notes: what is kept about some names (of leaves, or of what stands above them) beside their bytes.
        of_others: names of leaves of which another rank's contents count, and not the ones here.
    """

    leaves: dict[str, object] = field(default_factory=dict)
    paths: dict[str, list[PathElement]] = field(default_factory=dict)
    notes: dict[str, JsonValue] = field(default_factory=dict)
    of_others: set[str] = field(default_factory=set)


def flatten(state: Mapping[str, object], *, is_tensor: Callable[[object], bool]) -> Flat:
    """Name every leaf of `state`; containers that hold no tensor stay whole, as one value.

    Around tensors a dict of any kind counts as a dict, and comes back as one.

    Raises:
        OptionsError: two leaves would get one name.
        UnsupportedValueError: a container with tensors is of a type that could not be built again, holds itself or
            lies too deep, or a key of it would not come back.
    """
    flattening = _Flattening(is_tensor)
    for key, value in state.items():
        flattening.walk(value, [key])
    return flattening.flat


class _Flattening:
    """One walk over a state."""

    def __init__(self, is_tensor: Callable[[object], bool]) -> None:
        self.flat = Flat()
        self._is_tensor = is_tensor
        # By id, and kept alive for as long as their ids must stay theirs. Looked at once, however often they are held.
        self._without_tensors: dict[int, object] = {}

    def walk(self, value: object, path: list[PathElement]) -> None:
        name = ".".join(map(_segment, path))
        if self._is_tensor(value) or not self._holds_tensor(value, depth=0):
            self._add(value, name, path)
        elif len(path) == PATH_LIMIT:
            raise _too_deep(value)
        else:
            for element, child in _children(value, name):
                self.walk(child, [*path, element])

    def _add(self, leaf: object, name: str, path: list[PathElement]) -> None:
        if not is_text(name):
            raise lone_surrogates(name)
        if name in self.flat.leaves:
            raise OptionsError(f"two entries of the state are both named {name!r}; rename one of the keys")
        self.flat.leaves[name] = leaf
        self.flat.paths[name] = path

    def _holds_tensor(self, value: object, depth: int) -> bool:
        if self._is_tensor(value):
            return True
        contents = _contents(value)
        if contents is None or id(value) in self._without_tensors:
            return False
        if depth == PATH_LIMIT:
            raise _too_deep(value)
        found = any(self._holds_tensor(child, depth + 1) for child in contents)
        if not found:
            self._without_tensors[id(value)] = value
        return found


def _too_deep(value: object) -> UnsupportedValueError:
    return UnsupportedValueError(
        f"the state is nested deeper than {PATH_LIMIT} levels or holds itself; flatten it",
        type_name=type(value).__name__,
    )


def _contents(value: object) -> Iterable[object] | None:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else None


def _children(value: object, name: str) -> list[tuple[PathElement, object]]:
    if isinstance(value, dict):
        return [(_key_step(key, name), child) for key, child in value.items()]
    if type(value) is list:
        return list(enumerate(value))
    if type(value) is tuple:
        return [({"tuple": place}, child) for place, child in enumerate(value)]
    raise UnsupportedValueError(
        f"{name!r} is a {type(value).__name__} that holds tensors, which could not be built again on restore; "
        "use a dict, list or tuple, or an object with state_dict and load_state_dict",
        key=name,
        type_name=type(value).__name__,
    )


def _key_step(key: object, name: str) -> PathElement:
    if type(key) is str:
        return key
    encoded = codec.encode(key, key=name)
    # Each leaf below carries the key, so it must come back equal to itself: not so NaN, nor a tensor.
    if not is_key(key) or codec.decode(encoded, key=name) != key:
        raise UnsupportedValueError(
            f"{name!r} has the key {key!r}, which would not come back equal; use a string or a number",
            key=name,
            type_name=type(key).__name__,
        )
    return {"key": encoded}


def _segment(element: PathElement) -> str:
    if not isinstance(element, dict):
        return str(element)
    return str(element["key"] if "key" in element else element["tuple"])


class _Node:
    """A container under construction: children by key or place."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.children: dict[object, object] = {}
        self._twins: Counter[int] = Counter()

    def add(self, key: object, child: object, name: str) -> None:
        self.children[key] = child
        if not isinstance(key, str):
            self._twins[hash(key)] += 1
            if self._twins[hash(key)] > _HASH_TWINS_LIMIT:
                raise _contradiction(name, f"stands beside over {_HASH_TWINS_LIMIT} keys of one hash")


def unflatten(leaves: Mapping[str, object], paths: Mapping[str, Sequence[PathElement]]) -> dict[str, object]:
    """Build the nested state of `leaves`, in the order of `paths`; a name without a path is a top-level key.

    Raises:
        ManifestError: the paths contradict each other.
    """
    root = _Node(dict)
    ordered = [name for name in paths if name in leaves] + [name for name in leaves if name not in paths]
    for name in ordered:
        path: Sequence[PathElement] = paths.get(name, (name,))
        if not 0 < len(path) <= PATH_LIMIT or not isinstance(path[0], str):
            raise _contradiction(name, f"has a path of {len(path)} steps that starts with no name")
        _insert(root, path, leaves[name], name)
    return {str(key): _build(child) for key, child in root.children.items()}


def _insert(root: _Node, path: Sequence[PathElement], leaf: object, name: str) -> None:
    steps = [_step(element, name) for element in path]
    node = root
    for (kind, key), (next_kind, _) in pairwise(steps):
        _expect(node, kind, name)
        if key not in node.children:
            node.add(key, _Node(next_kind), name)
        child = node.children[key]
        if not isinstance(child, _Node):
            raise _contradiction(name, "lies below another value")
        node = child
    kind, key = steps[-1]
    _expect(node, kind, name)
    if key in node.children:
        raise _contradiction(name, "stands twice")
    node.add(key, leaf, name)


def _expect(node: _Node, kind: type, name: str) -> None:
    if node.kind is not kind:
        raise _contradiction(name, f"lies in a {node.kind.__name__} and in a {kind.__name__}")


def _step(element: PathElement, name: str) -> tuple[type, object]:
    """Return the container that a step leads into, and the key or place there."""
    if isinstance(element, str):
        return dict, element
    if type(element) is int:
        return list, element
    if isinstance(element, dict) and element.keys() == {"key"}:
        key = codec.decode(element["key"], key=name)
        if is_key(key):
            return dict, key
    if isinstance(element, dict) and element.keys() == {"tuple"} and type(element["tuple"]) is int:
        return tuple, element["tuple"]
    raise _contradiction(name, f"has a step {repr(element)[:_SHOWN]} in its path that this format does not know")


def _contradiction(name: str, reason: str) -> ManifestError:
    return ManifestError(f"{name[:_SHOWN]!r} {reason}: the index is damaged or foreign; restore an older step")


def _build(child: object) -> object:
    if not isinstance(child, _Node):
        return child
    if child.kind is dict:
        return {key: _build(value) for key, value in child.children.items()}
    places = range(len(child.children))
    if any(place not in child.children for place in places):
        raise ManifestError(f"a {child.kind.__name__} of the state has holes; restore an older step")
    return child.kind(_build(child.children[place]) for place in places)
