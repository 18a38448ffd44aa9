"""A restored run draws the random numbers that the saved one would have drawn."""

from __future__ import annotations

import logging
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cloudckpt import CheckpointManager
from cloudckpt.errors import ManifestError
from cloudckpt.format import codec
from cloudckpt.format.builder import IndexBuilder
from cloudckpt.format.index import Index
from cloudckpt.state.rng import apply_rng, capture_rng, restore_rng


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
        apply_rng(
            Index(*IndexBuilder(attempt="0" * 16, block_bytes=4096).finish({}, {}), key="index.bin"),
            {"x": torch.zeros(4, dtype=torch.uint8)},
        )


def test_all_generators_go_on_through_a_checkpoint(tmp_path: Path) -> None:
    seed(11)
    draw()
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"step": 1})
        expected = [draw() for _ in range(2)]
        seed(12)
        manager.restore({"step": 0})
    assert [draw() for _ in range(2)] == expected
