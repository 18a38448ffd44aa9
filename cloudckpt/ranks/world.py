"""Take from torch's default process group what the ranks of a job need to speak beside it.

    has_world, refuse_lonely_rank   is there one?
    taking_part                     does this rank save and restore with the others, or alone?
    store_of_our_own                a connection to its key-value store
    new_gloo_group, let_go          a group of our own
    breaking                        what gloo raises ──▶ `BrokenError`

What asks rank 0's store may not return, so it is called on a thread that nobody needs.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Literal, TypeAlias, cast, get_args

import torch.distributed as dist

from cloudckpt.errors import OptionsError

__all__ = [
    "BrokenError",
    "KeyValueStore",
    "Ranks",
    "breaking",
    "check_ranks",
    "has_world",
    "is_alone",
    "let_go",
    "new_gloo_group",
    "refuse_lonely_rank",
    "store_of_our_own",
    "taking_part",
]

# Only a backstop: the pulse finds who is late long before. A gloo group that times out is lost as a whole.
_GLOO_TIMEOUT = timedelta(hours=24)
# Each rank of thousands would else open a connection to every other one, more than a process may have files.
_LAZY = "TORCH_GLOO_LAZY_INIT"

KeyValueStore: TypeAlias = "dist.distributed_c10d.Store"

Ranks = Literal["all", "self"]
"""Who saves or restores together: all ranks of the default process group, or the calling process alone."""

# Processes in which the default process group was seen: they are ranks, also when it is gone.
_seen_in: set[int] = set()
_alone: ContextVar[bool] = ContextVar("cloudckpt_alone", default=False)


class BrokenError(Exception):
    """A connection of the gloo group broke.

    Attributes:
        rank: to which rank, None if gloo does not say.
    """

    def __init__(self, message: str, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank


@contextmanager
def breaking(rank: int | None) -> Iterator[None]:
    """Tell a broken connection from other errors; gloo raises all as RuntimeError."""
    try:
        yield
    except RuntimeError as exc:
        raise BrokenError(f"a connection broke ({exc})", rank) from exc


def check_ranks(ranks: object) -> Ranks:
    """Return who takes part; raises `OptionsError` if it is neither `all` nor `self`."""
    for known in get_args(Ranks):
        if ranks == known:
            return cast("Ranks", known)
    raise OptionsError(
        f"ranks is {ranks!r}; give 'all', if every rank makes this call, or 'self', if this process saves or restores "
        "by itself"
    )


@contextmanager
def taking_part(ranks: Ranks) -> Iterator[None]:
    """Let what this thread does in the block be done with the other ranks, or as if there were none."""
    token = _alone.set(ranks == "self")
    try:
        yield
    finally:
        _alone.reset(token)


def is_alone() -> bool:
    """Tell whether this thread acts for its process alone, whatever process group there is."""
    return _alone.get()


def has_world() -> bool:
    """Tell whether the default process group exists."""
    found = dist.is_available() and dist.is_initialized()
    if found:
        _seen_in.add(os.getpid())
    return found


def refuse_lonely_rank(otherwise: str = "") -> None:
    """Refuse to act as the only rank when the launcher started several and no process group exists.

    DCP would silently treat each process as the coordinator of a save of its own. `otherwise` ends the message.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    # A helper of a rank (a loader's worker) has that rank's environment; what launches ranks makes no daemons of them.
    is_helper = multiprocessing.current_process().daemon and os.getpid() not in _seen_in
    if is_alone() or has_world() or is_helper:
        return
    if world_size.isdigit() and int(world_size) > 1:
        raise OptionsError(
            f"WORLD_SIZE is {world_size} and no process group exists; call torch.distributed.init_process_group() "
            f'before saving or restoring, or give ranks="self" if this process is to do it by itself{otherwise}'
        )


def new_gloo_group(timeout: timedelta = _GLOO_TIMEOUT) -> dist.ProcessGroup:
    """Make the group with connections on first use: rank 0 talks to all, and few others to each other."""
    before = os.environ.get(_LAZY)
    os.environ[_LAZY] = "1"
    try:
        with breaking(None):
            return cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=timeout))
    finally:
        if before is None:
            del os.environ[_LAZY]
        else:
            os.environ[_LAZY] = before


def let_go(group: dist.ProcessGroup) -> None:
    """Forget a group of our own; its connections close with the last one who holds it, and the others' waits end."""
    # The trainer may have destroyed all groups already.
    with suppress(ValueError, RuntimeError, AssertionError, KeyError):
        dist.destroy_process_group(group)


def store_of_our_own() -> KeyValueStore:
    """Return a second connection to the process group's store: a request that waits there blocks no trainer's."""
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 (there is no public way to it)
    clone = getattr(store, "clone", None)
    return cast("KeyValueStore", store if clone is None else clone())
