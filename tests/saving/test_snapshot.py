"""A snapshot of what lies on devices has arrived, whole, when it is said to be taken."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, Options
from cloudckpt.options import MIB
from cloudckpt.saving.snapshot import Staged, take_snapshot


class Recorded:
    """CUDA's streams, as far as a snapshot uses them: what was asked of which, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[object, ...]] = []
        self.current: dict[torch.device, object] = {}
        recorded = self

        class Stream:
            def __init__(self, device: torch.device) -> None:
                self.device = device

            def wait_stream(self, other: object) -> None:
                recorded.log.append(("waits for", self.device, other))

            def synchronize(self) -> None:
                recorded.log.append(("arrived", self.device))

        @contextmanager
        def entered(stream: Stream) -> Any:
            before = recorded.current.get(stream.device)
            recorded.current[stream.device] = stream
            yield
            recorded.current[stream.device] = before

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", entered)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the training's on {device}")


def test_each_device_copies_in_a_stream_of_its_own_which_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Recorded(monkeypatch)
    devices = torch.device("cuda:0"), torch.device("cuda:1")

    def run(plan: Any, *, settle: Any, threads: int) -> None:
        plan(0, memoryview(b""))
        cuda.log.append(("staged",))
        settle()

    class Shards:
        def __getitem__(self, number: int) -> Any:
            cuda.log.append(("copies in", *[type(cuda.current[device]).__name__ for device in devices]))
            return SimpleNamespace(pieces=())

    staged: Any = Staged(SimpleNamespace(run=run), 0, True, devices)  # type: ignore[arg-type]
    take_snapshot(staged, SimpleNamespace(shards=Shards()))  # type: ignore[arg-type]

    assert cuda.log == [
        ("waits for", devices[0], "the training's on cuda:0"),
        ("waits for", devices[1], "the training's on cuda:1"),
        ("copies in", "Stream", "Stream"),
        ("staged",),
        ("arrived", devices[0]),
        ("arrived", devices[1]),
    ]


def views_of(device: str) -> dict[str, torch.Tensor]:
    """Return large tensors of every kind that a copy has to work at: strided, conjugated, negated."""
    real = torch.arange(3_000_000, dtype=torch.float32, device=device).reshape(1000, 3000)
    complex_ = torch.complex(real, real + 1)
    return {
        "dense": real,
        "strided": real.t(),
        "conjugated": complex_.conj(),
        "negated": torch._neg_view(real),
        "imaginary": complex_.conj().imag,
    }


def check(root: Path, state: dict[str, torch.Tensor]) -> None:
    expected = {name: tensor.cpu().resolve_conj().resolve_neg().clone() for name, tensor in state.items()}
    with CheckpointManager(root) as manager:
        handle = manager.async_save(1, dict(state))
        for name, tensor in state.items():
            if name.endswith("dense"):
                tensor.zero_()  # training goes on
        saved = handle.result()
    assert saved is not None
    found = cloudckpt.read(saved.url)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name  # type: ignore[arg-type]


def test_a_snapshot_of_host_tensors_has_their_signs(tmp_path: Path) -> None:
    check(tmp_path, views_of("cpu"))


@pytest.mark.parametrize(("budget_bytes", "advice"), [(8 * MIB, "raise memory_budget_bytes"), (None, "3 ranks")])
def test_a_state_that_goes_in_waves_is_told_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    budget_bytes: int | None,
    advice: str,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr("cloudckpt.saving.snapshot.free_bytes", lambda: 0)
    monkeypatch.setattr("cloudckpt.options._TRANSFER_BYTES", 8 * MIB)
    options = Options(shard_bytes=4 * MIB, block_bytes=MIB, span_bytes=MIB, memory_budget_bytes=budget_bytes)
    small, large = {"w": torch.zeros(MIB)}, {"w": torch.zeros(5 * MIB)}
    with CheckpointManager(tmp_path, options=options) as manager, caplog.at_level(logging.WARNING, "cloudckpt"):
        manager.async_save(1, small)
        assert caplog.messages == []
        for step in (2, 3):
            manager.async_save(step, large)
    (told,) = caplog.messages
    assert told.startswith("rank 0: 20 MiB are to be saved and there is room for copies of 8 MiB")
    assert advice in told


@pytest.mark.gpu
def test_a_snapshot_of_a_device_has_the_signs_of_its_tensors(tmp_path: Path) -> None:
    check(tmp_path, views_of("cuda:0"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_snapshot_of_two_devices_has_the_bytes_of_both(tmp_path: Path) -> None:
    both = {f"{device}.{name}": tensor for device in ("cuda:0", "cuda:1") for name, tensor in views_of(device).items()}
    torch.cuda.set_device(0)
    check(tmp_path, both)
