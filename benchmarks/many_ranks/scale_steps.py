"""Turn one number of ranks into seconds and bytes: what rank 0, a reader and a store do, each in a fresh process.

    ranks ──tables──▶ rank 0: decode, share out ──rows──▶ ranks ──results──▶ rank 0: index ──▶ stores ──▶ readers

No tensor is made and no shard is written: ranks are played one after the other, and what they would send lies in a
file, which a step of rank 0 reads as its messages. So a step's memory is what it adds to a process that has imported
everything.
"""

from __future__ import annotations

import multiprocessing
import re
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.many_ranks.layouts import MODELS, Fsdp
from benchmarks.shared.targets import Ground
from benchmarks.sink.process import SinkClient
from cloudckpt.format.boxes import BoxTable
from cloudckpt.format.index import Index
from cloudckpt.format.manifest import IndexRef, Manifest, digest_of
from cloudckpt.format.record import FORMAT_VERSION, INDEX_LIMIT_BYTES
from cloudckpt.keys import checkpoint_prefix, index_key
from cloudckpt.options import Options
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.roots import Roots
from cloudckpt.saving.dedup import share_out
from cloudckpt.saving.tally import Written, assemble
from cloudckpt.store import open_store

__all__ = ["Found", "Size", "in_a_process", "measure_index", "measure_latest", "measure_plan", "measure_stores"]

Found = dict[str, float]
"""Quantity → seconds, bytes or a count, as its name says."""

