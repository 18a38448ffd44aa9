"""A part of an index answers for wanted boxes as safely as the whole, and reads no more sections than it must."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudckpt.errors import ManifestError, OptionsError
from cloudckpt.format import cover as cover_module
from cloudckpt.format import index as index_module
from cloudckpt.format.builder import IndexBuilder
from cloudckpt.format.index import Index
from cloudckpt.format.section import Section, TensorEntry
from tests.effort import examples

ATTEMPT = "0123456789abcdef"

Box = tuple[tuple[int, ...], tuple[int, ...]]


def index_of(tensors: dict[str, tuple[int, ...]], boxes: dict[int, list[tuple[str, Box]]]) -> Index:
    """Return an index of uint8 tensors whose boxes each rank wrote one after the other into one shard."""
    numbers = {name: number for number, name in enumerate(tensors)}
    builder = IndexBuilder(attempt=ATTEMPT, block_bytes=1 << 20)
    builder.tensors.update({name: TensorEntry("uint8", shape) for name, shape in tensors.items()})
    for rank, of_rank in boxes.items():
        lengths = [int(np.prod(sizes, dtype=np.int64)) for _, (_, sizes) in of_rank]
        stops = 64 + np.cumsum([0, *lengths])
        builder.add(
            Section(
                rank=rank,
                attempt=ATTEMPT,
                shard_sizes=stops[-1:].astype(np.int64),
                digests=bytes(8),
                tensor=np.asarray([numbers[name] for name, _ in of_rank], dtype=np.int64),
                shard=np.zeros(len(of_rank), dtype=np.int64),
                start=stops[:-1].astype(np.int64),
                offsets=np.asarray([v for _, (offsets, _) in of_rank for v in offsets], dtype=np.int64),
                sizes=np.asarray([v for _, (_, sizes) in of_rank for v in sizes], dtype=np.int64),
            )
        )
    return Index(*builder.finish({}, {}), key="index.bin")


def rows_on_ranks(ranks: int, *, rows: int = 4) -> Index:
    """Return an index of two tensors by rows on all ranks, a scalar of rank 0 and a tensor that rank 1 wrote alone."""
    boxes: dict[int, list[tuple[str, Box]]] = {}
    for rank in range(ranks):
        boxes[rank] = [(name, ((rank * rows, 0), (rows, 3))) for name in ("a", "b")]
    boxes[0].append(("scalar", ((), ())))
    boxes[1].append(("alone", ((0,), (7,))))
    whole = (ranks * rows, 3)
    return index_of({"a": whole, "b": whole, "scalar": (), "alone": (7,)}, boxes)


def opened(index: Index) -> list[int]:
    """Return the ranks whose sections were decoded and kept."""
    return sorted(index._sections)


def test_what_a_rank_wrote_is_found_in_its_own_section_alone() -> None:
    index = rows_on_ranks(5)

    found = index.covering({"a": [((8, 0), (4, 3))], "b": [((9, 1), (2, 2))]}, near=2)

    assert {name: [chunk.rank for chunk in chunks] for name, chunks in found.items()} == {"a": [2], "b": [2]}
    assert opened(index) == [2]


def test_what_one_rank_wrote_alone_is_found_in_its_section() -> None:
    index = rows_on_ranks(5)

    found = index.covering({"a": [((8, 0), (4, 3))], "alone": [((0,), (7,))]}, near=2)

    assert [chunk.rank for chunk in found["alone"]] == [1]
    assert opened(index) == [1, 2]


def test_other_sections_are_read_until_nothing_is_missing() -> None:
    index = rows_on_ranks(5)

    found = index.covering({"a": [((7, 0), (2, 3))]}, near=1)

    assert [chunk.rank for chunk in found["a"]] == [1, 2]
    assert opened(index) == [0, 1, 2]


def test_nothing_wanted_reads_nothing() -> None:
    index = rows_on_ranks(3)

    assert index.covering({}, near=0) == {}
    assert index.covering({"a": [((2, 0), (0, 3))], "b": []}) == {"a": [], "b": []}
    assert opened(index) == []


def test_a_rank_that_did_not_write_is_near_nothing() -> None:
    assert [chunk.rank for chunk in rows_on_ranks(3).covering({"scalar": [((), ())]}, near=99)["scalar"]] == [0]


def test_a_section_that_is_not_needed_is_not_looked_at() -> None:
    """Its bytes are covered by the manifest's digest; that it makes no sense shows when it is read."""
    index = rows_on_ranks(4)
    index._frames[3] = zstandard.ZstdCompressor().compress(b"damage")

    assert len(index.covering({"a": [((0, 0), (12, 3))]}, near=0)["a"]) == 3
    with pytest.raises(ManifestError, match="section of rank 3"):
        index.covering({"a": [((0, 0), (13, 3))]}, near=0)


