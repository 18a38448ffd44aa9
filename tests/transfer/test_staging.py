"""What is saved is the state at the call, whatever happens to it afterwards, and in the memory that was allowed."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, Options
from cloudckpt.errors import CloudCkptError
from cloudckpt.options import KIB, MIB
from cloudckpt.transfer.memory import Slabs
from cloudckpt.transfer.staging import Copy, Stage, StageClosedError, copy_all
from raw_access import FreshPrefix
from tests.effort import examples
from tests.store.gates import PATIENCE_S, Gate, before, slow, wait_for

PAGE = 4 * KIB
TRIALS = examples(200)
MANY_SHARDS = Options(shard_bytes=8 * KIB, block_bytes=4 * KIB, span_bytes=8 * KIB)


def tight(budget_bytes: int, shard_bytes: int = 8 * KIB) -> Options:
    return Options(shard_bytes=shard_bytes, block_bytes=4 * KIB, span_bytes=8 * KIB, memory_budget_bytes=budget_bytes)


# -- a state, and what may happen to it --------------------------------------------------------------------


def random_tensor(rng: random.Random) -> torch.Tensor:
    rows, columns = rng.randint(1, 40), rng.randint(1, 40)
    base = torch.randn(rows * 2, columns * 2, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    kinds: list[Callable[[], torch.Tensor]] = [
        lambda: base,
        lambda: base.to(torch.bfloat16),
        lambda: base > 0,
        lambda: (base * 100).to(torch.int64),
        base.t,
        lambda: base[::2, 1::2],
        lambda: base[rows:, :columns],
        lambda: base[:1].expand(3, -1),
        lambda: base.flatten().as_strided((rows, columns + 1), (columns, 1)),
        lambda: torch.zeros(0, columns),
        lambda: torch.tensor(rng.random()),
        lambda: torch.randn(rng.randint(4000, 40_000)),
        lambda: torch.randn(100, rng.randint(40, 200)).to(torch.float16).t(),
    ]
    return rng.choice(kinds)()


def random_values(rng: random.Random) -> dict[str, Any]:
    return {"numbers": [rng.random() for _ in range(3)], "nested": {"deep": [{"x": rng.randrange(100)}, (1, None)]}}


def random_state(rng: random.Random) -> dict[str, Any]:
    tensors = {f"t{number}": random_tensor(rng) for number in range(rng.randint(1, 8))}
    first = next(iter(tensors.values()))
    if first.numel() > 1:
        tensors["overlapping"] = first.reshape(-1)[1:]
    module = torch.nn.Linear(rng.randint(1, 60), rng.randint(1, 60))
    optimizer = torch.optim.AdamW(module.parameters())
    step_optimizer(module, optimizer)
    return {"tensors": tensors, "values": random_values(rng), "module": module, "optimizer": optimizer}


def step_optimizer(module: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    module(torch.ones(2, module.in_features)).square().sum().backward()
    optimizer.step()


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of the state must hold, in memory of its own."""
    held = {"tensors": state["tensors"], "values": state["values"], "module": state["module"].state_dict()}
    moments = {
        name: {key: value.detach().clone() for key, value in of_one.items()}
        for name, of_one in zip(("module.weight", "module.bias"), state["optimizer"].state.values(), strict=True)
    }
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in held["tensors"].items()},
        "values": copy.deepcopy(held["values"]),
        "module": {name: tensor.detach().clone() for name, tensor in held["module"].items()},
        "moments": moments,
    }


def spoil(state: dict[str, Any], rng: random.Random) -> None:
    """Change, free and replace whatever the state holds."""
    for name, tensor in list(state["tensors"].items()):
        ways: list[Callable[[torch.Tensor], object]] = [
            overwrite,
            lambda tensor: tensor.untyped_storage().resize_(0),
            lambda tensor: tensor.untyped_storage().resize_(2 * tensor.untyped_storage().nbytes() + 8),
            lambda tensor: tensor.set_(torch.ones(3, dtype=tensor.dtype)),  # type: ignore[call-overload]
        ]
        rng.choice(ways)(tensor)
        if rng.random() < 0.5:
            del state["tensors"][name]
    state["values"]["numbers"].append(-1.0)
    state["values"]["nested"]["deep"][0]["x"] = "spoilt"
    state["values"]["new"] = 1
    step_optimizer(state["module"], state["optimizer"])
    if rng.random() < 0.5:
        state["optimizer"].state.clear()
    state["module"].weight.data = torch.zeros(2, 2)
    state["module"].bias.data.fill_(7)


def overwrite(tensor: torch.Tensor) -> None:
    if tensor.untyped_storage().nbytes():
        torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(0x5A)  # type: ignore[call-overload]


