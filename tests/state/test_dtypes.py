"""Every dense tensor comes back bit for bit, into the memory where it stood; tensors of other kinds are refused."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import cloudckpt
from cloudckpt import Options, StateMismatchError, UnsupportedValueError
from cloudckpt.format.codec import DTYPES
from tests.effort import diagonal

# Every tensor is cut into several shards, blocks and spans, none of which starts or ends with an element.
TINY = Options(shard_bytes=80, block_bytes=24, span_bytes=48, memory_budget_bytes=4096, concurrency=3)
WHOLE = Options()
CUTS = [pytest.param(WHOLE, id="whole"), pytest.param(TINY, id="cut")]
NAMED = [pytest.param(dtype, id=name) for name, dtype in DTYPES.items()]

# torch says so of every new complex32 tensor, also of those that a test makes.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

# Same width, and copied by torch in any layout.
CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture
def url() -> Iterator[str]:
    """An empty place in memory: hundreds of tiny shards would each wait for a disk."""
    name = f"/{secrets.token_hex(8)}"
    yield f"memory:/{name}"
    MemoryFileSystem().rm(name, recursive=True)


def words(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements as integers of their width, with its strides."""
    if tensor.dtype is torch.complex128:
        return torch.view_as_real(tensor).view(torch.int64)
    return tensor.view(CARRIERS[tensor.dtype.itemsize])


def bits(tensor: torch.Tensor) -> list[object]:
    """Return the elements' bits, in row-major order."""
    plain = tensor.detach()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    found: list[object] = words(plain).tolist()
    return found