def test_a_large_index_is_checked_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks wrote row 4 of "a"; whoever wants the rows before it, or only "b", is not held up."""
    monkeypatch.setattr(index_module, "_CHECKED_PIECES", 0)
    monkeypatch.setattr(index_module, "_KEPT_PIECES", 0)
    boxes: dict[int, list[tuple[str, Box]]] = {
        0: [("a", ((0,), (5,))), ("b", ((0,), (2,)))],
        1: [("a", ((4,), (4,))), ("b", ((2,), (2,)))],
    }
    index = Index.decode(index_of({"a": (8,), "b": (4,)}, boxes).encode(), key="index.bin")

    assert [chunk.rank for chunk in index.covering({"a": [((0,), (4,))], "b": [((0,), (4,))]}, near=0)["b"]] == [0, 1]
    assert opened(index) == [0]
    for refused in (
        index.check,
        index.all_pieces,
        lambda: index.covering({"a": [((0,), (8,))]}, near=1),
    ):
        with pytest.raises(ManifestError, match="'a' is not tiled"):
            refused()


@pytest.mark.parametrize(
    ("boxes", "is_right"),
    [
        ([((0,), (4,)), ((4,), (4,))], True),
        ([((0,), (4,)), ((5,), (3,))], False),
        ([((0,), (4,)), ((2,), (6,))], False),
        ([((0,), (4,)), ((0,), (4,))], False),
        ([((0,), (8,)), ((0,), (8,))], False),
        ([((0,), (8,)), ((8,), (0,))], True),
    ],
)
def test_a_box_that_is_not_covered_exactly_once_is_refused(boxes: list[Box], is_right: bool) -> None:
    index = index_of({"t": (8,)}, {0: [("t", box) for box in boxes]})

    if is_right:
        assert {chunk.offsets for chunk in index.covering({"t": [((0,), (8,))]}, near=0)["t"]} <= {(0,), (4,)}
    else:
        with pytest.raises(ManifestError, match="'t' is not tiled"):
            index.covering({"t": [((0,), (8,))]}, near=0)


@pytest.mark.parametrize(
    "wanted",
    [
        {"x": [((0, 0), (1, 1))]},
        {"a": [((0,), (1,))]},
        {"a": [((0, 0), (13, 3))]},
        {"a": [((-1, 0), (2, 3))]},
        {"a": [((0, 0), (-1, 3))]},
    ],
)
def test_what_no_tensor_has_cannot_be_wanted(wanted: dict[str, list[Box]]) -> None:
    with pytest.raises(OptionsError, match="no tensor of the checkpoint, or a wanted part is not inside it"):
        rows_on_ranks(3).covering(wanted)


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    sides = [[(start, stop - start) for start, stop in pairwise(cut)] for cut in cuts]
    return shape, [(tuple(at for at, _ in cell), tuple(size for _, size in cell)) for cell in product(*sides)]


@settings(max_examples=examples(200))
@given(st.lists(grids(), min_size=1, max_size=3), st.data())
def test_exactly_the_pieces_that_overlap_what_is_wanted_are_found(
    made: list[tuple[tuple[int, ...], list[Box]]], data: st.DataObject
) -> None:
    tensors = {f"t{number}": shape for number, (shape, _) in enumerate(made)}
    everything = [(f"t{number}", box) for number, (_, boxes) in enumerate(made) for box in boxes]
    ranks: dict[int, list[tuple[str, Box]]] = {0: [], 1: [], 2: []}
    for entry in everything:
        ranks[data.draw(st.integers(0, 2))].append(entry)
    index = index_of(tensors, ranks)
    wanted: dict[str, list[Box]] = {}
    for name, shape in tensors.items():
        starts = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        wanted[name] = [
            (starts, tuple(data.draw(st.integers(1, size - at)) for at, size in zip(starts, shape, strict=True)))
        ]

    found = index.covering(wanted, near=data.draw(st.sampled_from([None, 0, 1, 2, 3])))

    for name, [box] in wanted.items():
        expected = {other for of, other in everything if of == name and overlap(other, box)}
        assert len(found[name]) == len(expected)
        assert {(chunk.offsets, chunk.sizes) for chunk in found[name]} == expected


def overlap(one: Box, other: Box) -> bool:
    return all(
        max(start, at) < min(start + size, at + extent) for start, size, at, extent in zip(*one, *other, strict=True)
    )


def test_many_pairs_are_compared_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    index = rows_on_ranks(5)
    wanted = {"a": [((row, 0), (1, 3)) for row in range(20)], "b": [((row, 0), (2, 3)) for row in range(0, 20, 2)]}
    expected = index.covering(wanted)
    monkeypatch.setattr(cover_module, "_PAIRS", 3)

    assert index.covering(wanted) == expected
    assert [len(chunks) for chunks in expected.values()] == [5, 5]
