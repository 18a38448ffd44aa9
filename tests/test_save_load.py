"""What was saved is loaded, byte for byte, or an error names the object that is wrong; and what it costs is bounded."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cloudckpt
from cloudckpt import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    IntegrityError,
    MissingShardError,
    Options,
    OptionsError,
    RetryPolicy,
    StateMismatchError,
    StorageError,
    UnsupportedValueError,
)
from cloudckpt.options import KIB, MIB
from cloudckpt.store import RetryingStore, open_store
from servers import FreshPrefix
from tests.programs import run_forked

ONE_TRY = RetryPolicy(max_attempts=1)
# Shards hold some tensors whole and parts of others; blocks and spans cut through them.
CUT = Options(
    shard_bytes=512, block_bytes=96, span_bytes=192, memory_budget_bytes=8 * KIB, concurrency=4, retry=ONE_TRY
)
# Each shard is one block, its header included.
COARSE = Options(shard_bytes=512, block_bytes=4 * KIB, span_bytes=4 * KIB, memory_budget_bytes=64 * KIB, retry=ONE_TRY)
SENTINEL = -12345.0


def tensors(seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (40, 7), "b": (3,), "c": (5, 5, 5), "d": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def like(state: Mapping[str, object]) -> dict[str, object]:
    return {name: torch.full_like(value, SENTINEL) for name, value in state.items() if isinstance(value, torch.Tensor)}


def same(state: Mapping[str, object], other: Mapping[str, object]) -> bool:
    return state.keys() == other.keys() and all(
        torch.equal(value, other[name])  # type: ignore[arg-type]
        for name, value in state.items()
    )


def objects_of(url: Path) -> list[str]:
    return sorted(str(path.relative_to(url)) for path in url.rglob("*") if path.is_file())


def shards_of(url: Path) -> list[str]:
    return [name for name in objects_of(url) if name.endswith(".safetensors")]


NESTED: dict[str, object] = {
    "weights": {"layers": [torch.arange(6.0).reshape(2, 3), {"bias": torch.ones(2)}], "pair": (torch.zeros(1), "text")},
    "by step": {5: torch.tensor(5), (1, "x"): torch.tensor(1.5)},
    "key.with.dots": torch.arange(3),
    "nothing": None,
    "numbers": [1, -(2**80), 0.1, math.inf, -math.inf, 1 + 2j, True],
    "texts": {"plain": "a", "odd": "\x00é\ud800", "raw": b"\x00\xff", "$": "dollar"},
    "empty dict": {},
    "keys": {1: "a", None: "b", (1, 2): [{3: 4}, {}]},
    "containers": ((), [], {}, {1, 2}, frozenset({"x"}), range(3), slice(1, None)),
    "ordered": OrderedDict([("z", 1), ("a", 2)]),
    "torch": [torch.float16, torch.Size([2, 3]), torch.device("cpu")],
    "numpy": [np.float32(0.1), np.arange(6, dtype=np.int16).reshape(2, 3), np.str_("n")],
}


def equal(one: object, other: object) -> bool:
    """Compare deeply; types must be the same."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("options", [Options(), CUT], ids=["default", "cut"])
def test_read_returns_the_nested_state_that_was_saved_types_included(tmp_path: Path, options: Options) -> None:
    cloudckpt.save(dict(NESTED), tmp_path / "c", options=options)

    found = cloudckpt.read(tmp_path / "c", options=options)

    assert list(found) == list(NESTED)
    assert {name for name in NESTED if not equal(found[name], NESTED[name])} == set()


def test_load_puts_values_back_into_the_dict_that_the_caller_holds(tmp_path: Path) -> None:
    cloudckpt.save({"config": {"lr": 0.1, "steps": [1, 2]}, "losses": [3.0, 2.0], "epoch": 4}, tmp_path / "c")
    config: dict[str, object] = {"lr": 9.9, "stale": True}
    losses: list[float] = []
    state: dict[str, object] = {"config": config, "losses": losses, "epoch": 0}

    cloudckpt.load(state, tmp_path / "c")

    assert state == {"config": {"lr": 0.1, "steps": [1, 2]}, "losses": [3.0, 2.0], "epoch": 4}
    assert state["config"] is config
    assert state["losses"] is losses


