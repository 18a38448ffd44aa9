"""Two checkpoints are called equal if, and only if, a restore of either gives the same; each difference is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cloudckpt
from cloudckpt import Difference, IntegrityError, Options, OptionsError
from cloudckpt.copying.comparing import Sums
from cloudckpt.options import KIB
from tests.copying.roots import OPTIONS, prefix_of, shards_of, state_of
from tests.effort import examples

OTHER_LAYOUT = Options(shard_bytes=5 * KIB, block_bytes=KIB, span_bytes=2 * KIB, memory_budget_bytes=64 * KIB)
DTYPES = [
    *(torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint32),
]


def difference(tmp_path: Path, a: dict[str, Any], b: dict[str, Any], **more: Any) -> Difference:
    """Save two states, each in a layout of its own where `other` says so, and compare them."""
    other = more.pop("other", OPTIONS)
    cloudckpt.save(a, tmp_path / "a", options=OPTIONS, progress="off")
    cloudckpt.save(b, tmp_path / "b", options=other, progress="off")
    return cloudckpt.diff(tmp_path / "a", tmp_path / "b", **more)


def test_a_checkpoint_and_its_copy_are_equal_and_no_byte_is_read(made: Path, tmp_path: Path) -> None:
    cloudckpt.copy(made, tmp_path / "to", options=OPTIONS)
    found = cloudckpt.diff(made, tmp_path / "to")
    assert found.is_equal
    assert (found.read_bytes, found.metrics, found.environment) == (0, {}, {})


def test_of_two_steps_of_a_job_little_more_is_read_than_has_changed(made: Path) -> None:
    found = cloudckpt.diff(made / prefix_of(1), made / prefix_of(3))
    changed = {one.name: one for one in found.changed}
    assert sorted(changed) == ["changing", "half"]
    assert (changed["changing"].count, changed["changing"].largest) == (3, 2.0)
    assert changed["half"].count == 700
    assert found.values == {"note": ("step 1", "step 3")}
    assert found.metrics == {"loss": (1.0, 1 / 3)}
    # Of each shard the block with the header, which names the attempt; and the blocks that hold what has changed.
    assert found.read_bytes < 2 * sum(path.stat().st_size for path in shards_of(made / prefix_of(3))) * 0.6
    assert not found.is_equal


@pytest.mark.parametrize("other", [OPTIONS, OTHER_LAYOUT])
def test_layouts_do_not_matter(tmp_path: Path, other: Options) -> None:
    assert difference(tmp_path, state_of(1), state_of(1), other=other).is_equal


@pytest.mark.parametrize("other", [OPTIONS, OTHER_LAYOUT])
def test_changed_tensors_stand_in_the_order_of_their_largest_difference(tmp_path: Path, other: Options) -> None:
    a = {name: torch.arange(3_000.0).view(30, 100) for name in ("small", "large", "same", "scalar")}
    b = {name: tensor.clone() for name, tensor in a.items()}
    a["scalar"], b["scalar"] = torch.tensor(4.0), torch.tensor(4.5)
    b["small"][2, 3] += 0.25
    b["large"][29, 99] -= 1_000
    b["large"][0, 0] = math.nan
    found = difference(tmp_path, a, b, other=other)
    assert [one.name for one in found.changed] == ["large", "scalar", "small"]
    largest = found.changed[0]
    assert (largest.count, largest.largest, largest.nan_counts) == (2, 1_000.0, (0, 1))
    assert largest.largest_relative == pytest.approx(1_000 / 2_999)
    assert largest.shape == (30, 100)
    assert found.changed[2].largest_relative == pytest.approx(0.25 / 203.25)


def test_names_shapes_dtypes_kinds_and_places_are_told(tmp_path: Path) -> None:
    a = {"m": {"only a": torch.ones(2), "shape": torch.ones(2, 3), "dtype": torch.ones(4), "kind": 1, "l": [1, 2]}}
    b = {"m": {"only b": 3, "shape": torch.ones(3, 2), "dtype": torch.ones(4).half(), "kind": torch.ones(1)}}
    b["m"]["l"] = (1, 2)  # type: ignore[assignment]
    found = difference(tmp_path, a, b)
    assert (found.only_a, found.only_b) == (("m.only a",), ("m.only b",))
    assert found.shapes == {"m.shape": ((2, 3), (3, 2))}
    assert found.dtypes == {"m.dtype": ("float32", "float16")}
    assert found.kinds == ("m.kind",)
    assert list(found.values) == ["m.l"]
    assert found.changed == (), "the numbers are the same"
    assert not found.is_equal


def test_another_container_is_another_place(tmp_path: Path) -> None:
    found = difference(tmp_path, {"m": [torch.ones(1)]}, {"m": (torch.ones(1),)})
    assert found.paths == ("m.0",)
    assert not found.is_equal


def test_a_large_value_that_differs_is_told_as_the_value(tmp_path: Path) -> None:
    one = b"x" * (300 << 10)
    found = difference(tmp_path, {"blob": one, "n": 1}, {"blob": one[:-1] + b"y", "n": 1})
    assert list(found.values) == ["blob"]
    assert found.changed == ()


def test_true_is_not_one_and_one_is_no_float(tmp_path: Path) -> None:
    found = difference(tmp_path, {"a": True, "b": 1, "c": 1}, {"a": 1, "b": 1.0, "c": 1})
    assert list(found.values) == ["a", "b"]


def test_what_the_library_keeps_in_bytes_is_no_number(tmp_path: Path) -> None:
    state = {"w": torch.ones(3)}
    roots = []
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        with cloudckpt.CheckpointManager(tmp_path / name, progress="off") as manager:
            manager.save(1, dict(state))
        roots.append(tmp_path / name)
    found = cloudckpt.diff(*roots, tolerance=1e9)
    assert [(one.name, one.largest) for one in found.changed] == [("cloudckpt.rng.r00000", None)]


def test_damage_is_not_taken_for_a_difference(root: Path) -> None:
    path = shards_of(root / prefix_of(3))[0]
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        cloudckpt.diff(root / prefix_of(1), root)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan])
def test_a_tolerance_is_a_number_from_0(made: Path, tolerance: float) -> None:
    with pytest.raises(OptionsError, match="tolerance is"):
        cloudckpt.diff(made, made, tolerance=tolerance)


# -- elements ------------------------------------------------------------------------------------------------------


def summed(a: torch.Tensor, b: torch.Tensor, tolerance: float | None = None) -> Sums:
    sums = Sums()
    sums.add(a, b, tolerance=tolerance)
    return sums


@pytest.mark.parametrize(
    ("a", "b", "tolerance", "expected"),
    [
        ([0.0], [-0.0], None, Sums(count=1)),
        ([0.0], [-0.0], 0.0, Sums()),
        ([math.nan], [1.0], None, Sums(count=1, nan_a=1)),
        ([1.0], [math.nan], 1e9, Sums(count=1, nan_b=1)),
        ([math.nan], [math.nan], None, Sums()),
        ([math.inf], [-math.inf], 1e9, Sums(count=1, largest=math.inf, largest_relative=1.0)),
        ([math.inf], [math.inf], None, Sums()),
        ([1.0, 2.0], [1.5, 2.0], 0.5, Sums()),
        ([1.0, 2.0], [1.5, 4.0], 0.5, Sums(count=1, largest=2.0, largest_relative=0.5)),
        ([-1.0], [1.0], None, Sums(count=1, largest=2.0, largest_relative=2.0)),
        ([0.0], [4.0], None, Sums(count=1, largest=4.0, largest_relative=1.0)),
    ],
)
def test_elements_differ_by_bits_or_beyond_the_tolerance(
    a: list[float], b: list[float], tolerance: float | None, expected: Sums
) -> None:
    assert summed(torch.tensor(a), torch.tensor(b), tolerance) == expected


def test_two_nans_of_other_bits_differ_only_without_a_tolerance() -> None:
    a, b = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32).split(1)
    assert summed(a, b) == Sums(count=1, nan_a=1, nan_b=1)
    assert summed(a, b, 0.0) == Sums()


@pytest.mark.parametrize(
    ("a", "b"), [(2**62, 2**62 + 1), (2**60, 2**60 + 100), (-(2**63), -(2**63) + 7), (-1, 2**61), (-(2**63), 2**63 - 1)]
)
def test_whole_numbers_are_as_far_apart_as_they_are(a: int, b: int) -> None:
    one, other, apart = torch.tensor([a]), torch.tensor([b]), abs(b - a)
    assert summed(one, other).largest == summed(other, one).largest == float(apart)
    for tolerance in (0.0, 1.0, 99.0, 100.0, float(2**61), float(2**64)):
        assert summed(one, other, tolerance).count == summed(other, one, tolerance).count == (apart > tolerance)


def test_whole_numbers_without_a_sign_and_floats_are_compared_to_the_last_bit() -> None:
    large, near = (torch.tensor([one], dtype=torch.uint64) for one in (2**64 - 1, 2**64 - 900))
    assert summed(large, near, 2.0) == Sums(count=1, largest=899.0, largest_relative=899 / 2**64)
    assert summed(large, near, 899.0) == Sums()
    assert summed(torch.tensor([2**53 + 1]), torch.tensor([2.0**53], dtype=torch.float64), 0.5).largest == 1.0
    assert summed(torch.tensor([-1]), torch.tensor([-1.0 - 2**-52], dtype=torch.float64)).largest == 2**-52
    wide, tiny = torch.tensor([1e16], dtype=torch.float64), torch.tensor([-0.25], dtype=torch.float64)
    assert (summed(wide, tiny, 1e16).count, summed(wide, -tiny, 1e16).count) == (1, 0)


_INF, _NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (complex(_INF, 1), complex(_INF, 1e9), Sums(count=1, largest=1e9 - 1)),
        (complex(_NAN, 1), complex(_NAN, 1e9), Sums(count=1, nan_a=1, nan_b=1)),
        (complex(_INF, _NAN), complex(1, _NAN), Sums(count=1, nan_a=1, nan_b=1)),
        (complex(1, _INF), complex(1, -_INF), Sums(count=1, largest=_INF, largest_relative=1.0)),
        (complex(_NAN, 1), complex(1, _NAN), Sums(count=1, nan_a=1, nan_b=1)),
        (complex(_NAN, _INF), complex(_NAN, _INF), Sums()),
        (complex(3, 4), complex(0, 0), Sums(count=1, largest=5.0, largest_relative=1.0)),
        (complex(_INF, 4), complex(_INF, 4.25), Sums()),
    ],
)
def test_complex_numbers_are_like_where_their_parts_are(a: complex, b: complex, expected: Sums) -> None:
    one, other = (torch.tensor([side], dtype=torch.complex128) for side in (a, b))
    assert summed(one, other, 0.5) == expected


@pytest.mark.parametrize("other", [1.0, -_INF, _NAN])
def test_no_tolerance_takes_an_infinity_for_another_number(other: float) -> None:
    assert summed(torch.tensor([_INF]), torch.tensor([other]), _INF).count == 1
    assert summed(torch.tensor([_INF]), torch.tensor([_INF]), 0.0).count == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_dtype_is_compared_with_itself_and_with_float32(dtype: torch.dtype) -> None:
    a = torch.tensor([1, 0, 1, 1]).to(torch.float32).to(dtype)
    b = torch.tensor([1, 1, 1, 0]).to(torch.float32).to(dtype)
    assert summed(a, b) == Sums(count=2, largest=1.0, largest_relative=1.0)
    assert summed(a, a.clone()) == Sums()
    assert summed(a, torch.tensor([1.0, 0.0, 1.0, 1.0])) == Sums()
    assert summed(a, torch.tensor([1.0, 0.0, 1.0, 0.0])).count == 1


def test_what_torch_can_only_move_is_compared_by_bits() -> None:
    dtype = getattr(torch, "float4_e2m1fn_x2", None)
    if dtype is None:
        pytest.skip("this torch has no float4")
    a, b = torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor([1, 9, 3], dtype=torch.uint8)
    assert summed(a.view(dtype), b.view(dtype)) == Sums(count=1)


_FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=examples(400))
@given(
    pairs=st.lists(st.tuples(_FLOATS, _FLOATS) | _FLOATS.map(lambda one: (one, one)), min_size=1, max_size=20),
    tolerance=st.none() | st.floats(min_value=0, max_value=1e6),
)
def test_the_sums_are_those_of_one_element_after_the_other(
    pairs: list[tuple[float, float]], tolerance: float | None
) -> None:
    a, b = (torch.tensor(side, dtype=torch.float32) for side in zip(*pairs, strict=True))
    found = summed(a, b, tolerance)
    expected = Sums()
    for one, other, same in zip(
        a.tolist(), b.tolist(), (a.view(torch.int32) == b.view(torch.int32)).tolist(), strict=True
    ):
        nan = math.isnan(one), math.isnan(other)
        apart = 0.0 if one == other else abs(one - other)
        differs = not same and (tolerance is None or nan[0] != nan[1] or apart > tolerance)
        expected.count += differs
        expected.nan_a += differs and nan[0]
        expected.nan_b += differs and nan[1]
        if differs and not any(nan):
            expected.largest = max(expected.largest, apart)
            size = max(abs(one), abs(other))
            relative = (1.0 if apart else 0.0) if math.isinf(size) else apart / size if size else 0.0
            expected.largest_relative = max(expected.largest_relative, relative)
    assert found == expected
