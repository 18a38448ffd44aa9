"""Turn one save and one restore by several ranks into the requests that each rank makes.

Real processes in a gloo group on loopback, a small sharded state, a directory as the store. Requests are counted
where they are made, below the retries, so that rank 0's can be told from the others'.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from cloudckpt.manager import manager as manager_module
from cloudckpt.store import RetryingStore, open_store

__all__ = ["RankRequests", "count_on", "requests_of_ranks"]

Requests = dict[str, int]

_PARTS = ("first save", "save", "restore")
_ROWS = 4096
_COLUMNS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRequests:
    """What one rank asked of the store, by part of the run and operation."""

    rank: int
    parts: dict[str, Requests]


def requests_of_ranks(world_sizes: Sequence[int]) -> str:
    """Count with each number of ranks, and write a markdown table; every restore is compared with what was saved."""
    lines = ["### Requests", "", f"| ranks | rank | {' | '.join(_PARTS)} |", "|---" * (2 + len(_PARTS)) + "|"]
    for world_size in world_sizes:
        found = count_on(world_size)
        lines.append(_line(world_size, "0", found[:1]))
        if len(found) > 1:
            lines.append(_line(world_size, "each other, at most", found[1:]))
    return "\n".join(lines)


def _line(world_size: int, rank: str, ranks: Sequence[RankRequests]) -> str:
    most = [max((of_rank.parts[part] for of_rank in ranks), key=lambda asked: sum(asked.values())) for part in _PARTS]
    cells = [f"{sum(asked.values())} ({', '.join(f'{n} {op}' for op, n in sorted(asked.items()))})" for asked in most]
    return f"| {world_size} | {rank} | {' | '.join(cells)} |"


def count_on(world_size: int) -> list[RankRequests]:
    """Save twice and restore once on that many ranks, and return what each of them asked, in order."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="bench-requests-") as root, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        with ProcessPoolExecutor(world_size, mp_context=context) as pool:
            ranks = [pool.submit(_run_rank, rank, world_size, port, Path(root) / "root") for rank in range(world_size)]
            return [rank.result() for rank in ranks]


def _run_rank(rank: int, world_size: int, port: int, root: Path) -> RankRequests:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(_ROWS * _COLUMNS, dtype=torch.float32).reshape(_ROWS, _COLUMNS)
    state: dict[str, object] = {"w": distribute_tensor(whole, mesh, [Shard(0)]), "step": 1}
    with _open_stores() as stores:
        parts = {}
        with manager_module.CheckpointManager(str(root)) as manager:
            for step, part in enumerate(_PARTS[:2], start=1):
                parts[part] = _spent(stores, lambda: manager.save(step, state))  # noqa: B023
                dist.barrier()
        blank: dict[str, object] = {"w": distribute_tensor(torch.zeros_like(whole), mesh, [Shard(0)]), "step": 0}
        with manager_module.CheckpointManager(str(root)) as manager:
            parts[_PARTS[2]] = _spent(stores, lambda: manager.restore(blank))
    restored = blank["w"]
    if blank["step"] != 1 or not torch.equal(restored.full_tensor(), whole):  # type: ignore[attr-defined]
        raise ValueError(f"rank {rank} did not restore what was saved")
    dist.barrier()
    dist.destroy_process_group()
    return RankRequests(rank=rank, parts=parts)


@contextmanager
def _open_stores() -> Iterator[list[RetryingStore]]:
    """Collect every store that a manager opens meanwhile."""
    stores: list[RetryingStore] = []

    def opened(*args: object, **options: object) -> RetryingStore:
        stores.append(open_store(*args, **options))  # type: ignore[arg-type]
        return stores[-1]

    with patch.object(manager_module, "open_store", opened):
        yield stores


def _spent(stores: list[RetryingStore], action: Callable[[], object]) -> Requests:
    """Do `action` and return what the newest store was asked for it."""
    before = stores[-1].stats()
    action()
    spent = stores[-1].stats() - before
    return {op: costs.requests for op, costs in spent.items() if costs.requests}
