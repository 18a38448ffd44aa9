"""Take from torch's process groups what the ranks of a job need to speak beside them.

    has_world, refuse_lonely_rank   is there a default one?
    taking_part, those_taking_part  does this rank save and restore with all others, with those of a group, or alone?
    store_of_our_own                a connection to the default one's key-value store
    new_gloo_group                  a group of our own, of those that take part
    breaking                        what gloo raises ──▶ `BrokenError`

What asks rank 0's store may not return, so it is called on a thread that nobody needs.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Self, TypeAlias, cast, get_args

import torch.distributed as dist
import xxhash

from cloudckpt.errors import OptionsError
from cloudckpt.ranks.outcome import named_ranks

__all__ = [
    "BrokenError",
    "KeyValueStore",
    "Members",
    "Part",
    "ProcessGroup",
    "Ranks",
    "breaking",
    "check_part",
    "has_world",
    "new_gloo_group",
    "refuse_lonely_rank",
    "store_of_our_own",
    "taking_part",
    "those_taking_part",
]

# Only a backstop: the pulse finds who is late long before. A gloo group that times out is lost as a whole.
_GLOO_TIMEOUT = timedelta(hours=24)
# Each rank of thousands would else open a connection to every other one, more than a process may have files.
_LAZY = "TORCH_GLOO_LAZY_INIT"

ProcessGroup: TypeAlias = "dist.ProcessGroup"

KeyValueStore: TypeAlias = "dist.distributed_c10d.Store"

Ranks = Literal["all", "self"]
"""Who saves or restores together: all ranks of the default process group, or the calling process alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Those ranks of a job that save and restore together, and which of them this process is.

    Attributes:
        name: the same on each of them, and no other group's; "" for all ranks of the default process group.
        ranks: their numbers in the default process group, in the order of their own.
        rank: this process's own, from 0.
        world: the default process group.
    """

    name: str
    ranks: Sequence[int]
    rank: int
    world: dist.ProcessGroup

    @classmethod
    def of_world(cls) -> Self:
        """Return all ranks of the default process group, which exists."""
        world = cast("dist.ProcessGroup", dist.group.WORLD)
        return cls(name="", ranks=range(dist.get_world_size()), rank=dist.get_rank(), world=world)

    @classmethod
    def of(cls, group: object) -> Self:
        """Return the ranks of a process group, of which this process is one.

        Raises:
            OptionsError: it is no process group, or not one of this process; or it was destroyed.
        """
        if not has_world():
            raise OptionsError(
                "process_group is given and there is no default process group; call "
                "torch.distributed.init_process_group() first, and make the group of its ranks"
            )
        if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise OptionsError(
                f"rank {dist.get_rank()} is not in the process group that was given: it is NON_GROUP_MEMBER, what "
                "torch.distributed.new_group returns on ranks that it leaves out; only the ranks of a group save and "
                "restore with it, so make this call on them alone"
            )
        if not isinstance(group, dist.ProcessGroup):
            raise OptionsError(
                f"process_group is a {type(group).__name__}; give a torch.distributed.ProcessGroup, such as "
                'torch.distributed.new_group(…) or mesh["dp"].get_group() return, or None for all ranks'
            )
        if group is dist.group.WORLD:
            return cls.of_world()
        try:
            ranks = dist.get_process_group_ranks(group)
        except KeyError as exc:
            raise OptionsError(
                "the process group that was given is none of torch.distributed's, or was destroyed; make another one"
            ) from exc
        if (mine := dist.get_rank()) not in ranks:
            raise OptionsError(
                f"rank {mine} is not in the process group that was given, which is that of {named_ranks(ranks)}; only "
                "these save and restore with it, so make this call on them alone"
            )
        # By its ranks, too: torch gives groups of other ranks that were made by themselves names of their own only.
        name = xxhash.xxh3_64_hexdigest(f"{group.group_name} of {ranks}".encode())
        return cls(name=name, ranks=ranks, rank=ranks.index(mine), world=cast("dist.ProcessGroup", dist.group.WORLD))

    @property
    def home(self) -> tuple[int, ...]:
        """Who keeps the store through which all ranks of the job speak: the job's rank 0, if it is one of these."""
        return (self.ranks.index(0),) if 0 in self.ranks else ()


Part: TypeAlias = Ranks | Members
"""With whom a process saves and restores."""

# Processes in which the default process group was seen: they are ranks, also when it is gone.
_seen_in: set[int] = set()
_part: ContextVar[Part] = ContextVar("cloudckpt_part", default="all")


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


def check_part(ranks: object, process_group: object = None) -> Part:
    """Return who takes part.

    Raises:
        OptionsError: `ranks` is neither `all` nor `self`; or this process is not one of the group's.
    """
    known = next((word for word in get_args(Ranks) if ranks == word), None)
    if known is None:
        raise OptionsError(
            f"ranks is {ranks!r}; give 'all', if every rank makes this call, or 'self', if this process saves or "
            "restores by itself"
        )
    if process_group is None:
        return cast("Ranks", known)
    if known == "self":
        raise OptionsError("ranks is 'self' and a process_group is given; give one of them")
    return Members.of(process_group)


@contextmanager
def taking_part(part: Part) -> Iterator[None]:
    """Let what this thread does in the block be done with the other ranks, with some, or as if there were none."""
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


def those_taking_part() -> Members | None:
    """Return with which ranks this thread saves and restores; None: by itself, whatever process group there is.

    Raises:
        OptionsError: with those of a job whose default process group was destroyed since.
    """
    part = _part.get()
    if part == "all":
        return Members.of_world() if has_world() else None
    if isinstance(part, Members):
        if not has_world() or part.world is not dist.group.WORLD:
            raise OptionsError(
                f"the process group of {named_ranks(part.ranks)} was destroyed, with the default one; make both anew, "
                "and a manager for them"
            )
        return part
    return None


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
    if _part.get() != "all" or has_world() or is_helper:
        return
    if world_size.isdigit() and int(world_size) > 1:
        raise OptionsError(
            f"WORLD_SIZE is {world_size} and no process group exists; call torch.distributed.init_process_group() "
            f'before saving or restoring, or give ranks="self" if this process is to do it by itself{otherwise}'
        )


def new_gloo_group(place: str, *, rank: int, size: int, timeout: timedelta = _GLOO_TIMEOUT) -> dist.ProcessGroup:
    """Make a group with connections on first use: rank 0 talks to all, and few others to each other.

    Not by `dist.new_group`, in which all ranks of the job must join, and whose names count the trainer's groups, too.
    It ends when the last one who holds it lets it go: then its connections close, and the others' waits end.

    Args:
        place: of which no other group in this store has ever been.
        rank: of this process in it.
        size: how many they are.
        timeout: of each of its messages.
    """
    before = os.environ.get(_LAZY)
    os.environ[_LAZY] = "1"
    try:
        with breaking(None):
            # By a connection of its own: the first message to a rank waits in it until that rank is there.
            store = dist.distributed_c10d.PrefixStore(place, store_of_our_own())
            # Of the base class only in C++: it has what this package uses of one.
            return cast("dist.ProcessGroup", dist.ProcessGroupGloo(store, rank, size, timeout))
    finally:
        if before is None:
            del os.environ[_LAZY]
        else:
            os.environ[_LAZY] = before


def store_of_our_own() -> KeyValueStore:
    """Return a second connection to the process group's store: a request that waits there blocks no trainer's."""
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 (there is no public way to it)
    clone = getattr(store, "clone", None)
    return cast("KeyValueStore", store if clone is None else clone())
