"""Turn a size into a GPT-like model state, and tell whether a restored one is the same.

Values follow from the tensor's place alone, so that a process which loads can check against what another process
saved without a copy of it. Knows nothing of checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

__all__ = ["State", "blank", "differences", "gpt", "shapes_of", "size_of"]

State = dict[str, torch.Tensor]

_BYTES_PER_VALUE = 4
_PATTERN_VALUES = 1 << 20
_WIDTHS = (32, 64, 128, 256, 512, 768, 1024, 1280, 1600, 2048, 4096)
_LAYERS_WANTED = 20
_VOCABULARY_LIMIT = 50_257


def shapes_of(size_bytes: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a GPT-2-like model, fp32, of about `size_bytes`: large and many small tensors."""
    values = size_bytes // _BYTES_PER_VALUE
    width = max((w for w in _WIDTHS if 12 * w * w * _LAYERS_WANTED <= values), default=_WIDTHS[0])
    vocabulary = min(_VOCABULARY_LIMIT, max(256, values // (8 * width)))
    layer = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, 4 * width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (4 * width, width),
        "mlp.c_proj.bias": (width,),
    }
    layer_values = sum(_count(shape) for shape in layer.values())
    layers = max(1, round((values - vocabulary * width) / layer_values))
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocabulary, width), "wpe.weight": (1024, width)}
    shapes |= {f"h.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def size_of(size_bytes: int) -> int:
    """Return the exact number of tensor bytes in the state for `size_bytes`."""
    return sum(_count(shape) for shape in shapes_of(size_bytes).values()) * _BYTES_PER_VALUE


def gpt(size_bytes: int) -> State:
    """Build the state with its own values, each tensor in memory of its own."""
    return {name: _filled(torch.empty(shape), place) for place, name, shape in _places(size_bytes)}


def blank(size_bytes: int) -> State:
    """Build the state to restore into: allocated, every page touched, every value wrong."""
    return {name: torch.full(shape, -1.0) for _, name, shape in _places(size_bytes)}


def differences(state: State, size_bytes: int) -> list[str]:
    """Name the tensors of `state` that are not, bit for bit, those of `gpt(size_bytes)`."""
    names = [name for _, name, _ in _places(size_bytes)]
    strays = [name for name in state if name not in set(names)]
    wrong = [
        name
        for place, name, shape in _places(size_bytes)
        if name not in state or not _is_same(state[name], _filled(torch.empty(shape), place))
    ]
    return strays + wrong


def _places(size_bytes: int) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    for place, (name, shape) in enumerate(shapes_of(size_bytes).items()):
        yield place, name, shape


def _filled(tensor: torch.Tensor, place: int) -> torch.Tensor:
    """Fill a tensor so that no two tensors, and no two megabytes of one, are alike."""
    flat = tensor.view(-1)
    for block, start in enumerate(range(0, flat.numel(), _PATTERN_VALUES)):
        part = flat[start : start + _PATTERN_VALUES]
        torch.add(_pattern()[: part.numel()], float(place * 256 + block), out=part)
    return tensor


@cache
def _pattern() -> torch.Tensor:
    return torch.randn(_PATTERN_VALUES, generator=torch.Generator().manual_seed(7))


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    is_alike = one.shape == other.shape and one.dtype == other.dtype
    return is_alike and torch.equal(one.contiguous().view(torch.int32), other.view(torch.int32))


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
