"""A restored run draws the random numbers that the saved one would have drawn."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import cloudckpt
from cloudckpt import CheckpointManager, PerRank
from cloudckpt.errors import ManifestError
from cloudckpt.format import codec
from cloudckpt.root import Fit
from cloudckpt.state.rng import RandomState, RandomStateEntry, capture_rng, restore_rng
from tests.ranks.processes import run


def draw() -> list[object]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),  # noqa: NPY002
        np.random.normal(),  # noqa: NPY002
        torch.rand(3).tolist(),
        torch.randn(()).item(),
    ]


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    seed(1)
    draw()  # odd places: gauss and normal keep a second number for later
    states = capture_rng()
    expected = [draw() for _ in range(3)]
    seed(2)

    restore_rng(states)

    assert [draw() for _ in range(3)] == expected


def test_capturing_draws_nothing() -> None:
    seed(3)
    expected = draw()
    seed(3)
    capture_rng()
    assert draw() == expected


def test_states_survive_the_codec() -> None:
    seed(4)
    states = codec.decode(codec.encode(capture_rng(), key="rng"), key="rng")
    expected = draw()
    seed(5)
    assert isinstance(states, dict)

    restore_rng(states)

    assert draw() == expected


def test_numpy_s_generator_counts_only_if_the_program_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "numpy" in capture_rng()
    monkeypatch.delitem(sys.modules, "numpy.random")
    assert set(capture_rng()) == {"python", "torch"}


def test_a_generator_that_was_not_saved_keeps_its_own_state() -> None:
    seed(6)
    states = capture_rng()
    del states["numpy"]
    expected = draw()
    seed(7)
    numpy_expected = np.random.rand(3).tolist()  # noqa: NPY002
    seed(7)

    restore_rng(states)

    found = draw()
    assert found[0:2] + found[4:6] == expected[0:2] + expected[4:6]
    assert found[2] == numpy_expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_states_of_devices_that_are_not_here_are_left_out_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    states = capture_rng()
    assert "cuda" not in states
    states["cuda"] = [torch.get_rng_state(), torch.get_rng_state()]
    with caplog.at_level(logging.WARNING, logger="cloudckpt"):
        restore_rng(states)
    assert "2 cuda devices; 0 are here" in caplog.text


@pytest.mark.gpu
def test_a_gpu_s_generator_goes_on_where_it_was() -> None:
    torch.rand(1, device="cuda")
    states = capture_rng()
    expected = torch.rand(5, device="cuda").tolist()
    torch.cuda.manual_seed_all(8)
    restore_rng(states)
    assert torch.rand(5, device="cuda").tolist() == expected


@pytest.mark.gpu
def test_a_gpu_s_generator_goes_on_through_a_checkpoint(tmp_path: Path) -> None:
    torch.rand(1, device="cuda")
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"step": 1})
        expected = torch.rand(5, device="cuda").tolist()
        torch.cuda.manual_seed_all(8)
        manager.restore({"step": 0})
    assert torch.rand(5, device="cuda").tolist() == expected


def test_generators_that_are_no_json_are_an_integrity_error() -> None:
    with pytest.raises(ManifestError, match="is no JSON"):
        RandomStateEntry.beside().load_own({"cloudckpt.rng": torch.zeros(4, dtype=torch.uint8)})


def test_all_generators_go_on_through_a_checkpoint(tmp_path: Path) -> None:
    seed(11)
    draw()
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"step": 1})
        expected = [draw() for _ in range(2)]
        seed(12)
        manager.restore({"step": 0})
    assert [draw() for _ in range(2)] == expected


def test_a_checkpoint_without_generators_is_said_to_have_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointManager(tmp_path, save_rng=False, progress="off") as manager:
        manager.save(1, {"step": 1})
    state = {"step": 0}
    with CheckpointManager(tmp_path, progress="off") as manager:
        manager.restore(state)
    assert state == {"step": 1}
    assert "the checkpoint holds no random number generator state" in caplog.text


# -- an object of the state ---------------------------------------------------------------------------------


class Drawer:
    """An object that draws numbers whenever it is asked for its state, and when it gets one."""

    def state_dict(self) -> dict[str, Any]:
        draw()
        return {"x": 1}

    def load_state_dict(self, _: dict[str, Any]) -> None:
        draw()


def test_generators_in_the_state_go_on_after_all_else_was_restored(tmp_path: Path) -> None:
    seed(21)
    state = {"rng": RandomState(), "drawer": Drawer(), "last": PerRank(Drawer())}
    cloudckpt.save(state, tmp_path / "c", progress="off")
    expected = [draw() for _ in range(2)]
    seed(22)
    found = cloudckpt.load(state, tmp_path / "c", progress="off")
    assert [draw() for _ in range(2)] == expected
    assert found.fit == Fit()


def test_what_was_restored_is_applied_once_more_when_the_framework_is_ready(tmp_path: Path) -> None:
    seed(23)
    cloudckpt.save({"rng": RandomState()}, tmp_path / "c", progress="off")
    expected = draw()
    rng = RandomState()
    assert not rng.apply()
    assert draw() != expected
    cloudckpt.load({"rng": rng}, tmp_path / "c", progress="off")
    draw()  # as batches are skipped
    assert rng.apply()
    assert draw() == expected
    assert not rng.apply()
    assert draw() != expected


@pytest.mark.parametrize("there", [True, False], ids=["object-there", "manager-there"])
def test_a_manager_and_an_object_of_the_state_are_one_and_the_same(tmp_path: Path, there: bool) -> None:
    seed(24)
    with CheckpointManager(tmp_path, progress="off", save_rng=not there) as manager:
        saved = manager.save(1, {"step": 1} | ({"rng": RandomState()} if there else {}))
        expected = draw()
        assert saved is not None
        assert list(cloudckpt.read(saved.url, "cloudckpt.rng*", progress="off")) == ["cloudckpt.rng.r00000"]
    seed(25)
    with CheckpointManager(tmp_path, progress="off", save_rng=there) as manager:
        manager.restore({"step": 0} | ({} if there else {"rng": RandomState()}))
    assert draw() == expected


def test_generators_alone_are_restored_by_their_name(tmp_path: Path) -> None:
    seed(26)
    cloudckpt.save({"rng": RandomState(), "step": 1}, tmp_path / "c", progress="off")
    expected = draw()
    state: dict[str, Any] = {"rng": RandomState(), "step": 0}
    cloudckpt.load(state, tmp_path / "c", only="rng", progress="off")
    assert (draw(), state["step"]) == (expected, 0)


def test_a_checkpoint_that_lacks_the_generators_of_the_state_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    cloudckpt.save({"step": 1}, tmp_path / "c", progress="off")
    cloudckpt.save({"step": 1, "rng": 5}, tmp_path / "d", progress="off")
    state: dict[str, Any] = {"rng": RandomState(), "step": 0}
    with pytest.raises(cloudckpt.StateMismatchError, match="in the state and not in the checkpoint: rng"):
        cloudckpt.load(state, tmp_path / "c", progress="off")
    with pytest.raises(cloudckpt.StateMismatchError, match="rng is a RandomState here and something else there"):
        cloudckpt.load(state, tmp_path / "d", progress="off")
    assert state["step"] == 0


def test_two_objects_for_one_process_s_generators_are_refused(tmp_path: Path) -> None:
    with pytest.raises(cloudckpt.OptionsError, match=r"a and b\.c are both a RandomState"):
        cloudckpt.save({"a": RandomState(), "b": {"c": RandomState()}}, tmp_path / "c", progress="off")


def _save_drawn(url: str) -> object:
    seed(dist.get_rank() + 30)
    cloudckpt.save({"rng": RandomState()}, url, progress="off")
    return draw()


def _load_drawn(url: str) -> object:
    seed(dist.get_rank() + 40)
    found = cloudckpt.load({"rng": RandomState(), "x": None}, url, progress="off", strict=False)
    assert found.fit is not None
    return draw(), found.fit.missing


def test_each_rank_has_its_own_and_one_more_keeps_what_it_has_and_is_named(tmp_path: Path) -> None:
    there = run(2, _save_drawn, f"file://{tmp_path}/c")
    here = run(3, _load_drawn, f"file://{tmp_path}/c")
    assert there[0] != there[1]
    assert [drawn for drawn, _ in here[:2]] == there
    assert [missing for _, missing in here] == [("x",), ("x",), ("x", "rng")]


def test_a_generator_of_the_state_that_has_spawned_draws_on_and_spawns_on_where_it_is_held(tmp_path: Path) -> None:
    saved = np.random.default_rng(1)
    saved.spawn(2)
    saved.random(3)
    legacy = np.random.RandomState(np.random.PCG64(1))
    legacy.standard_normal(3)
    cloudckpt.save({"g": [saved, legacy]}, tmp_path / "c", progress="off")
    held: list[Any] = [np.random.Generator(np.random.Philox(2)), np.random.RandomState(2)]
    state: dict[str, Any] = {"g": list(held)}
    cloudckpt.load(state, tmp_path / "c", progress="off")
    assert [live is there for live, there in zip(held, state["g"], strict=True)] == [True, True]
    assert held[0].random() == saved.random()
    assert held[0].spawn(1)[0].random() == saved.spawn(1)[0].random()
    assert held[1].standard_normal() == legacy.standard_normal()


@pytest.mark.parametrize(("number", "spawned"), [(6, 0), (5, 3)])
def test_a_generator_of_another_seed_or_past_spawns_the_children_that_were_to_come(
    tmp_path: Path, number: int, spawned: int
) -> None:
    saved, live = np.random.default_rng(5), np.random.default_rng(number)
    live.spawn(spawned)
    source = live.bit_generator
    cloudckpt.save({"g": saved}, tmp_path / "c", progress="off")
    cloudckpt.load({"g": live}, tmp_path / "c", progress="off")
    assert live.spawn(1)[0].random() == saved.spawn(1)[0].random()
    assert live.random() == saved.random()
    assert live.bit_generator is source  # whoever else draws from it goes on, too


@pytest.fixture
def usual() -> Iterator[None]:
    """Give numpy its own global generator back."""
    generators: Any = np.random
    before = generators.get_bit_generator()
    yield
    generators.set_bit_generator(before)


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize(("there", "here"), [("PCG64", "MT19937"), ("MT19937", "PCG64"), ("Philox", "SFC64")])
def test_numpy_s_generator_goes_on_whatever_its_bit_generator_is_now(tmp_path: Path, there: str, here: str) -> None:
    generators: Any = np.random
    generators.set_bit_generator(getattr(np.random, there)(1))
    np.random.normal()  # noqa: NPY002
    with CheckpointManager(tmp_path, progress="off") as manager:
        manager.save(0, {"x": 1})
    expected = draw()
    generators.set_bit_generator(getattr(np.random, here)(2))
    with CheckpointManager(tmp_path, progress="off") as manager:
        manager.restore({"x": 0})
    assert draw() == expected


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("state", [{"bit_generator": "Newer64"}, ("MT19937", [1], 0, 0, 0.0), None])
def test_a_generator_that_does_not_take_its_state_keeps_its_own_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture, state: object
) -> None:
    states = capture_rng()
    expected = draw()
    with caplog.at_level(logging.WARNING, logger="cloudckpt"):
        restore_rng({**states, "numpy": state})
    found = draw()
    assert found[:2] + found[4:] == expected[:2] + expected[4:]
    assert "the generator of numpy keeps its own state" in caplog.text