def test_load_fills_tensors_inside_containers_in_place(tmp_path: Path) -> None:
    saved = torch.arange(4.0)
    cloudckpt.save({"nest": {"list": [saved, 1], "pair": (saved + 1, "x")}}, tmp_path / "c")
    first, second = torch.zeros(4), torch.zeros(4)
    state: dict[str, object] = {"nest": {"list": [first, 0], "pair": (second, "y")}}

    cloudckpt.load(state, tmp_path / "c")

    assert equal(state, {"nest": {"list": [saved, 1], "pair": (saved + 1, "x")}})
    assert state["nest"]["list"][0] is first  # type: ignore[index]
    assert state["nest"]["pair"][0] is second  # type: ignore[index]


@pytest.mark.parametrize("options", [Options(), CUT], ids=["default", "cut"])
@pytest.mark.parametrize("engine", ["obstore", "fsspec"])
def test_a_state_survives_the_way_through_a_real_object_store(
    s3_url: FreshPrefix, engine: str, options: Options
) -> None:
    state = tensors() | {"config": {"lr": 0.5}}
    place = s3_url.url + "/final"
    there = {"storage_options": s3_url.storage_options, "engine": engine, "options": options}
    saved = cloudckpt.save(state, place, metrics={"loss": 1.5}, metadata={"note": "x"}, **there)
    live = like(state) | {"config": {}}

    loaded = cloudckpt.load(live, place, **there)

    assert equal(live, state)
    assert equal(cloudckpt.read(place, **there), state)
    assert (loaded.attempt, loaded.digest, dict(loaded.metrics)) == (saved.attempt, saved.digest, {"loss": 1.5})
    assert loaded.metadata == {"note": "x"}


def test_every_shard_is_bounded_and_opens_with_the_safetensors_library(tmp_path: Path) -> None:
    state = tensors()
    cloudckpt.save(state, tmp_path / "c", options=CUT)
    pieces = [load_file(tmp_path / "c" / name) for name in shards_of(tmp_path / "c")]
    named = {name: tensor for shard in pieces for name, tensor in shard.items()}

    assert torch.equal(named["b"], state["b"])  # type: ignore[arg-type]
    assert sum(tensor.numel() for tensor in named.values()) == sum(
        value.numel() for value in state.values() if isinstance(value, torch.Tensor)
    )
    assert all(sum(tensor.nbytes for tensor in shard.values()) <= CUT.shard_bytes for shard in pieces)
    rows = [tensor for name, tensor in sorted(named.items()) if name.startswith("a[")]
    assert len(rows) > 1
    assert {tuple(row.shape[1:]) for row in rows} == {(7,)}


def test_a_url_that_holds_a_checkpoint_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    first = cloudckpt.save(tensors(0), tmp_path / "c")
    before = objects_of(tmp_path / "c")

    with pytest.raises(CheckpointExistsError, match="already committed"):
        cloudckpt.save(tensors(1), tmp_path / "c")

    assert objects_of(tmp_path / "c") == before
    assert same(cloudckpt.read(tmp_path / "c"), tensors(0))
    assert cloudckpt.load(like(tensors()), tmp_path / "c").attempt == first.attempt


@pytest.mark.parametrize("state", [{}, [], {"": 1}, {3: torch.ones(1)}, {"cloudckpt.rng": 1}], ids=repr)
def test_a_state_that_is_no_dict_of_plain_names_is_refused(tmp_path: Path, state: dict[str, object]) -> None:
    with pytest.raises(OptionsError, match="state"):
        cloudckpt.save(state, tmp_path / "c")
    with pytest.raises(OptionsError, match="state"):
        cloudckpt.load(state, tmp_path / "c")


