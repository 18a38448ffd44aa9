"""Turn the name of a state and a size into tensors, all or one rank's, and tell whether restored ones are the same.

Each value is its own place in the whole state, as bits: any rank knows what belongs into its part, and a process that
loads can check against what another process saved, without a copy of it. Knows nothing of checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch

__all__ = ["LAYOUTS", "STATES", "Layout", "Shapes", "State", "StateKind", "blank", "build", "bytes_of", "differences"]

State = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Layout = Literal["fsdp", "ddp"]
LAYOUTS: Mapping[Layout, str] = {
    "fsdp": "dim-0 DTensors, a part in each rank",
    "ddp": "the whole state in every rank",
}

_BYTES_PER_VALUE = 4
_WIDTHS = (32, 64, 128, 256, 512, 768, 1024, 1280, 1600, 2048, 4096)
_LAYERS_WANTED = 20
_VOCABULARY_LIMIT = 50_257
_LORA_RANK = 16
_LORA_LAYERS = 32
_BITS = 1 << 30
_BLOCK_VALUES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class StateKind:
    """What is saved, all of it fp32.

    Attributes:
        shapes: from a size in bytes to names and shapes of about that size.
        usual_bytes: the size that the suite measures.
    """

    title: str
    shapes: Callable[[int], Shapes]
    usual_bytes: int = 2 << 30


def _weights(size_bytes: int) -> Shapes:
    """A GPT-2-like model: large and many small tensors."""
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
    layer_values = sum(math.prod(shape) for shape in layer.values())
    layers = max(1, round((values - vocabulary * width) / layer_values))
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocabulary, width), "wpe.weight": (1024, width)}
    shapes |= {f"h.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def _with_adamw(weights: Callable[[int], Shapes], size_bytes: int) -> Shapes:
    """Weights, and of each both averages and the step that AdamW keeps, by the names of a flat `state_dict`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in weights(size_bytes // 3).items():
        moments = {f"optimizer.state.{name}.{part}": shape for part in ("exp_avg", "exp_avg_sq")}
        shapes |= {f"model.{name}": shape, **moments, f"optimizer.state.{name}.step": ()}
    return shapes


def _even(count: int, size_bytes: int) -> Shapes:
    """So many tensors of one shape."""
    rows = max(1, round(size_bytes / count / _BYTES_PER_VALUE / 16))
    return {f"tensor.{n}": (rows, 16) for n in range(count)}


def _adapters(size_bytes: int) -> Shapes:
    """Low-rank adapters beside the four projections of each layer; the base model is not saved."""
    values = size_bytes // _BYTES_PER_VALUE
    width = max((w for w in _WIDTHS if 8 * w * _LORA_RANK * _LORA_LAYERS <= values), default=_WIDTHS[0])
    layers = max(1, round(values / (8 * width * _LORA_RANK)))
    return {
        f"layers.{n}.self_attn.{projection}_proj.lora_{side}.weight": shape
        for n in range(layers)
        for projection in "qkvo"
        for side, shape in (("A", (_LORA_RANK, width)), ("B", (width, _LORA_RANK)))
    }


STATES: Mapping[str, StateKind] = {
    "adamw": StateKind(title="GPT with AdamW", shapes=partial(_with_adamw, _weights)),
    "gpt": StateKind(title="GPT, weights alone", shapes=_weights),
    "lora": StateKind(title="LoRA adapters with AdamW", shapes=partial(_with_adamw, _adapters), usual_bytes=192 << 20),
    "tensors-1": StateKind(title="one tensor", shapes=partial(_even, 1), usual_bytes=4 << 30),
    "tensors-100": StateKind(title="100 tensors", shapes=partial(_even, 100), usual_bytes=256 << 20),
    "tensors-1000": StateKind(title="1,000 tensors", shapes=partial(_even, 1_000), usual_bytes=256 << 20),
    "tensors-10000": StateKind(title="10,000 tensors", shapes=partial(_even, 10_000), usual_bytes=256 << 20),
}


def bytes_of(shapes: Shapes) -> int:
    """Return the bytes of all tensors, each counted once."""
    return sum(math.prod(shape) for shape in shapes.values()) * _BYTES_PER_VALUE


def build(shapes: Shapes, layout: Layout = "ddp") -> State:
    """Build this process's part of the state, each tensor in touched memory of its own.

    `ddp` is all of it, without a process group, too; `fsdp` the rows that FSDP2 gives to this rank, as DTensors
    (of what has no rows, all).
    """
    return _built(shapes, layout, is_blank=False)


def blank(shapes: Shapes, layout: Layout = "ddp") -> State:
    """Build the state to restore into: allocated, every page touched, every value wrong."""
    return _built(shapes, layout, is_blank=True)


def differences(state: State, shapes: Shapes, layout: Layout = "ddp") -> list[str]:
    """Name the tensors of `state` whose part in this process is not, bit for bit, what `build` builds."""
    wrong = [name for name in state if name not in shapes]
    for name, shape, at in _placed(shapes):
        if name not in state or not _is_right(state[name], shape, at, layout):
            wrong.append(name)
    return wrong


def _built(shapes: Shapes, layout: Layout, *, is_blank: bool) -> State:
    state: State = {}
    for name, shape, at in _placed(shapes):
        local = torch.empty(_local_shape(shape, layout))
        bits = local.view(torch.int32)
        for into, values in _blocks(bits, at + _first_row(shape, layout) * math.prod(shape[1:])):
            torch.arange(values.start, values.stop, dtype=torch.int32, out=into)
        if is_blank:
            bits.bitwise_not_()
        state[name] = _sharded(local, shape) if layout == "fsdp" and shape else local
    return state


def _is_right(tensor: torch.Tensor, shape: tuple[int, ...], at: int, layout: Layout) -> bool:
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if tensor.dtype != torch.float32 or local.shape != _local_shape(shape, layout):
        return False
    bits = local.detach().contiguous().view(torch.int32)
    first = at + _first_row(shape, layout) * math.prod(shape[1:])
    return all(
        torch.equal(found, torch.arange(values.start, values.stop, dtype=torch.int32))
        for found, values in _blocks(bits, first)
    )


def _placed(shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield each name with its shape and the place of its first value in the whole state."""
    at = 0
    for name, shape in shapes.items():
        yield name, shape, at
        at += math.prod(shape)


def _blocks(bits: torch.Tensor, first: int) -> Iterator[tuple[torch.Tensor, range]]:
    """Cut a tensor into views that a check needs little memory for, each with the values that belong into it."""
    flat = bits.view(-1)
    for start in range(0, flat.numel(), _BLOCK_VALUES):
        view = flat[start : start + _BLOCK_VALUES]
        low = (first + start) % _BITS
        yield view, range(low, low + view.numel())


def _local_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    return shape if layout == "ddp" or not shape else (len(_rows(shape[0])), *shape[1:])


def _first_row(shape: tuple[int, ...], layout: Layout) -> int:
    return 0 if layout == "ddp" or not shape else _rows(shape[0]).start


def _rows(count: int) -> range:
    """Return the rows that this rank holds; FSDP2 cuts as `torch.chunk` does, so the last part may be shorter."""
    import torch.distributed as dist

    step = -(-count // dist.get_world_size())
    return range(count)[dist.get_rank() * step : (dist.get_rank() + 1) * step]


def _sharded(local: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, Shard

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, _mesh(), [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)


@cache
def _mesh() -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))
