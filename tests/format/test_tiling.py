"""Laws of exact covering: the sum of random weights agrees with a count of every element."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.format.tiling import Tiling, untiled

Box = tuple[tuple[int, ...], tuple[int, ...]]


def found(shapes: list[tuple[int, ...]], boxes: list[tuple[int, Box]]) -> list[int]:
    return untiled(
        shapes,
        np.asarray([tensor for tensor, _ in boxes], dtype=np.int64),
        np.asarray([value for _, (offsets, _) in boxes for value in offsets], dtype=np.int64),
        np.asarray([value for _, (_, sizes) in boxes for value in sizes], dtype=np.int64),
    ).tolist()


def counted(shapes: list[tuple[int, ...]], boxes: list[tuple[int, Box]]) -> list[int]:
    """Return the same by counting how often each element is covered."""
    wrong = []
    for number, shape in enumerate(shapes):
        covers = np.zeros(shape, dtype=np.int64)
        for tensor, (offsets, sizes) in boxes:
            if tensor == number:
                covers[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))] += 1
        if (covers != 1).any():
            wrong.append(number)
    return wrong


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[tuple[int, Box]]]:
    """Tilings by a grid per tensor, some of them spoiled by a lost, doubled, moved or empty box."""
    shapes, boxes = [], []
    for number in range(draw(st.integers(0, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        shapes.append(shape)
        cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
        sides = [[(start, stop - start) for start, stop in pairwise(cut)] for cut in cuts]
        grid = [(tuple(start for start, _ in cell), tuple(size for _, size in cell)) for cell in product(*sides)]
        for box in grid:
            boxes += [(number, box)] * draw(st.sampled_from([1, 1, 1, 1, 1, 1, 0, 2]))
        if draw(st.booleans()):
            boxes.append((number, (shape, (0,) * len(shape))))
    return shapes, draw(st.permutations(boxes))


@given(shapes_and_boxes())
def test_what_is_covered_exactly_once_is_what_counting_every_element_finds(
    made: tuple[list[tuple[int, ...]], list[tuple[int, Box]]],
) -> None:
    assert found(*made) == counted(*made)


def test_a_scalar_is_covered_by_one_box_only() -> None:
    scalar: Box = ((), ())

    assert found([(), (), ()], [(0, scalar), (2, scalar), (2, scalar)]) == [1, 2]


def test_a_tensor_without_elements_is_covered_by_no_box_and_by_many() -> None:
    assert found([(0, 3), (3, 0)], [(1, ((0, 0), (3, 0))), (1, ((1, 0), (2, 0)))]) == []


def test_no_tensors_and_no_boxes_are_all_covered() -> None:
    assert found([], []) == []


def test_as_many_elements_in_the_wrong_places_are_no_cover() -> None:
    assert found([(4,)], [(0, ((0,), (2,))), (0, ((0,), (2,)))]) == [0]
    assert found([(2, 2)], [(0, ((0, 0), (1, 2))), (0, ((0, 0), (1, 2)))]) == [0]


def test_a_box_beyond_its_tensor_is_no_cover() -> None:
    assert found([(4,)], [(0, ((0,), (2,))), (0, ((4,), (2,)))]) == [0]


@pytest.mark.parametrize("doublings", [1, 10])
def test_powers_of_two_that_cancel_in_a_ring_do_not_cancel_here(doublings: int) -> None:
    """In 64 dimensions a product of differences is a multiple of 2**64 about half of the time."""
    shape = (2,) * 64
    half: Box = ((0,) * 64, (1,) * 63 + (2,))
    whole: Box = ((0,) * 64, shape)

    wrong = [(0, whole)] + [(0, half)] * 2**doublings

    assert [found([shape], wrong) for _ in range(20)] == [[0]] * 20
    assert found([shape], [(0, whole)]) == []


def test_many_boxes_in_any_order_are_one_cover_until_one_is_gone() -> None:
    count = 300_000  # more than a slab
    starts = np.random.default_rng(7).permutation(count).astype(np.int64) * 3
    tensor = np.zeros(count, dtype=np.int64)
    sizes = np.full(count, 3, dtype=np.int64)

    assert untiled([(3 * count,)], tensor, starts, sizes).tolist() == []
    assert untiled([(3 * count,)], tensor[1:], starts[1:], sizes[1:]).tolist() == [0]


def test_boxes_may_be_added_in_parts() -> None:
    tiling = Tiling([(4, 2), ()])
    row = np.asarray([0], dtype=np.int64)
    sums = []
    for start in range(4):
        tiling.add(row, np.asarray([start, 0], dtype=np.int64), np.asarray([1, 2], dtype=np.int64))
        sums.append(tiling.untiled().tolist())
    tiling.add(row + 1, row[:0], row[:0])

    assert sums == [[0, 1], [0, 1], [0, 1], [1]]
    assert tiling.untiled().tolist() == []


def test_the_largest_extents_do_not_overflow() -> None:
    extent = 2**52
    box = lambda start, stop: (0, ((start,), (stop - start,)))  # noqa: E731

    assert found([(extent,)], [box(0, 1), box(1, extent - 1), box(extent - 1, extent)]) == []
    assert found([(extent,)], [box(0, 1), box(1, extent - 1), box(extent - 2, extent - 1)]) == [0]


def test_boxes_of_many_columns_tile_in_linear_time() -> None:
    columns = 20_000
    boxes = [(0, ((row, column), (1, 1))) for row in range(2) for column in range(columns)]

    assert math.prod((2, columns)) == len(boxes)
    assert found([(2, columns)], boxes) == []
    assert found([(2, columns)], boxes[:-1]) == [0]
