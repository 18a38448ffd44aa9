"""Say how types of the standard library, numpy and torch become plain values, and come back.

A kind's `encode` gives a value that the codec knows, or raises `ValueError` with advice. Its `decode` gets foreign
data, already decoded: it checks types and ranges, and raises `ValueError`, `TypeError`, or what else the constructors
raise for nonsense. Small kinds are encoded again afterwards and compared, so that nothing has a second spelling.
Generators of random numbers are in `generators`.
"""

from __future__ import annotations

import io
import os
import re
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from types import NoneType, SimpleNamespace
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cloudckpt.format.codec.walk import MAX_INT_DIGITS

__all__ = ["FACTORIES", "Kind", "NotHereError", "factory_name", "fields_of", "standard_kinds"]

_ZONE_KEY = re.compile(r"[A-Za-z0-9_+\-]{1,64}(?:/[A-Za-z0-9_+\-]{1,64}){0,3}")


class NotHereError(Exception):
    """A value is right and this machine lacks what it names; says what to do."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A type that is kept as plain values under a tag of its own.

    Attributes:
        tag: what stands in the store.
        encode, decode: to plain values and back.
        is_small: whether it is encoded again when it was decoded, to be compared.
    """

    tag: str
    encode: Callable[[Any], object]
    decode: Callable[[Any], object]
    is_small: bool = True


FACTORIES: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, OrderedDict, Counter, deque)
}
"""What a `defaultdict` may make by itself and still be kept."""


def factory_name(value: defaultdict[Any, Any]) -> str | None:
    """Return the name of a dict's default factory; raises `ValueError` if it is none of `FACTORIES`."""
    factory = value.default_factory
    if factory is None:
        return None
    found = next((name for name, known in FACTORIES.items() if known is factory), None)
    if found is None:
        raise ValueError(
            f"its default factory is code, and none of {', '.join(FACTORIES)}; store `dict(value)`, and make it a "
            "defaultdict again on restore"
        )
    return found


def fields_of(plain: object, **kinds: type | tuple[type, ...]) -> list[Any]:
    """Return the fields of a record, in this order, if it has exactly them, of exactly these types."""
    if type(plain) is not dict or plain.keys() != kinds.keys():
        raise ValueError("has other fields")
    for name, kind in kinds.items():
        if type(plain[name]) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise TypeError("has a field of another type")
    return [plain[name] for name in kinds]


def _text(plain: object) -> str:
    if type(plain) is not str:
        raise TypeError("is no text")
    return plain


def _numbers(plain: object, count: int) -> list[int]:
    if type(plain) is not list or len(plain) != count or not all(type(part) is int for part in plain):
        raise ValueError("has other parts")
    return plain


# -- times ----------------------------------------------------------------------------------------------------------

_ZONES = (NoneType, timezone, ZoneInfo)


def _plain_clock(value: datetime | time) -> object:
    if type(value.tzinfo) not in _ZONES:
        kind = type(value.tzinfo)
        raise ValueError(
            f"its time zone is a {kind.__module__}.{kind.__qualname__}, and only datetime.timezone and "
            "zoneinfo.ZoneInfo can be kept; use `value.astimezone(datetime.timezone.utc)`"
        )
    return {"text": value.replace(tzinfo=None).isoformat(), "fold": value.fold, "zone": value.tzinfo}


def _clock(kind: type[datetime | time]) -> Callable[[object], object]:
    def decode(plain: object) -> object:
        text, fold, zone = fields_of(plain, text=str, fold=int, zone=_ZONES)
        read = kind.fromisoformat(text)
        if read.tzinfo is not None:
            raise ValueError("has two zones")
        return read.replace(fold=fold, tzinfo=zone)

    return decode


def _plain_offset(zone: timezone) -> object:
    offset, name = zone.utcoffset(None), zone.tzname(None)
    return {"offset": offset, "name": None if timezone(offset).tzname(None) == name else name}


def _offset(plain: object) -> tzinfo:
    offset, name = fields_of(plain, offset=timedelta, name=(str, NoneType))
    return timezone(offset) if name is None else timezone(offset, name)


def _plain_zone(zone: ZoneInfo) -> object:
    if zone.key is None or not _ZONE_KEY.fullmatch(zone.key):
        raise ValueError("it was read from a file and has no name of its own; use `zoneinfo.ZoneInfo(name)`")
    return zone.key


def _zone(plain: object) -> ZoneInfo:
    # A name that leads elsewhere would have files read, or modules below `tzdata` imported.
    if not _ZONE_KEY.fullmatch(_text(plain)):
        raise ValueError("has a malformed time zone")
    try:
        return ZoneInfo(_text(plain))
    except (ZoneInfoNotFoundError, OSError) as exc:
        raise NotHereError(f"needs the time zone {plain}, which is not here; install the package tzdata") from exc


# -- numbers, paths, containers --------------------------------------------------------------------------------------