def differences(expected: dict[str, Any], url: str, storage_options: dict[str, Any], engine: str) -> list[str]:
    found = cloudckpt.read(url, storage_options=storage_options, engine=engine)
    wrong = [] if found["values"] == expected["values"] else ["values"]
    groups = [("tensors", expected["tensors"], found["tensors"]), ("module", expected["module"], found["module"])]
    moments = found["optimizer"]["state"]
    groups += [(name, of_one, moments[name]) for name, of_one in expected["moments"].items()]
    for group, tensors, others in groups:
        if tensors.keys() != others.keys():
            wrong.append(f"{group}: {tensors.keys() ^ others.keys()}")
            continue
        wrong += [f"{group}.{name}" for name, tensor in tensors.items() if not is_same(tensor, others[name])]
    return wrong


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def save_and_spoil(
    url: str | Path, options: Options, seeds: Sequence[int], *, is_held: bool, **where: Any
) -> dict[int, list[str]]:
    """Save random states, spoil each as soon as it is staged, and return what differs of each."""
    wrong = {}
    with CheckpointManager(url, options=options, **where) as manager:
        for seed in seeds:
            rng = random.Random(seed)
            state = random_state(rng)
            expected = plain(state)
            with Gate(manager) as gate:
                if not is_held:
                    gate.open()
                handle = manager.async_save(seed, state)
                spoil(state, rng)
                del state
            checkpoint = handle.result()
            assert checkpoint is not None
            wrong[seed] = differences(
                expected, checkpoint.url, where.get("storage_options", {}), where.get("engine", "auto")
            )
    return {seed: found for seed, found in wrong.items() if found}