@pytest.mark.parametrize(
    ("value", "advice"), [(lambda: None, "function"), (object(), "state_dict"), (iter([1]), "plain values")]
)
def test_a_value_that_cannot_be_held_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, value: object, advice: str
) -> None:
    with pytest.raises(UnsupportedValueError, match=advice) as caught:
        cloudckpt.save({"fine": torch.ones(2), "config": {"deep": [1, value]}}, tmp_path / "c")

    assert caught.value.key == "config.deep[1]"
    assert objects_of(tmp_path) == []


def test_nothing_at_a_url_is_not_found_and_the_state_stays(tmp_path: Path) -> None:
    state = like(tensors())
    with pytest.raises(CheckpointNotFoundError, match="cloudckpt ls"):
        cloudckpt.load(state, tmp_path / "nothing")
    assert same(state, like(tensors()))


def test_every_difference_is_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    cloudckpt.save({"a": torch.ones(2), "b": torch.ones(3), "only there": 1, "c": torch.ones(4)}, tmp_path / "c")
    state: dict[str, object] = {
        "a": torch.zeros(2),
        "b": torch.zeros(5),
        "c": torch.zeros(2, 2),
        "only here": torch.zeros(1),
        "neither": 2,
    }

    with pytest.raises(StateMismatchError) as caught:
        cloudckpt.load(state, tmp_path / "c")

    assert set(caught.value.missing) == {"only here", "neither"}
    assert caught.value.unexpected == ("only there",)
    assert caught.value.mismatched == {"b": ((5,), (3,)), "c": ((2, 2), (4,))}
    for named in ("only here", "neither", "only there", "b is (5,) here and (3,) there"):
        assert named in str(caught.value)
    assert all(not value.any() for value in state.values() if isinstance(value, torch.Tensor))


def test_not_strict_restores_what_both_have_and_leaves_the_rest(tmp_path: Path) -> None:
    cloudckpt.save({"a": torch.ones(2), "only there": 1}, tmp_path / "c")
    state: dict[str, object] = {"a": torch.zeros(2), "only here": torch.full((1,), 7.0)}

    cloudckpt.load(state, tmp_path / "c", strict=False)

    assert equal(state, {"a": torch.ones(2), "only here": torch.full((1,), 7.0)})


