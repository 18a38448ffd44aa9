"""Many tensors that stand in a state side by side are saved and restored together, each as if it were alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

import cloudckpt
from cloudckpt import OptionsError, StateMismatchError
from cloudckpt.format import DTYPES
from cloudckpt.format.boxes import Box, BoxTable
from cloudckpt.saving.holding import Holding

_SMALL = {"shard_bytes": 4096, "block_bytes": 64, "span_bytes": 512}
_SHAPES: list[tuple[int, ...]] = [(), (0,), (3,), (2, 5), (7, 0, 2), (33, 9), (1, 1)]


def _filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return a tensor of any bytes; of booleans, of such as there are."""
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def _bits(tensor: torch.Tensor) -> bytes:
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(dense.reshape(-1).view(torch.uint8).tolist()) if dense.numel() else b""


def _tensors() -> dict[str, torch.Tensor]:
    return {
        f"{name}.{place}": _filled(dtype, shape, seed=7 * place + len(name))
        for place, shape in enumerate(_SHAPES)
        for name, dtype in DTYPES.items()
    }


@pytest.mark.parametrize("options", [{}, _SMALL], ids=["usual", "cut small"])
def test_small_tensors_of_every_dtype_and_shape_come_back_where_they_stand(
    options: dict[str, Any], tmp_path: Path
) -> None:
    saved = _tensors()
    cloudckpt.save(dict(saved), tmp_path / "c", options=options)
    state = {
        name: torch.zeros(tensor.nbytes, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)
        for name, tensor in saved.items()
    }
    places = {name: tensor.data_ptr() for name, tensor in state.items()}

    cloudckpt.load(state, tmp_path / "c", options=options)

    assert {name: _bits(tensor) for name, tensor in state.items()} == {name: _bits(one) for name, one in saved.items()}
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == places


def test_what_is_not_simply_dense_stands_among_what_is(tmp_path: Path) -> None:
    def state(fill: float) -> dict[str, Any]:
        base = torch.full((6, 4), fill)
        return {
            "a": base,
            "a again": base,
            "row": base[1],
            "turned": torch.arange(12.0).reshape(3, 4).t() * fill,
            "conj": (torch.arange(4.0) * fill).to(torch.complex64).conj(),
            "parameter": torch.nn.Parameter(torch.full((2,), fill)),
            "value": fill,
            "inference": torch.inference_mode()(lambda: torch.full((3,), fill))(),
            "b": torch.full((5,), fill),
        }

    saved, live = state(3.0), state(0.0)
    cloudckpt.save(dict(saved), tmp_path / "c")

    cloudckpt.load(live, tmp_path / "c")

    tensors = {name: one for name, one in saved.items() if isinstance(one, torch.Tensor)}
    assert {name: _bits(live[name]) for name in tensors} == {name: _bits(one) for name, one in tensors.items()}
    assert live["value"] == 3.0
    assert live["parameter"].requires_grad
    assert live["a"] is live["a again"]


def test_of_many_tensors_the_one_that_does_not_fit_is_told_and_none_is_changed(tmp_path: Path) -> None:
    cloudckpt.save({f"t{place}": torch.ones(3) for place in range(50)}, tmp_path / "c")
    state = {f"t{place}": torch.zeros(3 + (place == 17)) for place in range(50)}

    with pytest.raises(StateMismatchError) as caught:
        cloudckpt.load(dict(state), tmp_path / "c")

    assert caught.value.mismatched == {"t17": ((4,), (3,))}
    assert not any(tensor.any() for tensor in state.values())


def test_one_of_many_tensors_is_restored_by_its_name_and_the_others_stay(tmp_path: Path) -> None:
    cloudckpt.save({f"t{place}": torch.ones(3) for place in range(5)}, tmp_path / "c")
    state = {f"t{place}": torch.zeros(3) for place in range(5)}

    cloudckpt.load(state, tmp_path / "c", only="t3")

    assert [int(tensor.sum()) for tensor in state.values()] == [0, 0, 0, 3, 0]


def test_dcps_planners_are_not_asked_for_tensors_that_are_simply_dense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []

    def noting(planner: DefaultSavePlanner | DefaultLoadPlanner) -> Any:
        asked.append(len(planner.state_dict))
        return own[type(planner).__mro__[-3]](planner)  # type: ignore[index]

    own = {kind.__mro__[-3]: kind.create_local_plan for kind in (DefaultSavePlanner, DefaultLoadPlanner)}
    for kind in (DefaultSavePlanner, DefaultLoadPlanner):
        monkeypatch.setattr(kind, "create_local_plan", noting)
    state = {f"t{place}": torch.ones(3) for place in range(5)}
    cloudckpt.save(dict(state), tmp_path / "c")

    cloudckpt.load(state, tmp_path / "c")

    assert sum(asked) == 0


def test_boxes_are_whole_where_each_tensor_has_one_that_is_all_of_it() -> None:
    whole = [Box("a", "float32", (2, 3), (0, 0), (2, 3)), Box("b", "uint8", (), (), ())]

    assert BoxTable.of(whole).is_whole()
    assert not BoxTable.of([whole[0]._replace(sizes=(1, 3)), whole[1]]).is_whole()
    assert not BoxTable.of([whole[0]._replace(offsets=(1, 0), sizes=(1, 3)), whole[1]]).is_whole()
    assert not BoxTable.of([*whole, whole[0]]).is_whole()


@pytest.mark.parametrize("now", [torch.ones(1), torch.ones(8).double()], ids=["shape", "dtype"])
def test_a_tensor_that_became_another_after_it_was_looked_at_is_refused(now: torch.Tensor) -> None:
    tensor = torch.ones(8)
    holding = Holding.of({"a": tensor})
    assert holding.tensor(0) is tensor
    tensor.data = now
    with pytest.raises(OptionsError, match="tensor 'a' was float32"):
        holding.tensor(0)