_LENGTH = struct.Struct("<Q")
_FILLERS = 16
_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model, the ranks that hold it, and how many of them hold the same part of it."""

    model: str
    ranks: int
    replicas: int = 1

    @property
    def title(self) -> str:
        kind = {1: "FSDP", self.ranks: "DDP"}.get(self.replicas, f"HSDP, {self.replicas} replicas")
        return f"{self.model}, {kind}"

    def layout(self) -> Fsdp:
        """Return what one replica's ranks hold."""
        return Fsdp(MODELS[self.model].state(), self.ranks // self.replicas)


# -- one step in one process ---------------------------------------------------------------------------------


def in_a_process(step: Callable[..., Found], *args: object) -> Found:
    """Run a step in a fresh process, so that its memory is its own."""
    context = multiprocessing.get_context("forkserver")
    # What takes seconds to import is imported once, in the process that the others are forked from.
    context.set_forkserver_preload(["torch", "torch.distributed.checkpoint"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(step, *args).result()


class _Watch:
    """Seconds of the parts of a step, and the memory that it takes beyond what was resident before.

    What computes is measured in processor time, which other processes of a shared machine do not lengthen; what waits
    for a store in wall time.
    """

    def __init__(self, name: str, *, clock: Callable[[], float] = time.process_time) -> None:
        self._name = name
        self._clock = clock
        Path("/proc/self/clear_refs").write_text("5")
        self._resident_bytes = _status_bytes("VmRSS")
        self.found: Found = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        began_s = self._clock()
        yield
        self.found[f"{part}_s"] = self._clock() - began_s

    def end(self) -> Found:
        self.found[f"{self._name}_peak_bytes"] = max(0, _status_bytes("VmHWM") - self._resident_bytes)
        return self.found


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _write_messages(path: Path, messages: Iterator[bytes]) -> int:
    total = 0
    with path.open("wb") as file:
        for message in messages:
            file.write(_LENGTH.pack(len(message)))
            total += file.write(message)
    return total


def _messages(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while head := file.read(_LENGTH.size):
            yield file.read(_LENGTH.unpack(head)[0])


def _median_s(action: Callable[[], object]) -> float:
    def timed() -> float:
        began_s = time.process_time()
        action()
        return time.process_time() - began_s

    return median(timed() for _ in range(_REPEATS))


# -- the plan --------------------------------------------------------------------------------------------------


def measure_plan(size: Size, directory: Path) -> Found:
    """Measure what rank 0 does with the tables of all ranks; leaves the rows of each rank in `directory`."""
    found = in_a_process(_ranks_plan, size, directory)
    return found | in_a_process(_rank_0_plans, directory)


def _ranks_plan(size: Size, directory: Path) -> Found:
    layout = size.layout()
    tables = (layout.table(rank % layout.world_size).encode() for rank in range(size.ranks))
    return {
        "table_s": _median_s(lambda: BoxTable.of(layout.boxes(0)).encode()),
        "tables_bytes": _write_messages(directory / "tables", tables),
    }


def _rank_0_plans(directory: Path) -> Found:
    watch = _Watch("plan")
    messages = list(_messages(directory / "tables"))
    with watch.time("decode_tables"):
        tables = [BoxTable.decode(message) for message in messages]
    with watch.time("share_out"):
        rows = share_out(tables).rows
    found = watch.end() | {"boxes": sum(map(len, tables)), "written_boxes": sum(map(len, rows))}
    np.savez(directory / "rows.npz", rows=np.concatenate(rows), stops=np.cumsum([len(of_rank) for of_rank in rows]))
    return found


# -- the index ---------------------------------------------------------------------------------------------------


def measure_index(size: Size, directory: Path) -> Found:
    """Measure what rank 0 makes of the results of all ranks, and what readers do with it; after `measure_plan`."""
    found = in_a_process(_ranks_write, size, directory)
    found |= in_a_process(_rank_0_assembles, directory)
    found |= in_a_process(_reader_checks_all, directory)
    found |= in_a_process(_rank_reads_its_own, size, directory)
    return found | in_a_process(_rank_of_half_the_size_reads, size, directory)


def _ranks_write(size: Size, directory: Path) -> Found:
    layout = size.layout()
    with np.load(directory / "rows.npz") as file:
        rows = np.split(file["rows"], file["stops"][:-1])
    of_ranks = (layout.written(rank, rows[rank]).encode() for rank in range(size.ranks))
    total_bytes = _write_messages(directory / "results", of_ranks)
    return {"results_bytes": total_bytes}


def _rank_0_assembles(directory: Path) -> Found:
    watch = _Watch("assemble")
    messages = list(_messages(directory / "results"))
    with watch.time("assemble"):
        index = assemble(map(Written.decode, messages), attempt="0" * 16, block_bytes=Options().block_bytes, paths={})
    with watch.time("encode_index"):
        data = index.encode()
    found = watch.end() | {"index_bytes": len(data), "shards": index.shard_count, "stored_bytes": index.total_bytes}
    (directory / "index").write_bytes(data)
    return found


def _reader_checks_all(directory: Path) -> Found:
    watch = _Watch("check")
    data = (directory / "index").read_bytes()
    with watch.time("check"):
        Index.decode(data, key="index").check()
    return watch.end()


def _rank_reads_its_own(size: Size, directory: Path) -> Found:
    watch = _Watch("own")
    _find(size.layout(), directory, watch, "own", rank=size.ranks // 2)
    return watch.end()


def _rank_of_half_the_size_reads(size: Size, directory: Path) -> Found:
    watch = _Watch("other")
    layout = Fsdp(MODELS[size.model].state(), size.ranks // 2)
    _find(layout, directory, watch, "other", rank=layout.world_size // 2)
    return watch.end()


def _find(layout: Fsdp, directory: Path, watch: _Watch, part: str, *, rank: int) -> None:
    """Find where a rank's boxes lie, as a restore does."""
    wanted = {box.name: [(box.offsets, box.sizes)] for box in layout.boxes(rank) if 0 not in box.sizes}
    data = (directory / "index").read_bytes()
    with watch.time(part):
        Index.decode(data, key="index").covering(wanted, near=rank)


# -- the stores --------------------------------------------------------------------------------------------------


def measure_stores(index_path: Path, ground: Ground) -> Found:
    """Put an index, commit it, and read both back, on one store."""
    data = index_path.read_bytes()
    attempt, prefix = "0" * 16, checkpoint_prefix(1, 1)
    key = prefix + index_key(attempt)
    watch = _Watch("store", clock=time.perf_counter)
    with open_store(ground.url, storage_options=ground.storage_options) as store:
        catalog = Catalog(store)
        # A client's first request of each kind costs tenths of a second, and is paid once per process.
        store.create("warm-up", b"warm-up")
        catalog.claims.highest()
        store.read("warm-up", limit_bytes=len(b"warm-up"))
        with watch.time("put_index"):
            store.put(key, [memoryview(data)])
        with watch.time("commit"):
            catalog.commit(_manifest(attempt, data), prefix=prefix)
        with watch.time("read_manifest"):
            catalog.open(prefix)
        with watch.time("read_index"):
            again = store.read(key, limit_bytes=INDEX_LIMIT_BYTES)
    if again != data:
        raise RuntimeError(f"{ground.url} gave back another index than was put")
    return watch.end() | {"index_bytes": len(data)}


def _manifest(attempt: str, index: bytes = b"-", *, step: int = 1) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        state="committed",
        step=step,
        epoch=1,
        attempt=attempt,
        created_at="2026-01-01T00:00:00.000+00:00",
        index=IndexRef(size_bytes=len(index), sha256=digest_of(index)),
    )


def measure_latest(ground: Ground, count: int) -> Found:
    """Find the newest of `count` checkpoints."""
    with open_store(ground.url, storage_options=ground.storage_options) as store:

        def fill(step: int) -> None:
            data = _manifest("0" * 16, step=step).encode()
            store.put(f"{checkpoint_prefix(step, 1)}manifest.json", [memoryview(data)])

        with ThreadPoolExecutor(_FILLERS) as pool:
            list(pool.map(fill, range(count)))
        before = store.stats()
        sink = SinkClient(ground.stats_url) if ground.stats_url else None
        if sink:
            sink.reset()
        watch = _Watch("latest", clock=time.perf_counter)
        with watch.time("latest"):
            newest = Roots([Catalog(store)]).newest()
        spent = store.stats() - before
    if newest is None or newest.step != count - 1:
        raise RuntimeError(f"the newest of {count} checkpoints was not found")
    requests = sum(sink.stats().requests.values()) if sink else sum(op.requests for op in spent.values())
    return watch.end() | {"checkpoints": count, "requests": requests}