def test_a_shape_that_differs_is_refused_also_when_not_strict(tmp_path: Path) -> None:
    cloudckpt.save({"a": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(StateMismatchError, match=r"a is \(3,\) here and \(2,\) there"):
        cloudckpt.load({"a": torch.zeros(3)}, tmp_path / "c", strict=False)


# -- verification ------------------------------------------------------------------------------------------------


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def check_is_refused(url: Path, state: Mapping[str, object], key: str, options: Options) -> None:
    """Load and read must name `key`; no element of any target may be anything but untouched or right."""
    live = like(state)
    with pytest.raises(IntegrityError) as caught:
        cloudckpt.load(live, url, options=options)
    assert caught.value.key == key
    for name, value in live.items():
        assert isinstance(value, torch.Tensor)
        assert bool(((value == SENTINEL) | (value == state[name])).all()), f"a wrong byte reached {name}"
    with pytest.raises(IntegrityError):
        cloudckpt.read(url, options=options)


def _damages(data: bytes, rng: random.Random) -> list[bytes]:
    flips = [_flipped(data, rng.randrange(len(data) * 8)) for _ in range(24)]
    zeroed = bytes(len(data))
    return [*flips, zeroed, b"", data[:1], data[: len(data) // 2], data[:-1]]


def test_any_damage_to_any_object_is_found_and_named_before_a_wrong_byte_lands(tmp_path: Path) -> None:
    rng = random.Random(0)
    state, url = tensors(), tmp_path / "c"
    cloudckpt.save(state, url, options=COARSE)
    names = objects_of(url)
    assert len(shards_of(url)) >= 3
    for name in names:
        data = (url / name).read_bytes()
        for damaged in _damages(data, rng):
            (url / name).write_bytes(damaged)
            check_is_refused(url, state, name, COARSE)
        (url / name).write_bytes(data)
    assert same(cloudckpt.read(url, options=COARSE), state)


def test_a_flipped_bit_in_any_tensor_byte_is_found_when_blocks_cut_through_tensors(tmp_path: Path) -> None:
    rng = random.Random(1)
    state, url = tensors(), tmp_path / "c"
    cloudckpt.save(state, url, options=CUT)
    for name in shards_of(url):
        data = (url / name).read_bytes()
        header_bytes = 8 + int.from_bytes(data[:8], "little")
        for _ in range(8):
            (url / name).write_bytes(_flipped(data, rng.randrange(header_bytes * 8, len(data) * 8)))
            check_is_refused(url, state, name, CUT)
        (url / name).write_bytes(data)


@pytest.mark.parametrize("name", ["manifest.json", "index.bin"])
def test_bytes_behind_the_end_of_a_manifest_or_an_index_are_found(tmp_path: Path, name: str) -> None:
    state, url = tensors(), tmp_path / "c"
    cloudckpt.save(state, url, options=COARSE)
    key = next(found for found in objects_of(url) if found.endswith(name))
    data = (url / key).read_bytes()
    for tail in (b"\n", b" ", b"\x00", data):
        (url / key).write_bytes(data + tail)
        check_is_refused(url, state, key, COARSE)


def test_bytes_behind_the_end_of_a_shard_never_reach_a_tensor(tmp_path: Path) -> None:
    state, url = tensors(), tmp_path / "c"
    cloudckpt.save(state, url, options=COARSE)
    for name in shards_of(url):
        with (url / name).open("ab") as shard:
            shard.write(b"tail" * 100)
    live = like(state)
    cloudckpt.load(live, url, options=COARSE)
    assert same(live, state)


def test_the_removal_of_any_shard_or_the_index_is_named(tmp_path: Path) -> None:
    state, url = tensors(), tmp_path / "c"
    cloudckpt.save(state, url, options=COARSE)
    for name in [found for found in objects_of(url) if found != "manifest.json"]:
        data = (url / name).read_bytes()
        (url / name).unlink()
        check_is_refused(url, state, name, COARSE)
        with pytest.raises(MissingShardError, match="is not on the store"):
            cloudckpt.load(like(state), url, options=COARSE)
        (url / name).write_bytes(data)


def test_without_its_manifest_a_checkpoint_does_not_exist(tmp_path: Path) -> None:
    cloudckpt.save(tensors(), tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(CheckpointNotFoundError):
        cloudckpt.load(like(tensors()), tmp_path / "c")


def test_any_two_swapped_shards_are_found(tmp_path: Path) -> None:
    state, url = {f"t{number}": torch.full((100,), float(number)) for number in range(4)}, tmp_path / "c"
    cloudckpt.save(dict(state), url, options=COARSE)
    names = shards_of(url)
    sizes = {(url / name).stat().st_size for name in names}
    assert (len(names), len(sizes)) == (4, 1), "equal sizes, so that only the digests tell"
    for first, second in pairwise(names):
        one, other = (url / first).read_bytes(), (url / second).read_bytes()
        (url / first).write_bytes(other)
        (url / second).write_bytes(one)
        live = like(state)
        with pytest.raises(IntegrityError) as caught:
            cloudckpt.load(live, url, options=COARSE)
        assert caught.value.key in (first, second)
        (url / first).write_bytes(one)
        (url / second).write_bytes(other)


def test_a_shard_of_another_save_of_the_same_state_is_found(tmp_path: Path) -> None:
    state = tensors()
    for name in ("one", "two"):
        cloudckpt.save(state, tmp_path / name, options=COARSE)
    mine, other = shards_of(tmp_path / "one")[0], shards_of(tmp_path / "two")[0]
    (tmp_path / "one" / mine).write_bytes((tmp_path / "two" / other).read_bytes())
    check_is_refused(tmp_path / "one", state, mine, COARSE)


def _read_beside_damage(url: Path, key: str, state: Mapping[str, object], *, damaged: str) -> str:
    try:
        read = cloudckpt.read(url, key, options=CUT)
    except IntegrityError as exc:
        return "refused" if exc.key == damaged else f"{exc.key} was blamed for {damaged}"
    assert equal(read, {key: state[key]})
    return "right"


def test_a_partial_read_finds_damage_in_what_it_reads_and_is_right_beside_damage_elsewhere(tmp_path: Path) -> None:
    rng = random.Random(2)
    state, url = tensors(), tmp_path / "c"
    cloudckpt.save(state, url, options=CUT)
    found: Counter[str] = Counter()
    for name in shards_of(url):
        data = (url / name).read_bytes()
        for _ in range(6):
            (url / name).write_bytes(_flipped(data, rng.randrange(len(data) * 8)))
            for key in state:
                found[_read_beside_damage(url, key, state, damaged=name)] += 1
        (url / name).write_bytes(data)
    assert found.keys() == {"right", "refused"}, found


# -- cost --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[RetryingStore]:
    """All stores that save, load and read open, so that a test can count their requests."""
    opened: list[RetryingStore] = []

    def remembered(*arguments: object, **options: object) -> RetryingStore:
        opened.append(open_store(*arguments, **options))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr("cloudckpt.checkpoint.open_store", remembered)
    return opened


def requests(store: RetryingStore) -> dict[str, int]:
    return {op: cost.requests for op, cost in store.stats().items() if cost.requests}


@pytest.mark.parametrize("engine", ["obstore", "fsspec"])
def test_a_small_save_costs_four_requests_and_its_load_three(
    s3_url: FreshPrefix, stores: list[RetryingStore], engine: str
) -> None:
    there = {"storage_options": s3_url.storage_options, "engine": engine}
    cloudckpt.save(tensors(), s3_url.url + "/first", **there)  # asks, once per process, whether create is exclusive
    stores.clear()

    cloudckpt.save(tensors(), s3_url.url + "/second", **there)
    cloudckpt.load(like(tensors()), s3_url.url + "/second", **there)

    assert requests(stores[0]) == {"head": 1, "put": 2, "create": 1}
    assert requests(stores[1]) == {"read": 2, "get": 1}
    assert sum(store.stats().retries for store in stores) == 0


def test_a_load_makes_one_request_per_span(tmp_path: Path, stores: list[RetryingStore]) -> None:
    state: dict[str, object] = {"t": torch.zeros(16 * KIB)}
    options = Options(
        shard_bytes=16 * KIB, block_bytes=KIB, span_bytes=4 * KIB, memory_budget_bytes=MIB, single_writer=True
    )
    cloudckpt.save(state, tmp_path / "c", options=options)
    cloudckpt.load(like(state), tmp_path / "c", options=options)

    assert requests(stores[0]) == {"head": 1, "put": 5, "create": 1}
    # 16 KiB of data and a header that spills into a further block: four spans and the rest.
    assert requests(stores[1]) == {"read": 2, "get": 4 * 5}


MEASURE = """
import json, sys
from pathlib import Path
import torch
import cloudckpt

url, storage_options, engine, layout = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
MIB = 1 << 20
options = cloudckpt.Options(shard_bytes=16 * MIB, memory_budget_bytes=64 * MIB, block_bytes=4 * MIB, span_bytes=8 * MIB)
there = {"storage_options": storage_options or None, "engine": engine}


def grown(run):
    def high():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    Path("/proc/self/clear_refs").write_text("5")
    before = high()
    run()
    return high() - before


def make(fill):
    sizes = [(24, 1 << 20), (40, 1 << 20)]
    dense = {f"t{n}": torch.full(size, fill, dtype=torch.float32) for n, size in enumerate(sizes)}
    return dense if layout == "dense" else {name: tensor.view(1 << 20, -1).t() for name, tensor in dense.items()}


# Imports, connections and thread pools are not what is measured.
small = {"s": torch.ones(1 << 20)}
cloudckpt.save(small, url + "/warm", options=options, **there)
cloudckpt.load(small, url + "/warm", options=options, **there)
state, target = make(1.0), make(2.0)
save = grown(lambda: cloudckpt.save(state, url + "/big", options=options, **there))
load = grown(lambda: cloudckpt.load(target, url + "/big", options=options, **there))
assert all(torch.equal(state[name], target[name]) for name in state)
print(json.dumps({"save": save, "load": load}))
"""


def measured(url: str, storage_options: Mapping[str, object], engine: str, layout: str) -> dict[str, int]:
    ran = run_forked("-c", MEASURE, url, json.dumps(dict(storage_options)), engine, layout)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
    return found


def check_budget(grown_bytes: Mapping[str, int]) -> None:
    limit_bytes = (64 + 64) * MIB
    assert {what: size for what, size in grown_bytes.items() if size > limit_bytes} == {}


@pytest.mark.parametrize("layout", ["dense", pytest.param("transposed", marks=pytest.mark.slow)])
def test_a_state_four_times_the_budget_is_saved_and_loaded_within_it_on_disk(tmp_path: Path, layout: str) -> None:
    check_budget(measured(str(tmp_path), {}, "auto", layout))


@pytest.mark.parametrize(
    ("engine", "layout"),
    [
        pytest.param("obstore", "dense", marks=pytest.mark.slow),
        pytest.param("obstore", "transposed", marks=pytest.mark.slow),
        pytest.param("fsspec", "dense", marks=pytest.mark.slow),
        pytest.param("fsspec", "transposed", marks=pytest.mark.slow),
    ],
)
def test_a_state_four_times_the_budget_is_saved_and_loaded_within_it_on_s3(
    s3_url: FreshPrefix, engine: str, layout: str
) -> None:
    check_budget(measured(s3_url.url, s3_url.storage_options, engine, layout))


# -- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [cloudckpt.save, cloudckpt.load, cloudckpt.read])
def test_a_store_that_cannot_be_reached_is_an_error_of_ours(act: Callable[..., object]) -> None:
    nobody = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9"}
    options = Options(retry=RetryPolicy(max_attempts=1, deadline_s=20, request_timeout_s=5, connect_timeout_s=2))
    arguments = ("s3://bucket/x",) if act is cloudckpt.read else (like(tensors()), "s3://bucket/x")
    with pytest.raises(StorageError):
        act(*arguments, storage_options=nobody, options=options)


def test_several_ranks_without_a_process_group_save_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionsError, match="init_process_group"):
        cloudckpt.save(tensors(), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_tensor_that_was_saved_and_restored_can_be_resized(tmp_path: Path) -> None:
    state: dict[str, object] = {"w": torch.arange(100.0)}
    cloudckpt.save(state, tmp_path / "a")
    cloudckpt.load(state, tmp_path / "a")
    tensor = state["w"]
    assert isinstance(tensor, torch.Tensor)
    assert tensor.resize_(200).shape == (200,)


@pytest.mark.parametrize(
    ("keys", "names"), [("*", {"a", "s"}), ("[ac]*", {"a"}), ("cloudckpt.notes", {"cloudckpt.notes"})]
)
def test_what_the_library_keeps_beside_the_state_is_read_by_its_own_names_alone(
    tmp_path: Path, keys: str, names: set[str]
) -> None:
    with cloudckpt.CheckpointManager(tmp_path, progress="off") as manager:
        state = {"a": np.zeros(100_000), "s": OrderedDict(w=torch.ones(1, requires_grad=True))}
        url = manager.save(0, state).url
    assert cloudckpt.read(url, keys, progress="off").keys() == names


def test_a_pattern_that_only_the_library_s_own_names_match_matches_nothing(tmp_path: Path) -> None:
    with cloudckpt.CheckpointManager(tmp_path, progress="off") as manager:
        url = manager.save(0, {"a": torch.ones(1)}).url
    with pytest.raises(cloudckpt.CheckpointNotFoundError, match=r"'\*rng\*'; it holds a$"):
        cloudckpt.read(url, "*rng*", progress="off")


@pytest.mark.parametrize("key", [np.str_("w"), type("Name", (str,), {})("w")])
def test_a_key_of_another_type_than_str_is_refused_by_name_before_anything_is_saved(tmp_path: Path, key: str) -> None:
    with pytest.raises(cloudckpt.OptionsError, match=f"'w'.*{type(key).__name__}.*give a str"):
        cloudckpt.save({key: torch.ones(1)}, tmp_path / "c", progress="off")
    assert not (tmp_path / "c").exists()
