"""Turn a training state into digests that are equal only if every bit of it is.

Two runs whose digests agree have the same parameters, optimizer moments, schedule, place in the data and random
state. Knows nothing of cloudckpt, so it vouches for it from outside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["digests"]


def digests(state: Mapping[str, object]) -> dict[str, str]:
    """Return a SHA-256 for every part of `state`, and for the random generator that dropout draws from."""
    parts = {name: _plain(part) for name, part in state.items()} | {"torch_rng": torch.get_rng_state()}
    return {name: hashlib.sha256("\n".join(_lines(part, name)).encode()).hexdigest() for name, part in parts.items()}


def _plain(part: object) -> object:
    return part.state_dict() if hasattr(part, "state_dict") else part


def _lines(value: object, path: str) -> Iterator[str]:
    if isinstance(value, Tensor):
        data = value.detach().contiguous().flatten().view(torch.uint8).numpy().data
        yield f"{path} {value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _lines(value[key], f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _lines(item, f"{path}[{number}]")
    else:
        yield f"{path} {value!r}"
