"""Damage one object of a root as disks, networks and people do, read it in every way, and judge what came.

two ranks ──▶ a root: three steps that share shards, a step saved again after going back, a pin and a name
damage of a region of one object ──▶ a read ──▶ the very bits of one commit, or an error that names the object
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from typer.testing import CliRunner

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, Options
from cloudckpt.cli import app
from cloudckpt.dcp import CloudReader
from cloudckpt.format import Index
from cloudckpt.options import KIB

__all__ = ["DAMAGES", "READS", "Root", "Target", "save_root"]

State = dict[str, object]

OPTIONS = Options(shard_bytes=8 * KIB, block_bytes=KIB, span_bytes=2 * KIB, concurrency=2, memory_budget_bytes=64 * KIB)
BLANK = -7.0
COMMITS = ((1, 1), (1, 2), (1, 3), (2, 3))
NEWEST = COMMITS[-1]
"""Epoch and step of the newest commit."""


def state_of(epoch: int, step: int, shift: int, mesh: DeviceMesh | None = None) -> State:
    """Return what was committed as (epoch, step) of a run; `base` is the same in all, so that its shards are shared."""
    number = shift + 10 * epoch + step
    chance = random.Random(number)
    tensors = {
        "base": torch.arange(64 * 48, dtype=torch.float32).view(64, 48) + shift,
        "head": torch.tensor([chance.uniform(-1, 1) for _ in range(32 * 24)]).view(32, 24).bfloat16(),
    }
    laid = {name: each if mesh is None else distribute_tensor(each, mesh, [Shard(0)]) for name, each in tensors.items()}
    return {
        **laid,
        "ids": torch.arange(300) * number,
        "flags": torch.tensor([chance.random() < 0.5 for _ in range(500)]),
        "config": {"number": number, "betas": (0.9, float(number)), "note": "it was " * number},
        "blob": chance.randbytes(70_000),
    }


def blank() -> State:
    """Return a state to be restored into, in which nothing is as it was saved."""
    tensors = {name: torch.full_like(each, BLANK if each.is_floating_point() else 1) for name, each in tensors_of(1)}
    return {**tensors, "config": {"number": 0, "betas": (0.0, 0.0), "note": ""}, "blob": b""}


def tensors_of(epoch: int, step: int = 1, shift: int = 0) -> list[tuple[str, torch.Tensor]]:
    return [(name, each) for name, each in state_of(epoch, step, shift).items() if isinstance(each, torch.Tensor)]


def save_root(path: str, shift: int) -> None:
    """Save a root, by every rank of a group of two."""
    mesh = init_device_mesh("cpu", (2,))
    given = {"reuse_unchanged": True, "save_rng": False, "progress": "off", "options": OPTIONS}
    with CheckpointManager(path, **given) as manager:  # type: ignore[arg-type]
        for step in (1, 2, 3):
            manager.save(step, state_of(1, step, shift, mesh), metadata={"shift": shift})
    with CheckpointManager(path, **given) as manager:  # type: ignore[arg-type]
        manager.restore(state_of(1, 1, shift, mesh), step=2)
        manager.save(3, state_of(2, 3, shift, mesh), metadata={"shift": shift}, name="last")
        manager.pin(2)


# ---- reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One way to read a root, or the newest checkpoint of it.

    Attributes:
        run: reads, into the state that it is given or into one that it returns, and returns which commit that is.
        keys: what it reads; none if that is all.
    """

    run: Callable[[Root, State], tuple[tuple[int, int], State]]
    keys: tuple[str, ...] = ()


def _restore(root: Root, state: State) -> tuple[tuple[int, int], State]:
    with CheckpointManager(root.path, save_rng=False, progress="off", options=OPTIONS) as manager:
        found = manager.restore(state)
    if found is None:
        return (0, 0), state
    return (found.epoch, found.step), state


def _load(root: Root, state: State) -> tuple[tuple[int, int], State]:
    cloudckpt.load(state, root.newest, options=OPTIONS, progress="off")
    return NEWEST, state


