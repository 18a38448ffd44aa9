"""Say what to install where an adapter's framework is missing, or older than what the adapter was written for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

__all__ = ["framework"]


@contextmanager
def framework(package: str, *, lowest: str, extra: str) -> Iterator[None]:
    """Stand around an adapter's imports of a framework.

    Args:
        package: its name in the index.
        lowest: the lowest version that the adapter was run with.
        extra: of cloudckpt, which installs it.

    Raises:
        ImportError: it is not there, too old, or lacks what is imported; with what to install.
    """
    advice = f"pip install 'cloudckpt[{extra}]'; the adapter was run with {package} {lowest}"
    try:
        found = version(package)
    except PackageNotFoundError as exc:
        raise ImportError(f"{package} is not installed: {advice}") from exc
    if _numbers(found) < _numbers(lowest):
        raise ImportError(f"{package} {found} is too old: {advice}")
    try:
        yield
    except ImportError as exc:
        raise ImportError(f"{package} {found} lacks what is needed ({exc}): {advice}") from exc


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)[:2]]
