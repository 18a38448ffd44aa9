from __future__ import annotations

import argparse
import random
import signal
import types
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="make integrations installs the frameworks")

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing as stock
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensorFactory
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend

from cloudckpt import CheckpointExistsError, OptionsError
from cloudckpt import save as save_plain
from cloudckpt.integrations.megatron import load, newest, save
from raw_access import FreshPrefix
from tests.integrations.interrupted import Run, assert_same_losses, run_program

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_that_is_killed_has_the_losses_of_one_left_alone(s3_url: FreshPrefix, ranks: int) -> None:
    def run(name: str, **how: object) -> Run:
        root = FreshPrefix(url=f"{s3_url.url}/{name}", server=s3_url.server)
        return run_program("megatron_loop.py", root, ranks=ranks, **how)  # type: ignore[arg-type]

    alone = run("a")
    between = run("b", after=6)
    in_save = run("b", in_save=2)
    last = run("b")

    assert (alone.code, between.code, in_save.code, last.code) == (0, -9, -9, 0)
    assert (min(in_save.losses), min(last.losses)) == (5, 9)
    assert_same_losses([between, in_save, last], alone)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_what_is_common_and_objects_and_tensors_come_back_from_one_commit(s3_url: FreshPrefix) -> None:
    def state(weight: torch.Tensor, generator: object) -> dict[str, object]:
        return {
            "weight": ShardedTensor.from_rank_offsets("weight", weight),
            "generator": ShardedObject("generator", generator, (1,), (0,)),
        }

    weight, target, drawn = torch.randn(3, 4), torch.zeros(3, 4), torch.get_rng_state()
    url = f"{s3_url.url}/iter_0000012"
    given = {**state(weight.clone(), drawn), "args": {"lr": 0.1, "dtype": torch.bfloat16}}
    save(given, url, content_metadata={"kind": "model"}, storage_options=s3_url.storage_options)

    found = load(state(target, None), url, storage_options=s3_url.storage_options)

    assert torch.equal(target, weight)
    assert torch.equal(found["weight"], weight)
    assert torch.equal(found["generator"], drawn)
    assert found["args"] == {"lr": 0.1, "dtype": torch.bfloat16}
    assert found["content_metadata"] == {"kind": "model"}
    assert newest(s3_url.url, storage_options=s3_url.storage_options) == (12, url)
    with pytest.raises(CheckpointExistsError):
        save(state(weight, drawn), url, storage_options=s3_url.storage_options)


def _sharded(key: str, add: float = 0.0, *offsets: tuple[int, int, int]) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.arange(12.0).reshape(4, 3) + add, *offsets)


def _object(key: str, data: object, place: int = 0, count: int = 1) -> ShardedObject:
    return ShardedObject(key, data, (count,), (place,))


def _halves(key: str, tensor: torch.Tensor, *_: object) -> list[ShardedTensor]:
    return [ShardedTensor.from_rank_offsets(f"{key}{half}", part) for half, part in enumerate(tensor.clone().split(2))]