def _load_part(root: Root, state: State) -> tuple[tuple[int, int], State]:
    cloudckpt.load(state, root.newest, only=["head", "config"], options=OPTIONS, progress="off")
    return NEWEST, state


def _read(root: Root, _: State) -> tuple[tuple[int, int], State]:
    return NEWEST, cloudckpt.read(root.newest, options=OPTIONS, progress="off")


def _read_keys(root: Root, _: State) -> tuple[tuple[int, int], State]:
    return NEWEST, cloudckpt.read(root.newest, ["base", "blob"], options=OPTIONS, progress="off")


def _dcp(root: Root, state: State) -> tuple[tuple[int, int], State]:
    kept = {"base": state["base"], "ids": state["ids"]}
    try:
        dcp.load(kept, storage_reader=CloudReader(root.newest, options=OPTIONS), no_dist=True)
    except CheckpointException as exc:  # which is no Exception, and holds ours
        raise next(iter(exc.failures.values()))[0] from None
    return NEWEST, kept


READS: Mapping[str, Read] = {
    "restore of the newest": Read(run=_restore),
    "load": Read(run=_load),
    "load(only=…)": Read(run=_load_part, keys=("head", "config")),
    "read": Read(run=_read),
    "read(keys=…)": Read(run=_read_keys, keys=("base", "blob")),
    "dcp.load by CloudReader": Read(run=_dcp, keys=("base", "ids")),
}


