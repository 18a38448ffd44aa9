"""Say how configurations of OmegaConf become plain values, and come back with their interpolations unresolved.

Nobody need have OmegaConf: a value of its types shows that it is imported, and what is read says when it is missing.
Kept are configurations that `OmegaConf.create` makes of plain containers, with the flags of each node. Interpolations
(`${…}`) stay text: nothing is resolved here, since that would run a program's resolvers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

from cloudckpt.format.codec.standard import Kind, NotHereError, fields_of

__all__ = ["CONFIG_KINDS", "config_kind"]

_INHERITED = ("readonly", "struct")
_ADVICE = "store `OmegaConf.to_container(value)`, or call `cloudckpt.register`"


def config_kind(kind: type) -> Kind | None:
    """Return how values of a type of OmegaConf's are kept; None of any other."""
    if kind.__name__ not in CONFIG_KINDS or kind.__module__.partition(".")[0] != "omegaconf":
        return None
    return CONFIG_KINDS[kind.__name__] if getattr(sys.modules.get("omegaconf"), kind.__name__, None) is kind else None


def _plain(value: Any) -> object:  # noqa: ANN401  a container of OmegaConf's
    omegaconf: Any = sys.modules["omegaconf"]
    if type(value._content) not in (dict, list):  # noqa: SLF001 (no other way to ask without resolving)
        raise ValueError(f"it is None, missing or one interpolation; {_ADVICE}")
    content = omegaconf.OmegaConf.to_container(value, resolve=False)
    flags: list[list[object]] = []
    for way, own in _flags(value, ()):
        # What is inherited from the configuration that it is a part of is its own, once it stands alone.
        held = own if way else {name: held for name in _INHERITED if (held := value._get_flag(name)) is not None} | own  # noqa: SLF001
        flags += [[list(way), held]] if held else []
    made = _config(type(value).__name__, {"content": content, "flags": flags})
    if _seen(made) != _seen(value):
        raise ValueError(f"it has types or nodes of its own (a structured configuration), which are code; {_ADVICE}")
    if value._get_parent() is not None and _has_interpolation(value):  # noqa: SLF001
        raise ValueError(f"its interpolations may be about the configuration that it is a part of; {_ADVICE}")
    return {"content": content, "flags": flags}


def _config(name: str, plain: object) -> object:
    content, flags = fields_of(plain, content=dict if name == "DictConfig" else list, flags=list)
    try:
        omegaconf: Any = import_module("omegaconf")
    except ImportError as exc:
        raise NotHereError(f"needs OmegaConf for a {name}, which is not here; install the package omegaconf") from exc
    try:
        made: Any = omegaconf.OmegaConf.create(content, flags={"allow_objects": True})
        made._set_flag("allow_objects", None)  # noqa: SLF001 (as it is given)
        for way, own in flags:
            node = made
            for key in way:
                node = node._get_node(key)  # noqa: SLF001 (`__getitem__` resolves)
            for flag, held in own.items():
                if type(flag) is not str or type(held) is not bool:
                    raise TypeError("has a flag that is none")
                node._set_flag(flag, held)  # noqa: SLF001
    except omegaconf.errors.OmegaConfBaseException as exc:
        raise ValueError("is no configuration") from exc
    if type(made).__name__ != name:
        raise TypeError("is another container")
    return made


def _flags(node: Any, way: tuple[object, ...]) -> list[tuple[tuple[object, ...], dict[str, bool]]]:  # noqa: ANN401
    """Return the flags of a node and of all in it, by the keys that lead there."""
    own = {name: held for name, held in (node._metadata.flags or {}).items() if held is not None}  # noqa: SLF001
    return [(way, own), *(found for key, child in _children(node) for found in _flags(child, (*way, key)))]


def _children(node: Any) -> list[tuple[object, Any]]:  # noqa: ANN401
    content = getattr(node, "_content", None)
    if isinstance(content, dict):
        return list(content.items())
    return list(enumerate(content)) if isinstance(content, list) else []


def _seen(node: Any, *, is_top: bool = True) -> tuple[object, ...]:  # noqa: ANN401
    """Return all that tells a node from another one: types, options, contents."""
    about = node._metadata  # noqa: SLF001
    flags = {} if is_top else {name: held for name, held in (about.flags or {}).items() if held is not None}
    types = [getattr(about, name, None) for name in ("object_type", "key_type", "element_type")]
    inner = [(key, _seen(child, is_top=False)) for key, child in _children(node)]
    kind = type(getattr(node, "_content", None))
    value = None if kind in (dict, list) else node._value()  # noqa: SLF001
    reference = None if is_top else (about.ref_type, about.optional)
    return type(node), reference, tuple(types), flags, kind, type(value), value, inner


def _has_interpolation(node: Any) -> bool:  # noqa: ANN401
    children = _children(node)
    return any(_has_interpolation(child) for _, child in children) if children else bool(node._is_interpolation())  # noqa: SLF001


CONFIG_KINDS: Mapping[str, Kind] = {
    name: Kind(f"$omegaconf.{name}", _plain, partial(_config, name), is_small=False)
    for name in ("DictConfig", "ListConfig")
}
"""Name of a type → how it is kept."""
