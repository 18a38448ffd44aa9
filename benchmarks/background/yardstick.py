"""Turn a state into the time of one plain copy of it: what any staging is to be compared with.

A state in host memory is copied by all cores into memory whose pages were touched; one on a GPU into pinned memory.
The best of several, because what disturbs a copy only ever makes it longer; yet taken anew for every save, because the
memory of a virtual machine is faster at one time than at another. Knows nothing of checkpoints.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks.shared.states import State

__all__ = ["opened_yardstick"]

_REPEATS = 3
# Small enough that the cores end together, large enough that handing out costs nothing.
_PIECE_BYTES = 8 << 20

_Piece = tuple[int, int, int]  # to, from, bytes


@contextmanager
def opened_yardstick(state: State) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds of the fastest of a few copies of the whole state, made there and then.

    The memory copied to, as large as the state, is held until the end.
    """
    if any(tensor.is_cuda for tensor in state.values()):
        yield partial(_best_of, _device_copy(state))
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield partial(_best_of, _host_copy(state, pool))


def _best_of(copy: Callable[[], None]) -> float:
    return min(_timed(copy) for _ in range(_REPEATS))


def _timed(copy: Callable[[], None]) -> float:
    begin_s = time.perf_counter()
    copy()
    return time.perf_counter() - begin_s


def _host_copy(state: State, pool: ThreadPoolExecutor) -> Callable[[], None]:
    buffer = torch.full((sum(tensor.nbytes for tensor in state.values()),), 1, dtype=torch.uint8)
    pieces = list(_pieces(state, buffer.data_ptr()))
    shares = [pieces[number :: os.cpu_count()] for number in range(os.cpu_count() or 1)]

    def copy() -> None:
        list(pool.map(_move, shares))

    copy.buffer = buffer  # type: ignore[attr-defined]  # must outlive the addresses
    return copy


def _pieces(state: State, to: int) -> Iterator[_Piece]:
    for tensor in state.values():
        for at in range(0, tensor.nbytes, _PIECE_BYTES):
            size_bytes = min(_PIECE_BYTES, tensor.nbytes - at)
            yield to, tensor.data_ptr() + at, size_bytes
            to += size_bytes


def _move(pieces: list[_Piece]) -> None:
    for to, source, size_bytes in pieces:
        ctypes.memmove(to, source, size_bytes)  # releases the interpreter lock


def _device_copy(state: State) -> Callable[[], None]:
    pinned = {name: torch.empty_like(tensor, device="cpu", pin_memory=True) for name, tensor in state.items()}

    def copy() -> None:
        for name, tensor in state.items():
            pinned[name].copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()

    return copy