# ---- damage


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A region of one object.

    Attributes:
        kind: of what it is.
        key: the object.
        start: its first byte.
        stop: the one after its last.
        donors: objects of the same kind that could stand in its place, by where they are from.
    """

    kind: str
    key: str
    start: int
    stop: int
    donors: Mapping[str, bytes]
    others: tuple[str, ...]


Damage = Callable[["Root", Target, random.Random], Mapping[str, bytes | None]]
"""What then stands under which key; None is nothing."""


def _flip(root: Root, target: Target, chance: random.Random) -> Mapping[str, bytes | None]:
    data = bytearray(root.objects[target.key])
    data[chance.randrange(target.start, target.stop)] ^= 1 << chance.randrange(8)
    return {target.key: bytes(data)}


def _truncate(root: Root, target: Target, chance: random.Random) -> Mapping[str, bytes | None]:
    stop = chance.choice([target.start, target.stop - 1, chance.randrange(target.start, target.stop)])
    return {target.key: root.objects[target.key][:stop]}


def _extend(root: Root, target: Target, chance: random.Random) -> Mapping[str, bytes | None]:
    return {target.key: root.objects[target.key] + chance.randbytes(chance.choice([1, 64, 5000]))}


def _zero(root: Root, target: Target, chance: random.Random) -> Mapping[str, bytes | None]:
    data = root.objects[target.key]
    start = chance.randrange(target.start, target.stop)
    stop = min(target.stop, start + 512)
    return {target.key: data[:start] + bytes(stop - start) + data[stop:]}


def _cut_out(root: Root, target: Target, chance: random.Random) -> Mapping[str, bytes | None]:
    data = root.objects[target.key]
    start = chance.randrange(target.start, target.stop)
    return {target.key: data[:start] + data[min(target.stop, start + chance.choice([1, 8, 1024])) :]}


def _swap(root: Root, target: Target, chance: random.Random) -> Mapping[str, bytes | None]:
    if not target.others:
        return {target.key: None}
    other = chance.choice(target.others)
    return {target.key: root.objects[other], other: root.objects[target.key]}


def _duplicate(root: Root, target: Target, chance: random.Random) -> Mapping[str, bytes | None]:
    return {target.key: root.objects[chance.choice(target.others)] if target.others else None}


def _remove(root: Root, target: Target, chance: random.Random) -> Mapping[str, bytes | None]:
    return {target.key: None}


def _from(place: str) -> Damage:
    return lambda root, target, chance: {target.key: target.donors.get(place)}


DAMAGES: Mapping[str, Damage] = {
    "a bit flipped": _flip,
    "cut off": _truncate,
    "bytes behind its end": _extend,
    "512 bytes zeroed": _zero,
    "bytes cut out of it": _cut_out,
    "swapped with another": _swap,
    "another in its place, too": _duplicate,
    "missing": _remove,
    "that of another attempt": _from("attempt"),
    "that of another step": _from("step"),
    "that of another run": _from("run"),
}


class Root:
    """A root on a disk, whose objects are damaged and put back.

    Attributes:
        path: where it is.
        objects: key → bytes, as they were committed.
        newest: the URL of the newest checkpoint.
        targets: what can be damaged, by kind.
    """

    def __init__(self, path: Path, other: Path) -> None:
        """Take a root, and another one of the same shape, from which foreign objects come."""
        self.path = path
        self.objects = _objects_of(path)
        self._foreign = _objects_of(other)
        self.newest = f"{path}/{_prefix(*NEWEST)}"
        self._needed = self._needed_keys()
        self.targets: dict[str, list[Target]] = {}
        for key in sorted(self.objects):
            for target in self._targets_of(key):
                self.targets.setdefault(target.kind, []).append(target)

    def is_needed(self, key: str) -> bool:
        """Tell whether the newest checkpoint consists of this object, among others."""
        return key in self._needed

    def put(self, changed: Mapping[str, bytes | None]) -> None:
        """Write objects around the library."""
        for key, data in changed.items():
            path = self.path / key
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)

    def restore(self, changed: Mapping[str, bytes | None]) -> None:
        """Put them back as they were."""
        self.put({key: self.objects[key] for key in changed})

    def _needed_keys(self) -> frozenset[str]:
        prefix = _prefix(*NEWEST) + "/"
        (index_key,) = (key for key in self.objects if key.startswith(prefix) and key.endswith("/index.bin"))
        index = Index.decode(self.objects[index_key], key=index_key)
        shards = [shard.key(prefix) for shard in index.shards()]
        assert any(not key.startswith(prefix) for key in shards), "nothing is shared"
        return frozenset([prefix + "manifest.json", index_key, *shards])

    def _targets_of(self, key: str) -> list[Target]:
        data = self.objects[key]
        name = key.rpartition("/")[2]
        others = tuple(
            other
            for other in self.objects
            if other != key and _family(other) == _family(key) and self.objects[other] != data
        )
        made = []
        for kind, start, stop in _regions(key, data):
            donors = self._donors(key, name)
            whose = kind + self._owner(key)
            made.append(Target(kind=whose, key=key, start=start, stop=stop, donors=donors, others=others))
        return made

    def _owner(self, key: str) -> str:
        if not key.startswith("step-"):
            return ""
        if key.startswith(_prefix(*NEWEST)):
            return " of the newest"
        return " that it shares" if key in self._needed else " of an older one"

    def _donors(self, key: str, name: str) -> dict[str, bytes]:
        prefix = key.split("/", 1)[0]
        found: dict[str, bytes] = {}
        same_step, other_step = prefix.partition("-e")[0], "step-0000000001-e0001"
        for other, data in self.objects.items():
            if other != key and other.endswith("/" + name) and data != self.objects[key]:
                at = other.split("/", 1)[0]
                if at != prefix and at.startswith(same_step):
                    found["attempt"] = data
                elif at == other_step:
                    found["step"] = data
        for other, data in self._foreign.items():
            if other.endswith("/" + name) and other.split("/", 1)[0] == prefix:
                found["run"] = data
        return found


def _prefix(epoch: int, step: int) -> str:
    return f"step-{step:010}-e{epoch:04}"


def _objects_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def _family(key: str) -> str:
    """Return what kind of object it is."""
    name = key.rpartition("/")[2]
    if key.startswith("pins/last/"):
        return "name"
    if key.startswith("pins/"):
        return "pin"
    if key.startswith("epochs/"):
        return "claim" if name.endswith(".json") else "mark"
    return {"manifest.json": "manifest", "index.bin": "index"}.get(name, "shard")


def _regions(key: str, data: bytes) -> list[tuple[str, int, int]]:
    family = _family(key)
    if family == "index":
        head = 24 + struct.unpack_from("<Q", data, 16)[0]
        return [("index header", 0, head), ("index section", head, len(data))]
    if family == "shard":
        head = 8 + struct.unpack_from("<Q", data)[0]
        return [("shard header", 0, head), ("shard data", head, len(data))]
    return [(family, 0, len(data))] if data else []


# ---- one trial


def try_read(root: Root, target: Target, damage: str, read: str, seed: int) -> tuple[str, str]:
    """Read a root of which one object is damaged; return what became of it, and what speaks against that, or ""."""
    changed = DAMAGES[damage](root, target, random.Random(seed))
    if all(data == root.objects[key] for key, data in changed.items()):
        changed = _flip(root, target, random.Random(seed))
    root.put(changed)
    state = blank()
    try:
        commit, found = READS[read].run(root, state)
    except CloudCkptError as exc:
        return _told(root, state, exc, changed)
    except Exception as exc:  # noqa: BLE001 (whatever it is, it is none of ours)
        return "", f"it raised {type(exc).__module__}.{type(exc).__name__}: {exc}"[:300]
    finally:
        root.restore(changed)
    if commit == (0, 0):
        return "", "it was taken for a fresh start"
    keys = READS[read].keys
    wrong = _differences(found, state_of(*commit, 0), keys)
    if wrong:
        return "", f"{wrong} are wrong, silently, of {commit}"
    return "the newest, bit for bit" if commit == NEWEST else "an older one, bit for bit", ""


def try_verify(root: Root, target: Target, damage: str, seed: int) -> tuple[str, str]:
    """Let the command line say whether the newest is whole while one object is damaged."""
    changed = DAMAGES[damage](root, target, random.Random(seed))
    if all(data == root.objects[key] for key, data in changed.items()):
        changed = _flip(root, target, random.Random(seed))
    root.put(changed)
    try:
        result = CliRunner().invoke(app, ["verify", "--deep", root.newest])
    finally:
        root.restore(changed)
    if result.exit_code:
        return (
            ("told by name", "") if _names(result.output, changed) else ("", f"nothing is named: {result.output[:300]}")
        )
    if not isinstance(result.exception, SystemExit | None):
        return "", repr(result.exception)
    if damage == "bytes behind its end" or not any(root.is_needed(key) for key in changed):
        return "no part of the newest", ""
    return "", f"verify says that all is well: {result.output[:200]}"


def _told(root: Root, state: State, exc: CloudCkptError, changed: Mapping[str, bytes | None]) -> tuple[str, str]:
    if not _names(str(exc) + str(exc.__cause__), changed):
        return "", f"{type(exc).__name__} names nothing: {exc}"[:300]
    # A restore that went back may have begun with several, of each of which it takes what is right.
    right = [blank(), *(state_of(*commit, 0) for commit in COMMITS)]
    for name, now in state.items():
        if isinstance(now, torch.Tensor) and not torch.stack([now == each[name] for each in right]).any(0).all():
            return "", f"{name} has wrong elements after {exc}"[:300]
    return "told by name", ""


def _names(text: str, changed: Mapping[str, bytes | None]) -> bool:
    # A line of the command line may be wrapped.
    flat = "".join(text.split())
    # An object in the place of a manifest may lead to others, which are not there: then these are named, and it.
    parts = [(key.rpartition("/")[2].removesuffix(".json"), key.split("/", 1)[0]) for key in changed]
    return any(part in flat for pair in parts for part in pair)


def _differences(found: State, saved: State, keys: tuple[str, ...]) -> list[str]:
    wrong = []
    for name in keys or saved:
        mine, theirs = found.get(name), saved[name]
        if isinstance(theirs, torch.Tensor):
            is_same = isinstance(mine, torch.Tensor) and mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        else:
            is_same = mine == theirs
        if not is_same:
            wrong.append(name)
    return wrong
