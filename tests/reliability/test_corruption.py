"""Whatever becomes of an object, no read hands out a wrong bit: it is told by name, or changes nothing."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from tests.ranks.processes import run
from tests.reliability.corruption import DAMAGES, READS, Root, save_root, try_read, try_verify
from tests.reliability.records import Section, Trials, dose

SECTION = Section(
    number=50,
    title="Damaged objects",
    about="A root that two ranks saved, whose checkpoints share shards, and one object of it damaged: a bit of any "
    "region flipped, a part cut off, cut out, zeroed or added, the object missing, swapped, or of another attempt, "
    "step or run. A lone process reads it whole and in part, which reshards it. Every read brings the very bits of one "
    "commit, or an error that names the object, before any element of the state is wrong; a restore of the newest goes "
    "back to an older one. Lost is a trial in which anything else came: a wrong bit, or an error that names nothing.",
)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
VERIFY = "cloudckpt verify --deep"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    base = tmp_path_factory.mktemp("corruption")
    for name, shift in (("root", 0), ("other", 1000)):
        run(2, save_root, str(base / name), shift)
    return Root(base / "root", base / "other")


@pytest.mark.parametrize("read", [*READS, VERIFY])
@pytest.mark.timeout(1800)
def test_no_damage_is_read_in_silence(root: Root, read: str) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    pairs = list(product(root.targets, DAMAGES))
    chance.shuffle(pairs)
    count = dose(3000, short=40)
    with Trials(SECTION, read) as trials:
        for number in range(count):
            kind, damage = pairs[number % len(pairs)]
            target = chance.choice(root.targets[kind])
            one = chance.randrange(2**32)
            if read == VERIFY:
                became, wrong = try_verify(root, target, damage, one)
            else:
                became, wrong = try_read(root, target, damage, read, one)
            if wrong:
                trials.lose(f"{target.key}, {kind}, {damage}, seed {one}: {wrong}")
            else:
                trials.count(became)


def _flips(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _zeros(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + bytes(min(512, len(data) - start)) + data[start + 512 :]


def _saved_by_dcp(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "dcp"), no_dist=True)
    return next((folder / "dcp").glob("*.distcp"))


def _read_by_dcp(path: Path) -> dict[str, torch.Tensor]:
    state = {name: torch.zeros_like(each) for name, each in _STATE.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(path.parent), no_dist=True)
    return state


def _saved_by_safetensors(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    safetensors.torch.save_file(state, folder / "x.safetensors")
    return folder / "x.safetensors"


def _saved_by_torch(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, folder / "x.pt")
    return folder / "x.pt"


_STATE = {
    "base": torch.arange(64 * 48, dtype=torch.float32).view(64, 48),
    "head": torch.rand(32, 24).bfloat16(),
    "ids": torch.arange(300),
}
OTHERS: dict[str, tuple[Callable[[Path, dict[str, torch.Tensor]], Path], Callable[[Path], dict[str, torch.Tensor]]]] = {
    "DCP's FileSystemReader": (_saved_by_dcp, _read_by_dcp),
    "safetensors' load_file": (_saved_by_safetensors, safetensors.torch.load_file),
    "torch.load": (_saved_by_torch, torch.load),
}


@pytest.mark.parametrize("subject", OTHERS)
def test_others_under_the_same_damage(subject: str, tmp_path: Path) -> None:
    """No law of ours: what the page shows beside it."""
    write, read = OTHERS[subject]
    path = write(tmp_path, _STATE)
    whole, chance = path.read_bytes(), random.Random(7)
    damages = {"a bit flipped": _flips, "512 bytes zeroed": _zeros}
    with Trials(SECTION, "load", subject, seed=7) as trials, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(dose(1000, short=10)):
            damage = list(damages)[number % len(damages)]
            changed = damages[damage](whole, chance)
            if changed == whole:
                continue
            path.write_bytes(changed)
            try:
                found = read(path)
            except (Exception, CheckpointException):  # noqa: BLE001 (of any library)
                trials.count("told, by some exception")
                continue
            if all(torch.equal(found[name], each) for name, each in _STATE.items()):
                trials.count("the same bits")
            else:
                trials.lose(f"{damage}, trial {number}")
