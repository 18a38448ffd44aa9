"""Make a call as code does that is busy with an exception of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

__all__ = ["while_handling"]

T = TypeVar("T")


def while_handling(theirs: Exception, call: Callable[[], T]) -> T:
    """Return what `call` returns, made from the handler of `theirs`."""
    try:
        _raise(theirs)
    except type(theirs):
        return call()


def _raise(exc: Exception) -> NoReturn:
    raise exc
