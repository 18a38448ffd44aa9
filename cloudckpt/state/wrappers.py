"""Translate names inside of a module: what wrappers (DDP, FSDP1, compile, activation checkpointing) add, and back.

    _orig_mod.module.layers.0._checkpoint_wrapped_module.weight  ⇄  layers.0.weight

A name is walked from the root down, so a module of the user's that is called `module` keeps its name. Names that stand
for no attribute (a hook made them) are kept from where the walk ends. Knows PyTorch's wrappers and nothing else.
"""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cloudckpt.late import CheckpointWrapper, FullyShardedDataParallel

__all__ = ["clean_name", "is_fsdp1", "is_torchs_own", "is_wrapper", "wrapped_name"]

# What a wrapper calls the module inside of it, and whether its state_dict says so, too: others have hooks that do not.
_INNER: tuple[tuple[type[nn.Module], str, bool], ...] = (
    (DistributedDataParallel, "module", True),
    (nn.DataParallel, "module", True),
    (CheckpointWrapper, "_checkpoint_wrapped_module", False),
    (FullyShardedDataParallel, "_fsdp_wrapped_module", False),
)


def _inner(module: object) -> tuple[str, bool] | None:
    """Return what a wrapper calls its inside, and whether a state_dict has that name; None for another module."""
    return _inner_of(type(module))


def _inner_of(kind: type) -> tuple[str, bool] | None:
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # takes a second to import, and nobody may have it
    if compiler is not None and issubclass(kind, compiler.OptimizedModule):
        return "_orig_mod", True
    return next(((name, is_shown) for wrapper, name, is_shown in _INNER if issubclass(kind, wrapper)), None)


def is_wrapper(kind: type) -> bool:
    """Tell whether a type of modules puts something into the names of what is inside of it."""
    return _inner_of(kind) is not None


def is_fsdp1(module: nn.Module) -> bool:
    """Tell whether a module has parts that FSDP1 has wrapped."""
    if not module._modules:  # noqa: SLF001 (a state may have many thousands of small modules)
        return isinstance(module, FullyShardedDataParallel)
    seen, pending = {id(module)}, [module]
    while pending:
        part = pending.pop()
        if isinstance(part, FullyShardedDataParallel):
            return True
        for inner in part._modules.values():  # noqa: SLF001 (where torch has them; `modules` takes thrice as long)
            if inner is not None and id(inner) not in seen:
                seen.add(id(inner))
                pending.append(inner)
    return False


def clean_name(module: nn.Module, path: str) -> str:
    """Drop what wrappers put into a name inside of `module`: of a parameter, a buffer, a key of its state_dict."""
    kept: list[str] = []
    here: object = module
    for part in path.split("."):
        while (inner := _inner(here)) is not None and part != inner[0]:
            here = getattr(here, inner[0])
        if inner is None:
            kept.append(part)
        here = getattr(here, part, None)
    return ".".join(kept)


def wrapped_name(module: nn.Module, clean: str) -> str:
    """Return the key in the module's state_dict of what `clean_name` calls `clean`."""
    parts: list[str] = []
    here: object = module
    for part in clean.split("."):
        while (inner := _inner(here)) is not None:
            parts += [inner[0]] if inner[1] else []
            here = getattr(here, inner[0])
        parts.append(part)
        here = getattr(here, part, None)
    return ".".join(parts)


def is_torchs_own(function: object) -> bool:
    """Tell whether a method or hook is part of PyTorch, so that what it does to a state_dict is known."""
    function = getattr(function, "hook", function)  # nn.Module wraps hooks that take the module
    function = getattr(function, "func", function)  # functools.partial
    owner = getattr(function, "__module__", None) or type(function).__module__
    # Observers and quantized modules resize their buffers when they load.
    return str(owner).partition(".")[0] == "torch" and not str(owner).startswith("torch.ao.")
