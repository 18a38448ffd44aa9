"""Remember which types of a program the codec may keep, by names that the program chose.

A name in a store is looked up here and nowhere else, so that data never decide what is imported or called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, Flag
from functools import partial
from typing import Any, TypeVar

from cloudckpt.errors import OptionsError

__all__ = ["KEPT", "Registered", "register", "register_code", "registered", "registered_as", "registered_code"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Registered:
    """A type, its name in stores, and the way to plain values and back; or the one value that has the name."""

    kind: type
    name: str
    encode: Callable[[Any], object]
    decode: Callable[[Any], object]
    code: object = None

    @property
    def place(self) -> tuple[str, str]:
        """Where it is defined."""
        return _place_of(self.kind if self.code is None else self.code)


KEPT: set[type] = set()
"""Types that the codec keeps by itself; `encoding` says which."""

_BY_KIND: dict[type, Registered] = {}
_BY_NAME: dict[str, Registered] = {}
_BY_ID: dict[int, Registered] = {}


def registered(kind: type) -> Registered | None:
    """Return what was registered for exactly this type."""
    return _BY_KIND.get(kind)


def registered_code(value: object) -> Registered | None:
    """Return what was registered for exactly this function or class."""
    known = _BY_ID.get(id(value))
    return known if known is not None and known.code is value else None


def registered_as(name: str) -> Registered | None:
    """Return what was registered under a name."""
    return _BY_NAME.get(name)


def register(
    kind: type[_T],
    *,
    name: str,
    encode: Callable[[_T], object] | None = None,
    decode: Callable[[Any], _T] | None = None,
) -> None:
    """Let values of a type of your own be saved, and come back as that type. Call it in every program that loads them.

    ```python
    from enum import Enum

    class Mode(Enum):
        WARM = 1

    class Vocabulary:
        def __init__(self, words):
            self.words = words

    cloudckpt.register(Mode, name="Mode")  # an Enum, a dataclass or a NamedTuple needs no more
    cloudckpt.register(Vocabulary, name="Vocabulary", encode=lambda value: value.words, decode=Vocabulary)
    ```

    Args:
        kind: the type; values of exactly this type are meant, not of its subclasses.
        name: what stands in the store, for as long as checkpoints are to be read. The module and the name of the class
            do not, so both may change.
        encode: value → what the codec keeps: plain values, arrays, tensors, other registered types.
        decode: what `encode` returned → an equal value of the type.

    Raises:
        OptionsError: the type is none that needs it, the name is another type's, or one of the two functions is missing
            where neither can be guessed.
    """
    if not isinstance(kind, type) or not _is_name(name):
        raise OptionsError(f"register takes a type and a printable name, not {kind!r} and {name!r}")
    if kind in KEPT:
        raise OptionsError(f"a {kind.__qualname__} is kept as it is, and needs no registration")
    guessed = _guessed(kind) if encode is None and decode is None else (encode, decode)
    if guessed is None or None in guessed:
        raise OptionsError(
            f"{kind.__qualname__} is no Enum, NamedTuple or plain dataclass; pass both encode= and decode="
        )
    _free(Registered(kind, name, *guessed), _BY_KIND.get(kind))
    _BY_KIND[kind] = _BY_NAME[name] = Registered(kind, name, *guessed)


def register_code(code: Callable[..., object], *, name: str) -> None:
    """Let one function or class be among the values of a state, and come back as itself. Call it in every program.

    ```python
    from functools import partial
    from torch.nn.functional import gelu

    cloudckpt.register_code(gelu, name="gelu")
    state = {"hparams": {"act": gelu, "approximate": partial(gelu, approximate="tanh")}}
    ```

    Its name is saved, and nothing of what it does: a program that gives the name to other code goes on with that.

    Args:
        code: a function, a built-in one, or a class (itself; for its instances there is `register`).
        name: what stands in the store, for as long as checkpoints are to be read.

    Raises:
        OptionsError: it is no function or class, it has another name already, or the name is another one's.
    """
    if not callable(code) or not hasattr(code, "__qualname__") or not _is_name(name):
        raise OptionsError(f"register_code takes a function or a class and a printable name, not {code!r} and {name!r}")
    known = Registered(type(code), name, lambda _: None, lambda _: code, code)
    _free(known, registered_code(code))
    _BY_ID[id(code)] = _BY_NAME[name] = known


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and bool(name)


def _free(known: Registered, previous: Registered | None) -> None:
    """See to it that a name is free, and that what gets it has no other one."""
    other = _BY_NAME.get(known.name)
    what = known.place[1]
    # A module that is loaded again, in a notebook, makes the class anew.
    if other is not None and other.place != known.place:
        raise OptionsError(f"{known.name!r} is the registered name of {other.place[1]}; choose another one")
    if previous is not None and previous.name != known.name:
        raise OptionsError(f"{what} is registered as {previous.name!r}; one type or function has one name")
    if other is not None and (other.code is None) != (known.code is None):
        raise OptionsError(f"{known.name!r} is the registered name of values of {what}; choose another one")
    if other is not None and other.code is None:
        del _BY_KIND[other.kind]
    elif other is not None:
        del _BY_ID[id(other.code)]


def _place_of(code: object) -> tuple[str, str]:
    return str(getattr(code, "__module__", None)), str(getattr(code, "__qualname__", code))


def _guessed(kind: type) -> tuple[Callable[[Any], object], Callable[[Any], object]] | None:
    """Return how values of a type become plain ones and back, if the type says so itself."""
    if issubclass(kind, Flag):
        return (lambda member: member.value), kind
    if issubclass(kind, Enum):
        return (lambda member: member.name), (lambda name: kind[name])
    if issubclass(kind, tuple) and hasattr(kind, "_asdict"):
        return partial(_items_of, kind), partial(_tuple_of, kind)
    if dataclasses.is_dataclass(kind) and not issubclass(kind, dict | list | tuple | set | str | int | float):
        return partial(_fields_of, kind), partial(_made_of, kind)
    return None


def _items_of(kind: Any, value: Any) -> dict[str, object]:  # noqa: ANN401  a NamedTuple
    if extra := list(getattr(value, "__dict__", ())):
        raise ValueError(f"it has attributes that are no fields: {', '.join(extra)}")
    return dict(zip(kind._fields, value, strict=True))


def _tuple_of(kind: Any, fields: Mapping[str, object]) -> Any:  # noqa: ANN401
    # Not by its constructor, which may make something else of them.
    return tuple.__new__(kind, [fields[name] for name in kind._fields])


def _made_of(kind: Any, fields: Mapping[str, object]) -> Any:  # noqa: ANN401
    """Return a dataclass with these fields; what its constructor makes of what it is given was made once."""
    made = object.__new__(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    if names != set(fields):
        raise ValueError(f"it has the fields {', '.join(sorted(fields))}, and here {', '.join(sorted(names))}")
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _fields_of(kind: Any, value: object) -> dict[str, object]:  # noqa: ANN401  a dataclass
    names = [field.name for field in dataclasses.fields(kind)]
    # What a class has under the same name (a cached property) is made again.
    extra = [name for name in getattr(value, "__dict__", {}) if name not in names and not hasattr(kind, name)]
    if extra:
        raise ValueError(f"it has attributes that are no fields: {', '.join(extra)}")
    return {name: getattr(value, name) for name in names}