def filled(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a dense tensor of random bits (0 and 1 for bool, whose other bytes are no values)."""
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(count + dtype.itemsize)
    top = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, top, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def zeroed(tensor: torch.Tensor) -> None:
    """Set every element to zero bits, where it stands."""
    words(tensor.detach()).zero_()


def _sliced(dtype: torch.dtype) -> torch.Tensor:
    return filled(dtype, 10, 9)[2:9, 3:8]


def _offset(dtype: torch.dtype) -> torch.Tensor:
    return filled(dtype, 40)[7:38]


def _strided(dtype: torch.dtype) -> torch.Tensor:
    return filled(dtype, 60)[::3]


def _channels_last(dtype: torch.dtype) -> torch.Tensor:
    return filled(dtype, 2, 4, 5, 3).permute(0, 3, 1, 2)


LAYOUTS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "scalar": lambda dtype: filled(dtype, 1).reshape(()),
    "one element": lambda dtype: filled(dtype, 1),
    "empty": lambda dtype: filled(dtype, 0),
    "empty matrix": lambda dtype: filled(dtype, 3, 0, 2),
    "vector": lambda dtype: filled(dtype, 61),
    "matrix": lambda dtype: filled(dtype, 7, 11),
    "six axes": lambda dtype: filled(dtype, 2, 1, 3, 1, 2, 5),
    "transposed": lambda dtype: filled(dtype, 7, 11).t(),
    "sliced": _sliced,
    "with a storage offset": _offset,
    "every third": _strided,
    "one of every forty": lambda dtype: filled(dtype, 60)[7::60],
    "one row of a column": lambda dtype: filled(dtype, 6, 10)[2:3, 4:5],
    "channels last": _channels_last,
}


def test_the_format_names_every_dtype_of_torch_that_has_whole_bytes() -> None:
    present = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
    left_out = {str(dtype).removeprefix("torch.") for dtype in present - set(DTYPES.values())}
    quantized = {name for name in left_out if name.startswith(("qint", "quint"))}
    opaque = {name for name in left_out if name.startswith("bits")}
    narrow = {name for name in left_out if name.startswith(("int", "uint"))}
    assert left_out == quantized | opaque | narrow
    assert narrow == {f"{sign}int{width}" for sign in ("", "u") for width in range(1, 8)} & left_out


@diagonal("dtype, options", NAMED, CUTS)
def test_every_dtype_in_every_layout_is_restored_bitwise_in_place(
    url: str, dtype: torch.dtype, options: Options
) -> None:
    saved = {name: make(dtype) for name, make in LAYOUTS.items()}
    expected = {name: bits(tensor) for name, tensor in saved.items()}
    cloudckpt.save(dict(saved), url, options=options)
    live = dict(saved)
    memory = {name: tensor.data_ptr() for name, tensor in live.items()}
    for tensor in live.values():
        zeroed(tensor)

    cloudckpt.load(live, url, options=options)

    assert {name: bits(tensor) for name, tensor in live.items()} == expected
    assert all(live[name] is saved[name] for name in saved)
    assert {name: tensor.data_ptr() for name, tensor in live.items()} == memory


@diagonal("dtype, options", NAMED, CUTS)
def test_every_dtype_in_every_layout_is_read_bitwise(url: str, dtype: torch.dtype, options: Options) -> None:
    saved = {name: make(dtype) for name, make in LAYOUTS.items()}
    cloudckpt.save(dict(saved), url, options=options)

    found = cloudckpt.read(url, options=options)

    assert {name: bits(tensor) for name, tensor in found.items() if isinstance(tensor, torch.Tensor)} == {
        name: bits(tensor) for name, tensor in saved.items()
    }
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in saved.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in found.items() if isinstance(tensor, torch.Tensor)
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_transposed_target_takes_what_a_dense_tensor_was(url: str, dtype: torch.dtype) -> None:
    dense = filled(dtype, 9, 13)
    cloudckpt.save({"t": dense}, url, options=TINY)
    target = filled(dtype, 13, 9).t()
    zeroed(target)

    cloudckpt.load({"t": target}, url, options=TINY)

    assert bits(target) == bits(dense)


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
@pytest.mark.parametrize("options", [WHOLE, TINY], ids=["whole", "cut"])
def test_conjugated_and_negated_views_are_saved_and_restored_as_what_they_show(
    url: str, dtype: torch.dtype, options: Options
) -> None:
    base = filled(dtype, 9, 5)
    views = {"conj": base.conj(), "adjoint": base.mH, "conj slice": base.conj()[2:7, 1:3]}
    if dtype is not torch.complex32:
        views |= {"imag of conj": base.conj().imag}
        assert views["imag of conj"].is_neg()
    expected = {name: bits(view) for name, view in views.items()}
    assert views["conj"].is_conj()
    cloudckpt.save(dict(views), url, options=options)
    for name, view in views.items():
        target = filled(view.dtype, *view.shape)
        live = target.conj() if view.is_conj() else torch._neg_view(target)
        cloudckpt.load({name: live}, url, options=options, strict=False)
        assert bits(live) == expected[name]


@pytest.mark.parametrize("options", [WHOLE, TINY], ids=["whole", "cut"])
def test_an_expanded_tensor_is_saved_in_full(url: str, options: Options) -> None:
    expanded = torch.arange(5.0).reshape(5, 1).expand(5, 7)
    cloudckpt.save({"e": expanded}, url, options=options)
    live: dict[str, object] = {"e": torch.zeros(5, 7)}

    cloudckpt.load(live, url, options=options)

    assert torch.equal(live["e"], expanded)  # type: ignore[arg-type]


def test_an_expanded_target_is_replaced_because_its_elements_share_memory(url: str) -> None:
    saved = torch.arange(35.0).reshape(5, 7)
    cloudckpt.save({"e": saved}, url)
    shared = torch.zeros(5, 1)
    live: dict[str, object] = {"e": shared.expand(5, 7)}

    cloudckpt.load(live, url)

    assert torch.equal(live["e"], saved)  # type: ignore[arg-type]
    assert torch.equal(shared, torch.zeros(5, 1))


@pytest.mark.parametrize("options", [WHOLE, TINY], ids=["whole", "cut"])
def test_two_names_that_share_memory_both_come_back_and_still_share_it(url: str, options: Options) -> None:
    base = torch.arange(40.0)
    live: dict[str, object] = {"all": base, "part": base[10:30], "rows": base.view(8, 5)}
    cloudckpt.save(live, url, options=options)
    base.zero_()

    cloudckpt.load(live, url, options=options)

    assert torch.equal(base, torch.arange(40.0))
    base[12] = -1.0
    assert live["part"][2] == -1.0  # type: ignore[index]


@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "computed"])
def test_a_tensor_that_requires_grad_is_restored_in_place_and_still_does(url: str, is_leaf: bool) -> None:
    leaf = torch.arange(20.0, requires_grad=True)
    tensor = leaf if is_leaf else leaf * 1.0
    cloudckpt.save({"t": tensor}, url)
    with torch.no_grad():
        tensor.zero_()
    live: dict[str, object] = {"t": tensor}

    cloudckpt.load(live, url)

    assert live["t"] is tensor
    assert tensor.requires_grad
    assert tensor.tolist() == torch.arange(20.0).tolist()


@pytest.mark.parametrize("options", [WHOLE, TINY], ids=["whole", "cut"])
def test_a_target_of_a_dtype_that_holds_every_saved_number_takes_the_values(url: str, options: Options) -> None:
    saved = torch.linspace(-3.0, 3.0, 77).reshape(7, 11).bfloat16()
    cloudckpt.save({"t": saved}, url, options=options)
    live: dict[str, object] = {"t": torch.zeros(7, 11)}

    found = cloudckpt.load(live, url, options=options)

    assert torch.equal(live["t"], saved.float())  # type: ignore[arg-type]
    assert found.fit is not None
    assert found.fit.cast == ("t",)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.int64),
        (torch.int64, torch.int32),
        (torch.int64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.float32, torch.complex64),
        (torch.bool, torch.int64),
        (torch.bfloat16, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("cast", [False, True])
def test_a_value_that_its_target_cannot_hold_is_refused_with_both_dtypes(
    url: str, there: torch.dtype, here: torch.dtype, *, cast: bool
) -> None:
    cloudckpt.save({"t": {"x": torch.ones(3, dtype=there)}}, url)
    live = torch.zeros(3, dtype=here)

    with pytest.raises(StateMismatchError, match=rf"t\.x is {here} here and {there} there"):
        cloudckpt.load({"t": {"x": live}}, url, cast=cast)

    assert not live.any()


def _csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* beta", category=UserWarning)
        return torch.eye(3).to_sparse_csr()


def _strided_nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors", category=UserWarning)
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


REFUSED: dict[str, Callable[[], torch.Tensor]] = {
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "sparse COO": lambda: torch.eye(3).to_sparse(),
    "sparse CSR": _csr,
    "nested": _strided_nested,
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "meta": lambda: torch.ones(3, device="meta"),
    "lazy": torch.nn.parameter.UninitializedParameter,
    "narrower than a byte": lambda: torch.empty(3, dtype=torch.uint4),
    "opaque bits": lambda: torch.empty(3, dtype=torch.bits8),
}


@pytest.mark.filterwarnings("ignore:.*quantiz:DeprecationWarning", "ignore:.*quantiz:UserWarning")
@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_a_tensor_without_dense_bytes_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, make: Callable[[], torch.Tensor]
) -> None:
    state: dict[str, object] = {"fine": torch.ones(5), "nest": {"bad": make()}}

    with pytest.raises(UnsupportedValueError, match=r"nest\.bad") as caught:
        cloudckpt.save(state, tmp_path / "c")

    assert caught.value.key == "nest.bad"
    assert caught.value.type_name
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
