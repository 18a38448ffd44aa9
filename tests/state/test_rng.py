"""A restored run draws the random numbers that the saved one would have drawn."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager
from cloudckpt.errors import ManifestError
from cloudckpt.format import codec
from cloudckpt.state.rng import Generators, capture_rng, restore_rng


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
        Generators(3).apply({"cloudckpt.rng.r00003": torch.zeros(4, dtype=torch.uint8)})


def test_all_generators_go_on_through_a_checkpoint(tmp_path: Path) -> None:
    seed(11)
    draw()
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"step": 1})
        expected = [draw() for _ in range(2)]
        seed(12)
        manager.restore({"step": 0})
    assert [draw() for _ in range(2)] == expected


def test_a_rank_beyond_those_that_saved_is_told_what_is_true(caplog: pytest.LogCaptureFixture) -> None:
    saved = SimpleNamespace(tensors={f"cloudckpt.rng.r{rank:05d}": object() for rank in range(4)})
    generators = Generators(5)
    assert generators.targets(saved) == {}  # type: ignore[arg-type]
    generators.apply({})
    assert "rank 5: the checkpoint holds random number generators of 4 ranks and none of this one" in caplog.text


def test_a_checkpoint_without_generators_is_said_to_have_none(caplog: pytest.LogCaptureFixture) -> None:
    generators = Generators(0)
    assert generators.targets(SimpleNamespace(tensors={})) == {}  # type: ignore[arg-type]
    generators.apply({})
    assert "the checkpoint holds no random number generator state" in caplog.text


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