@pytest.mark.parametrize("part", range(4))
def test_what_happens_to_the_state_after_the_call_never_changes_what_is_saved(tmp_path: Path, part: int) -> None:
    seeds = range(part * TRIALS // 4, (part + 1) * TRIALS // 4)
    is_held = part % 2 == 0
    # Where the budget has room for all, every put waits until the state is spoilt; else it reads as there is room.
    options = MANY_SHARDS if is_held else tight(24 * KIB)
    assert save_and_spoil(tmp_path, options, seeds, is_held=is_held) == {}


@pytest.mark.parametrize("engine", ["obstore", "fsspec"])
def test_what_happens_to_the_state_never_changes_what_is_saved_on_s3(s3_url: FreshPrefix, engine: str) -> None:
    where = {"storage_options": s3_url.storage_options, "engine": engine}
    assert save_and_spoil(s3_url.url + "/a", MANY_SHARDS, range(3), is_held=True, **where) == {}
    assert save_and_spoil(s3_url.url + "/b", tight(32 * KIB), range(3, 6), is_held=False, **where) == {}


# -- a limited memory --------------------------------------------------------------------------------------


def used_at_puts(manager: CheckpointManager) -> list[int]:
    """Note how many bytes are staged, or being staged, at each put of a shard."""
    seen: list[int] = []
    before(
        manager,
        lambda key: seen.append(lent_bytes(manager._saves._slabs)),
        when=lambda key: key.endswith(".safetensors"),
    )
    return seen


def lent_bytes(slabs: Slabs) -> int:
    with slabs._lock:
        return slabs._held_bytes - sum(slab.size_bytes for slab in slabs._idle)


@pytest.mark.parametrize("budget_bytes", [8 * KIB, 16 * KIB, 20 * KIB, 64 * KIB])
def test_a_state_of_any_size_passes_through_a_limited_memory(tmp_path: Path, budget_bytes: int) -> None:
    state = {
        "one larger than everything": torch.arange(100_000),
        **{f"w{number}": torch.full((3 * number,), float(number)) for number in range(30)},
    }
    expected = {name: tensor.clone() for name, tensor in state.items()}
    with CheckpointManager(tmp_path, options=tight(budget_bytes), save_rng=False) as manager:
        slow(manager, 0.001)
        seen = used_at_puts(manager)
        for step in range(2):
            handle = manager.async_save(step, state)
            for tensor in state.values():
                tensor.zero_()
            checkpoint = handle.result()
            assert checkpoint is not None
            found = cloudckpt.read(checkpoint.url)
            assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
            state = {name: tensor.clone() for name, tensor in expected.items()}
        assert len(seen) >= 190
        assert max(seen) <= budget_bytes
        assert manager._saves._slabs.held_bytes <= budget_bytes


def test_held_memory_stays_within_the_budget_whatever_becomes_of_the_structure(tmp_path: Path) -> None:
    rng = random.Random(5)
    budget_bytes = 256 * KIB
    with CheckpointManager(tmp_path, options=tight(budget_bytes, 64 * KIB), save_rng=False) as manager:
        held = []
        for step in range(60):
            dtype = rng.choice([torch.float32, torch.bfloat16, torch.bool, torch.int64])
            sizes = [rng.randint(0, rng.choice([10, 1000, 60_000])) for _ in range(rng.randint(1, 12))]
            state = {f"w{number}": torch.ones(size).to(dtype) for number, size in enumerate(sizes)}
            checkpoint = manager.async_save(step, state).result()
            assert checkpoint is not None
            found = cloudckpt.read(checkpoint.url)
            assert all(torch.equal(found[name], tensor) for name, tensor in state.items()), step
            held.append(manager._saves._slabs.held_bytes)
        assert max(held) <= budget_bytes
        assert lent_bytes(manager._saves._slabs) == 0


def test_shards_that_fill_no_page_hold_no_more_than_the_limit() -> None:
    slabs = Slabs()
    stage = Stage(slabs, [PAGE * 5 // 2] * 8, limit_bytes=20 * PAGE)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stage.run, lambda number, memory: [], threads=1)
        most = 0
        for number in range(8):
            stage.open(number)
            most = max(most, slabs.held_bytes)
            stage.release(number)
        running.result()
    assert most == 18 * PAGE


# -- slabs -------------------------------------------------------------------------------------------------


def test_a_slab_is_used_again_and_the_smallest_that_fits_is_taken() -> None:
    slabs = Slabs()
    large, small = (
        slabs.take(5 * PAGE, limit_bytes=100 * PAGE, most_bytes=100 * PAGE),
        slabs.take(PAGE, limit_bytes=100 * PAGE, most_bytes=100 * PAGE),
    )
    slabs.give(large)
    slabs.give(small)
    assert slabs.take(PAGE, limit_bytes=100 * PAGE, most_bytes=100 * PAGE) is small
    assert slabs.take(5 * PAGE, limit_bytes=100 * PAGE, most_bytes=100 * PAGE) is large
    assert slabs.held_bytes == 6 * PAGE


def test_idle_slabs_that_are_too_small_make_room_for_a_new_one() -> None:
    slabs = Slabs()
    lent = [slabs.take(PAGE, limit_bytes=4 * PAGE, most_bytes=4 * PAGE) for _ in range(4)]
    for slab in lent:
        slabs.give(slab)
    slabs.take(3 * PAGE, limit_bytes=4 * PAGE, most_bytes=4 * PAGE)
    assert slabs.held_bytes == 4 * PAGE


def test_who_waits_for_fewer_goes_on_when_memory_is_given_back_and_else_after_a_while() -> None:
    slabs = Slabs()
    lent = slabs.take(PAGE, limit_bytes=9 * PAGE, most_bytes=PAGE)
    assert not slabs.wait_for_fewer(1, timeout_s=0.001)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(slabs.wait_for_fewer, 1, timeout_s=PATIENCE_S)
        slabs.give(lent)
        assert waiting.result()


def wait_until_touched() -> None:
    for thread in threading.enumerate():
        if thread.name == "cloudckpt-touch":
            thread.join()


def test_memory_is_touched_ahead_once() -> None:
    slabs = Slabs()
    slabs.touch_ahead([4 * MIB, PAGE, 4 * MIB])
    wait_until_touched()
    assert slabs.held_bytes == 8 * MIB + PAGE
    slabs.touch_ahead([4 * MIB, 4 * MIB])
    wait_until_touched()
    assert slabs.held_bytes == 8 * MIB + PAGE
    assert bytes(slabs.take(4 * MIB, limit_bytes=8 * MIB, most_bytes=8 * MIB).memory[:64]) == bytes(64)


def test_a_save_interrupts_touching_and_what_was_not_touched_is_as_good() -> None:
    slabs = Slabs()
    slabs.touch_ahead([64 * MIB] * 4)
    stage = Stage(slabs, [64 * MIB], limit_bytes=64 * MIB)
    assert slabs.held_bytes < 4 * 64 * MIB
    assert not slabs._is_hurried.is_set()
    source = memoryview(bytearray(b"ab" * (32 * MIB)))
    stage.run(lambda number, memory: [Copy(memory, source)], threads=2)
    assert stage.open(0) == source
    stage.release(0)
    assert lent_bytes(slabs) == 0


def test_closing_ends_touching_and_lets_go_of_everything_once_it_is_given_back() -> None:
    slabs = Slabs()
    lent = slabs.take(PAGE, limit_bytes=PAGE, most_bytes=PAGE)
    slabs.touch_ahead([64 * MIB] * 8)
    slabs.close()
    assert slabs.held_bytes == PAGE
    slabs.give(lent)
    assert slabs.held_bytes == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "cloudckpt-touch"]


# -- a stage -----------------------------------------------------------------------------------------------


def fill(number: int, memory: memoryview) -> list[Copy]:
    """Fill a shard with its number."""
    memory[:] = bytes([number % 251]) * memory.nbytes
    return []


@pytest.mark.parametrize("limit_bytes", [1, PAGE, 3 * PAGE, 10 * PAGE, 1000 * PAGE])
def test_shards_pass_in_order_through_any_limit(limit_bytes: int) -> None:
    rng = random.Random(limit_bytes)
    sizes = [rng.choice([0, 1, 100, PAGE, 2 * PAGE]) for _ in range(100)]
    slabs = Slabs()
    stage = Stage(slabs, sizes, limit_bytes=limit_bytes)
    found = []

    def put() -> None:
        for number in range(len(sizes)):
            found.append(bytes(stage.open(number)))
            stage.release(number)

    with ThreadPoolExecutor(1) as pool:
        putting = pool.submit(put)
        stage.run(fill, threads=2)
        putting.result(PATIENCE_S)
    stage.close()
    assert found == [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    assert lent_bytes(slabs) == 0


def test_what_fails_while_it_is_staged_reaches_those_who_wait_and_gives_the_memory_back() -> None:
    slabs = Slabs()
    stage = Stage(slabs, [PAGE] * 4, limit_bytes=2 * PAGE)

    def plan(number: int, memory: memoryview) -> list[Copy]:
        if number == 3:
            raise ValueError("no bytes")
        return fill(number, memory)

    def put(number: int) -> bytes:
        try:
            return bytes(stage.open(number)[:1])
        finally:
            stage.release(number)

    with ThreadPoolExecutor(4) as pool:
        puts = [pool.submit(put, number) for number in range(4)]
        with pytest.raises(ValueError, match="no bytes"):
            stage.run(plan, threads=1)
        assert [put.result(PATIENCE_S) for put in puts[:2]] == [b"\x00", b"\x01"]
        with pytest.raises(CloudCkptError, match="could not be staged: ValueError"):
            puts[3].result(PATIENCE_S)
    stage.close()
    assert lent_bytes(slabs) == 0


def test_the_end_of_the_upload_ends_staging_that_waits_for_room() -> None:
    slabs = Slabs()
    stage = Stage(slabs, [PAGE] * 4, limit_bytes=2 * PAGE)
    with ThreadPoolExecutor(1) as pool:
        staging = pool.submit(stage.run, fill, threads=1)
        opened = stage.open(0)
        stage.close()
        with pytest.raises(StageClosedError):
            staging.result(PATIENCE_S)
        assert bytes(opened[:1]) == b"\x00"
        assert lent_bytes(slabs) == PAGE, "what is being put stays lent"
        with pytest.raises(CloudCkptError):
            stage.open(1)
        stage.release(0)
    assert lent_bytes(slabs) == 0


class SlowSet(set[int]):
    """A set to which one thread adds while others go on."""

    def __init__(self, adding: threading.Event) -> None:
        super().__init__()
        self._adding = adding

    def add(self, element: int) -> None:
        self._adding.set()
        threading.Event().wait(0.2)
        super().add(element)


def test_the_end_of_staging_takes_nothing_away_from_who_opens_a_shard_just_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slabs = Slabs()
    stage = Stage(slabs, [PAGE], limit_bytes=PAGE)
    adding = threading.Event()
    stage._opened = SlowSet(adding)
    publish = stage._publish

    def publish_and_go_on_in_the_middle(wave: Sequence[int]) -> None:
        publish(wave)
        assert adding.wait(PATIENCE_S)

    monkeypatch.setattr(stage, "_publish", publish_and_go_on_in_the_middle)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(stage.open, 0)
        stage.run(fill, threads=1)
        assert opening.result(PATIENCE_S).nbytes == PAGE
    assert lent_bytes(slabs) == PAGE


@pytest.mark.parametrize("threads", [1, 3])
def test_all_bytes_are_copied_by_any_number_of_threads(threads: int) -> None:
    rng = random.Random(threads)
    sources = [memoryview(bytearray(rng.randbytes(size))) for size in (0, 1, 7 * MIB + 13, 4 * MIB, 9 * MIB)]
    targets = [memoryview(bytearray(source.nbytes)) for source in sources]
    copy_all([Copy(target, source) for target, source in zip(targets, sources, strict=True)], threads=threads)
    assert targets == sources


def test_a_shard_that_is_put_slowly_keeps_its_slab_after_the_save_was_given_up(tmp_path: Path) -> None:
    options = Options(finish_timeout_s=0.2)
    manager = CheckpointManager(tmp_path, options=options)
    with Gate(manager) as gate:
        manager.async_save(1, {"w": torch.ones(1000)})
        gate.await_request()
        with pytest.raises(cloudckpt.SaveFailedError, match=r"abandoned after 0.2 s; nothing was committed"):
            manager.close()
        assert manager._saves._slabs.held_bytes > 0
    wait_for(lambda: manager._saves._slabs.held_bytes == 0)
