"""Flatten nested state into named leaves and build it again, exactly.

Pure structure: a leaf is a tensor or a value without tensors in it; nothing here looks inside either. Names are
the path joined with dots, as PyTorch's checkpoints name them; the path itself is kept beside the name, so that
integer keys, tuples, ordered and default dicts, and keys with dots come back as they were. Building trusts nothing:
paths may come from anyone.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias, cast

from cloudckpt.errors import ManifestError, OptionsError, UnsupportedValueError
from cloudckpt.format import codec
from cloudckpt.format.codec import JsonValue
from cloudckpt.format.codec.configs import config_kind
from cloudckpt.format.codec.registry import registered
from cloudckpt.format.codec.standard import FACTORIES, factory_name
from cloudckpt.format.codec.walk import is_key, is_text
from cloudckpt.format.record import lone_surrogates

__all__ = ["NOTES", "PATH_LIMIT", "Flat", "PathElement", "check_text", "flatten", "flatten_at", "unflatten"]

# One step down: a string key; a place in a list; {"key": a key that is no string}; {"tuple": a place in a tuple};
# {"OrderedDict": a key}; {"defaultdict": [name of its factory, a key]}.
PathElement = str | int | dict[str, JsonValue]

PATH_LIMIT = 65
"""Steps of one path, at most."""

NOTES = "cloudckpt.notes"
"""The value that holds the notes of all ranks."""

_SHOWN = 200
_SCALARS = frozenset((type(None), bool, int, float, str))
# Keys chosen to share one hash make a dict quadratic; honest ones share it by a few. A str's hash is salted.
_HASH_TWINS_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Flat:
    """Leaves by name, the path of each in the same order, and notes.

    Attributes:
        notes: what is kept about some names (of leaves, or of what stands above them) beside their bytes.
        of_others: names of leaves of which another rank's contents count, and not the ones here.
        of_first_rank: names of leaves that the first rank alone has, of whom all ranks take them.
        frozen: names of leaves that training does not change, as far as is known; where nobody asked, none.
        alike: of an object whose names must be the same on all ranks, these names, sorted.
    """

    leaves: dict[str, object] = field(default_factory=dict)
    paths: dict[str, list[PathElement]] = field(default_factory=dict)
    notes: dict[str, JsonValue] = field(default_factory=dict)
    of_others: set[str] = field(default_factory=set)
    of_first_rank: set[str] = field(default_factory=set)
    frozen: set[str] = field(default_factory=set)
    alike: dict[str, list[str]] = field(default_factory=dict)


def flatten(state: Mapping[str, object], *, is_tensor: Callable[[object], bool]) -> Flat:
    """Name every leaf of `state`; containers that hold no tensor stay whole, as one value, and so do registered types.

    Raises:
        OptionsError: two leaves would get one name.
        UnsupportedValueError: a container with tensors is of a type that could not be built again, holds itself or
            lies too deep, or a key of it would not come back.
    """
    flattening = _Flattening(is_tensor)
    for key, value in state.items():
        flattening.walk(value, [key], key)
    return flattening.flat


def flatten_at(value: object, name: str, path: Sequence[PathElement], *, is_tensor: Callable[[object], bool]) -> Flat:
    """Name every leaf of what stands at `path` and is called `name`; else as `flatten`."""
    flattening = _Flattening(is_tensor)
    flattening.walk(value, [*path], name)
    return flattening.flat


class _Flattening:
    """One walk over a state."""

    def __init__(self, is_tensor: Callable[[object], bool]) -> None:
        self.flat = Flat()
        self._is_tensor = is_tensor
        # By id, and kept alive for as long as their ids must stay theirs. Looked at once, however often they are held.
        self._without_tensors: dict[int, object] = {}

    def walk(self, value: object, path: list[PathElement], name: str) -> None:
        if self._is_tensor(value) or not self._holds_tensor(value, depth=0):
            self._add(value, name, path)
        elif len(path) == PATH_LIMIT:
            raise _too_deep(value)
        else:
            for element, child in _children(value, name):
                self.walk(child, [*path, element], f"{name}.{_segment(element)}")

    def _add(self, leaf: object, name: str, path: list[PathElement]) -> None:
        check_text(name)
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
        for child in contents:
            if type(child) not in _SCALARS and self._holds_tensor(child, depth + 1):
                return True
        self._without_tensors[id(value)] = value
        return False


def check_text(name: str) -> None:
    """Raise `UnsupportedValueError` for a name that is no Unicode text."""
    if not name.isascii() and not is_text(name):
        raise lone_surrogates(name)


def _too_deep(value: object) -> UnsupportedValueError:
    return UnsupportedValueError(
        f"the state is nested deeper than {PATH_LIMIT} levels or holds itself; flatten it",
        type_name=type(value).__name__,
    )


def _contents(value: object) -> Iterable[object] | None:
    if type(value) is dict:
        return value.values()
    if registered(type(value)) is not None or config_kind(type(value)) is not None:
        return None  # (the values of a configuration would be resolved)
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else None


def _children(value: object, name: str) -> list[tuple[PathElement, object]]:
    if type(value) in (dict, OrderedDict, defaultdict):
        return [(_key_step(value, key, name), child) for key, child in cast("dict[object, object]", value).items()]
    if type(value) is list:
        return list(enumerate(value))
    if type(value) is tuple:
        return [({"tuple": place}, child) for place, child in enumerate(value)]
    raise UnsupportedValueError(
        f"{name!r} is a {type(value).__name__} that holds tensors, which could not be built again on restore; "
        f"{_advice(value)}",
        key=name,
        type_name=type(value).__name__,
    )


def _advice(value: object) -> str:
    base = next((base for base in (dict, list, tuple) if isinstance(value, base)), None)
    if base is None:
        return "use a dict, list or tuple, or an object with state_dict and load_state_dict"
    return f"a subclass would come back as another type; store `{base.__name__}(value)`, or call cloudckpt.register"


def _key_step(container: object, key: object, name: str) -> PathElement:
    encoded = key if type(key) is str else _encoded_key(key, name)
    if isinstance(container, defaultdict):
        try:
            return {"defaultdict": [factory_name(container), encoded]}
        except ValueError as exc:
            raise UnsupportedValueError(f"{name!r}: {exc}", key=name, type_name="defaultdict") from exc
    if isinstance(container, OrderedDict):
        return {"OrderedDict": encoded}
    return encoded if type(encoded) is str else {"key": encoded}


def _encoded_key(key: object, name: str) -> JsonValue:
    encoded = codec.encode(key, key=name)
    # Each leaf below carries the key, so it must come back equal to itself: not so NaN, nor a tensor.
    if not is_key(key) or codec.decode(encoded, key=name) != key:
        raise UnsupportedValueError(
            f"{name!r} has the key {key!r}, which would not come back equal; use a string or a number",
            key=name,
            type_name=type(key).__name__,
        )
    return encoded


def _segment(element: PathElement) -> str:
    if not isinstance(element, dict):
        return str(element)
    ((kind, key),) = element.items()
    return str(key[1] if kind == "defaultdict" and isinstance(key, list) else key)


# What a step leads into: a type, and of a defaultdict the name of its factory.
_Kind: TypeAlias = tuple[type, str | None]


class _Node:
    """A container under construction: children by key or place."""

    def __init__(self, kind: _Kind) -> None:
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
    root = _Node((dict, None))
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


def _expect(node: _Node, kind: _Kind, name: str) -> None:
    if node.kind != kind:
        raise _contradiction(name, f"lies in a {_shown(node.kind)} and in a {_shown(kind)}")


def _shown(kind: _Kind) -> str:
    return kind[0].__name__ + (f" of {kind[1]}" if kind[1] else "")


def _step(element: PathElement, name: str) -> tuple[_Kind, object]:
    """Return the container that a step leads into, and the key or place there."""
    if isinstance(element, str):
        return (dict, None), element
    if type(element) is int:
        return (list, None), element
    if isinstance(element, dict) and len(element) == 1:
        ((kind, content),) = element.items()
        if kind == "tuple" and type(content) is int:
            return (tuple, None), content
        if kind in _DICTS:
            return _dict_step(_DICTS[kind], content, name)
    raise _unknown(element, name)


_DICTS: Mapping[str, type] = {"key": dict, "OrderedDict": OrderedDict, "defaultdict": defaultdict}


def _dict_step(kind: type, content: JsonValue, name: str) -> tuple[_Kind, object]:
    factory = None
    if kind is defaultdict:
        if not isinstance(content, list) or len(content) != 2:
            raise _unknown(content, name)
        named, content = content
        if named is not None and (not isinstance(named, str) or named not in FACTORIES):
            raise _unknown(named, name)
        factory = named
    key = content if type(content) is str else codec.decode(content, key=name)
    if not is_key(key):
        raise _unknown(content, name)
    return (kind, factory), key


def _unknown(element: object, name: str) -> ManifestError:
    return _contradiction(name, f"has a step {repr(element)[:_SHOWN]} in its path that this format does not know")


def _contradiction(name: str, reason: str) -> ManifestError:
    return ManifestError(f"{name[:_SHOWN]!r} {reason}: the index is damaged or foreign; restore an older step")


def _build(child: object) -> object:
    if not isinstance(child, _Node):
        return child
    kind, factory = child.kind
    if kind in (list, tuple):
        places = range(len(child.children))
        if any(place not in child.children for place in places):
            raise ManifestError(
                f"a {kind.__name__} of the state has holes: the index is damaged; restore an older step"
            )
        made: object = kind(_build(child.children[place]) for place in places)
        return made
    items = {key: _build(value) for key, value in child.children.items()}
    if kind is defaultdict:
        return defaultdict(None if factory is None else FACTORIES[factory], items)
    return items if kind is dict else OrderedDict(items)