def _generators() -> list[dict[str, object]]:
    return [
        {"py": random.getstate(), "np": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": None, "tp": {}}  # noqa: NPY002
    ]


_ARGS = argparse.Namespace(lr=1e-3, dtype=torch.bfloat16, backend=AttnBackend.auto, model=ModelType(1), betas=(1, 2))
_STATES: dict[str, Callable[[], dict[str, Any]]] = {
    "sharded alone": lambda: {"w": _sharded("w")},
    "an object alone": lambda: {"o": _object("o", None)},
    "numbered optimizers": lambda: {
        "optimizer": {
            0: {"lr": 1, "m": _sharded("m0"), "empty": {}},
            1: {"lr": 2, "m": _sharded("m1", 1), "empty": []},
        }
    },
    "keys": lambda: {"w": _sharded("w"), "p": {(1, 2): 3, 1: "int", "1": "str", None: 4, False: {2: {}}}},
    "keys in an object": lambda: {"o": _object("o", {1: {(1, 2): 3}, "t": (1, [2]), "e": {}, "l": [{}, []]})},
    "empty": lambda: {"w": _sharded("w"), "o": [], "d": {}, "l": [{}], "s": {"state": {}, "groups": [{}], "n": 1}},
    "arguments": lambda: {"w": _sharded("w"), "args": _ARGS, "more": types.SimpleNamespace(signal=signal.SIGTERM)},
    "a dataclass": lambda: {"w": _sharded("w"), "config": OptimizerConfig(lr=0.5)},
    "torch's own": lambda: {
        "w": _sharded("w"),
        "s": torch.Size([1, 2]),
        "t": torch.arange(3),
        "d": torch.device("cpu"),
    },
    "plain": lambda: {"w": _sharded("w"), "p": Path("/x"), "b": b"abc", "set": {1, 2}, "tuple": (1, [2, (3,)])},
    "generators": lambda: {"rng": _object("rng", _generators())},
    "bytes": lambda: {"o": _object("o", BytesIO(b"abc"))},
    "not saved": lambda: {"w": _sharded("w"), "o": LocalNonpersistentObject(5)},
    "a list": lambda: {"l": [_sharded("l0"), _sharded("l1", 1)]},
    "no dimension": lambda: {"z": ShardedTensor.from_rank_offsets("z", torch.tensor(3.0))},
    "bool": lambda: {"z": ShardedTensor.from_rank_offsets("z", torch.tensor([True, False]))},
    "a factory": lambda: {"f": ShardedTensorFactory("f", torch.arange(12.0).reshape(4, 3), _halves, torch.cat)},
    "two parts of one": lambda: {"a": _sharded("p", 0, (0, 0, 2)), "b": _sharded("p", 100, (0, 1, 2))},
    "odd names": lambda: {"a": _sharded("a/b.c"), "o/x": _object("z/y", 3)},
    "two objects of one": lambda: {"a": _object("o", {"a": 1}, 0, 2), "b": _object("o", {"a": {}}, 1, 2)},
}


def _blank(value: object) -> object:
    """What a program gives to a load: shards that hold nothing yet."""
    if isinstance(value, dict):
        return {key: _blank(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_blank(one) for one in value]
    if isinstance(value, ShardedTensor | ShardedTensorFactory):
        value.data.zero_()
    elif isinstance(value, ShardedObject):
        value.data = None
    return value


def _holds_sharded(value: object) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_sharded, value.values() if isinstance(value, dict) else value))
    return isinstance(value, ShardedTensor | ShardedObject | ShardedTensorFactory | LocalNonpersistentObject)


def _asked(name: str) -> dict[str, Any]:
    def only_sharded(value: object) -> object:
        if not isinstance(value, dict):
            return _blank(value)
        return {key: only_sharded(one) for key, one in value.items() if _holds_sharded(one)}

    asked = only_sharded(_STATES[name]())
    assert isinstance(asked, dict)
    return asked


def _seen(value: object) -> object:
    """Return a value with all its types, in a form that `==` compares."""
    if isinstance(value, dict):
        return type(value), [(_seen(key), _seen(one)) for key, one in sorted(value.items(), key=repr)]
    if isinstance(value, list | tuple):
        return type(value), [_seen(one) for one in value]
    if isinstance(value, torch.Tensor | np.ndarray):
        return type(value), value.dtype, value.shape, value.tolist()
    if isinstance(value, BytesIO):
        return type(value), value.getvalue()
    if hasattr(value, "__dict__") and not isinstance(value, AttnBackend | ModelType):
        return type(value), _seen(vars(value))
    return type(value), value


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Megatron's own goes ways of DCP's that are to end
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", _STATES)
def test_a_load_gives_what_megatron_s_own_gives_types_and_all(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)  # Megatron's own has no way without CUDA
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    random.seed(0)
    (tmp_path / "stock").mkdir()
    stock.save(_STATES[name](), str(tmp_path / "stock"))
    save(_STATES[name](), tmp_path / "ours")

    wanted = stock.load(_asked(name), str(tmp_path / "stock"))
    found = load(_asked(name), tmp_path / "ours")

    assert _seen(found) == _seen(wanted)


@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_of_another_kind_is_refused_and_nothing_is_newest_where_nothing_is(tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert newest(root) is None

    save_plain({"weight": torch.zeros(2)}, root / "iter_1", progress="off")

    with pytest.raises(OptionsError, match=r"integrations\.megatron"):
        load({"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(2))}, root / "iter_1")


def test_a_call_without_a_process_group_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="init_process_group"):
        save({}, tmp_path / "iter_1")
