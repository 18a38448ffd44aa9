"""Say how generators of random numbers become plain values, and come back to draw the very next number.

What comes back is checked before it is used: the code behind numpy's generators trusts the places in their buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from types import NoneType
from typing import Any

import numpy as np
import torch

from cloudckpt.format.codec.standard import Kind, NotHereError, fields_of

__all__ = ["generator_kinds"]

# Name of a bit generator → what in its state is a place in a buffer, and how many elements that buffer has.
_BIT_GENERATORS: Mapping[str, tuple[type[np.random.BitGenerator], tuple[str, ...], int]] = {
    "PCG64": (np.random.PCG64, (), 0),
    "PCG64DXSM": (np.random.PCG64DXSM, (), 0),
    "SFC64": (np.random.SFC64, (), 0),
    "Philox": (np.random.Philox, ("buffer_pos",), 4),
    "MT19937": (np.random.MT19937, ("state", "pos"), 624),
}
_POOL_LIMIT = 1024


def _checked(state: Any) -> object:  # noqa: ANN401  a dict, as numpy types it not
    if state["bit_generator"] not in _BIT_GENERATORS:
        raise ValueError(f"its bit generator is none of {', '.join(_BIT_GENERATORS)}; store its own state")
    return state


def _plain_seed(source: np.random.BitGenerator) -> object:
    """Return what `spawn` goes on from."""
    seed: Any = getattr(source, "seed_seq", None) or getattr(source, "_seed_seq", None)  # the latter before numpy 1.25
    if type(seed) is not np.random.SeedSequence:
        raise ValueError("it was not made from a seed; store `value.bit_generator.state`")
    entropy = seed.entropy
    return {
        "entropy": list(map(int, entropy)) if isinstance(entropy, list | tuple | np.ndarray) else entropy,
        "spawn_key": list(map(int, seed.spawn_key)),
        "pool_size": seed.pool_size,
        "n_children_spawned": seed.n_children_spawned,
    }


def _seed(plain: object) -> np.random.SeedSequence:
    entropy, key, pool, count = fields_of(
        plain, entropy=(int, list, NoneType), spawn_key=list, pool_size=int, n_children_spawned=int
    )
    if not 4 <= pool <= _POOL_LIMIT or count < 0 or not all(type(word) is int for word in key):
        raise ValueError("has a seed that cannot be")
    return np.random.SeedSequence(entropy, spawn_key=tuple(key), pool_size=pool, n_children_spawned=count)


def _bit_generator(state: Any, seed: np.random.SeedSequence | int) -> np.random.BitGenerator:  # noqa: ANN401
    kind, way, size = _BIT_GENERATORS[state["bit_generator"]]
    place: Any = state
    for name in way:
        place = place[name]
    if way and not (type(place) is int and 0 <= place <= size):
        raise ValueError("has a place outside of its buffer")
    if state.get("has_uint32", 0) not in (0, 1):
        raise ValueError("has more than one number in reserve")
    made = kind(seed)
    made.state = state
    return made


def _plain_numpy(value: np.random.Generator) -> object:
    return {"state": _checked(value.bit_generator.state), "seed": _plain_seed(value.bit_generator)}


def _numpy(plain: object) -> np.random.Generator:
    state, seed = fields_of(plain, state=dict, seed=dict)
    return np.random.Generator(_bit_generator(state, _seed(seed)))


def _plain_legacy(value: np.random.RandomState) -> object:
    return _checked(value.get_state(legacy=False))


def _legacy(plain: Any) -> np.random.RandomState:  # noqa: ANN401
    state = dict(plain)
    gauss = {name: state.pop(name) for name in ("has_gauss", "gauss")}
    if type(gauss["gauss"]) is not float or gauss["has_gauss"] not in (0, 1):
        raise TypeError("has a malformed number in reserve")
    made = np.random.RandomState(_bit_generator(state, 0))
    made.set_state({**state, **gauss})
    return made


def _python(plain: Any) -> Random:  # noqa: ANN401
    if type(plain) is not tuple or len(plain) != 3 or type(plain[2]) not in (float, NoneType):
        raise TypeError("has other parts")
    made = Random()
    made.setstate(plain)
    return made


def _torch(plain: object) -> torch.Generator:
    device, state = fields_of(plain, device=torch.device, state=torch.Tensor)
    try:
        made = torch.Generator(device)
    except RuntimeError as exc:
        raise NotHereError(f"is a generator of {device}, which is not here; restore where it is") from exc
    made.set_state(state)
    return made


generator_kinds: Mapping[type, Kind] = {
    Random: Kind("$random.Random", Random.getstate, _python),
    np.random.Generator: Kind("$numpy.Generator", _plain_numpy, _numpy),
    np.random.RandomState: Kind("$numpy.RandomState", _plain_legacy, _legacy),
    torch.Generator: Kind(
        "$torch.Generator", lambda value: {"device": value.device, "state": value.get_state()}, _torch
    ),
}