def _plain_decimal(value: Decimal) -> str:
    text = str(value)
    if len(text) > MAX_INT_DIGITS:
        raise ValueError(f"it has more than {MAX_INT_DIGITS} characters; store it as bytes")
    return text


def _decimal(plain: object) -> Decimal:
    if len(_text(plain)) > MAX_INT_DIGITS:
        raise ValueError("has too many digits")
    return Decimal(_text(plain))


def _path(kind: type[PurePath], pure: type[PurePath]) -> Callable[[object], PurePath]:
    """Return how to read a path; one of another system comes back as the pure path of that system, which is equal."""
    is_here = kind is pure or (kind is PosixPath) == (os.name == "posix")
    return lambda plain: (kind if is_here else pure)(_text(plain))


def _plain_default(value: defaultdict[object, object]) -> object:
    return {"factory": factory_name(value), "items": dict(value)}


def _default(plain: object) -> defaultdict[object, object]:
    name, items = fields_of(plain, factory=(str, NoneType), items=dict)
    return defaultdict(None if name is None else FACTORIES[name], items)


def _deque(plain: object) -> deque[object]:
    items, limit = fields_of(plain, items=list, maxlen=(int, NoneType))
    if limit is not None and len(items) > limit:
        raise ValueError("holds more than it may")
    return deque(items, limit)


def _attributes(kind: type[Namespace | SimpleNamespace]) -> Callable[[object], object]:
    def decode(plain: object) -> object:
        if type(plain) is not dict or not all(type(name) is str for name in plain):
            raise TypeError("has attributes without a name")
        made = kind()
        vars(made).update(plain)  # never by setattr, which a name may mean otherwise
        return made

    return decode


def _plain_stream(value: io.BytesIO) -> object:
    if value.closed:
        raise ValueError("it is closed; store its bytes before")
    return {"data": value.getvalue(), "position": value.tell()}


def _stream(plain: object) -> io.BytesIO:
    data, position = fields_of(plain, data=bytes, position=int)
    made = io.BytesIO(data)
    made.seek(position)
    return made


def _plain_partial(value: partial[object]) -> object:
    if vars(value):
        raise ValueError("it has attributes, which would be lost; store its `args` and `keywords`")
    return {"function": value.func, "args": value.args, "keywords": value.keywords}


def _partial(plain: object) -> object:
    if type(plain) is not dict or plain.keys() != {"function", "args", "keywords"} or not callable(plain["function"]):
        raise ValueError("has other fields")
    function, args, keywords = plain["function"], plain["args"], plain["keywords"]
    if type(args) is not tuple or type(keywords) is not dict or not all(type(name) is str for name in keywords):
        raise TypeError("has a field of another type")
    made = partial(function, *args, **keywords)  # which calls nothing
    if made.func is not function:
        raise ValueError("is a partial of a partial, in a spelling that is not written")
    return made


standard_kinds: Mapping[type, Kind] = {
    # A subclass before its base, which is what advice names.
    datetime: Kind("$datetime", _plain_clock, _clock(datetime)),
    date: Kind("$date", date.isoformat, lambda plain: date.fromisoformat(_text(plain))),
    time: Kind("$time", _plain_clock, _clock(time)),
    timedelta: Kind(
        "$timedelta",
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda plain: timedelta(*_numbers(plain, 3)),
    ),
    timezone: Kind("$timezone", _plain_offset, _offset),
    ZoneInfo: Kind("$ZoneInfo", _plain_zone, _zone),
    Fraction: Kind(
        "$Fraction",
        lambda value: [value.numerator, value.denominator],
        lambda plain: Fraction(*_numbers(plain, 2)),
    ),
    Decimal: Kind("$Decimal", _plain_decimal, _decimal),
    UUID: Kind("$UUID", str, lambda plain: UUID(_text(plain))),
    PurePosixPath: Kind("$PurePosixPath", str, _path(PurePosixPath, PurePosixPath)),
    PureWindowsPath: Kind("$PureWindowsPath", str, _path(PureWindowsPath, PureWindowsPath)),
    PosixPath: Kind("$PosixPath", str, _path(PosixPath, PurePosixPath)),
    WindowsPath: Kind("$WindowsPath", str, _path(WindowsPath, PureWindowsPath)),
    defaultdict: Kind("$defaultdict", _plain_default, _default, is_small=False),
    deque: Kind("$deque", lambda value: {"items": list(value), "maxlen": value.maxlen}, _deque, is_small=False),
    Namespace: Kind("$argparse.Namespace", lambda value: dict(vars(value)), _attributes(Namespace), is_small=False),
    SimpleNamespace: Kind(
        "$SimpleNamespace", lambda value: dict(vars(value)), _attributes(SimpleNamespace), is_small=False
    ),
    partial: Kind("$functools.partial", _plain_partial, _partial, is_small=False),
    io.BytesIO: Kind("$BytesIO", _plain_stream, _stream, is_small=False),
}
