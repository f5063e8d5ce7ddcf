"""Property: 4-bit components are those of bitsandbytes, bit for bit, whatever the tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantdock_bnb import fourbit
from quantdock_bnb.config import BLOCKSIZES, STORAGE_DTYPES

sys.path.insert(0, str(Path(__file__).parent))
from whole import four_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INFINITY = float("inf")
# Where torch's implementation goes on with the next chunk; LARGE_CHUNK where torch is single-threaded.
CHUNK, LARGE_CHUNK = 28672, 286720


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, so that -0 doesn't equal 0. NaNs are made equal: which of the many it is, nobody says."""
    values = tensor.detach().contiguous().reshape(-1)
    return torch.where(values.isnan(), torch.nan, values).view(torch.uint8) if values.is_floating_point() else values


def same_as_bitsandbytes(tensor: Tensor, *, quant_type: str, blocksize: int, nested: bool = False) -> None:
    before = tensor.clone()
    expected, expected_state = bnb.functional.quantize_4bit(
        tensor, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    data, state = four_bits(
        tensor, quant_type=quant_type, blocksize=blocksize, nested=nested, quant_storage=torch.uint8
    )
    theirs = {"weight": expected} | {
        f"weight.{name}": part for name, part in expected_state.as_dict(packed=True).items()
    }
    ours = fourbit.to_components("weight", data, state)
    assert list(ours) == list(theirs)
    for name, part in theirs.items():
        assert ours[name].dtype == part.dtype
        assert ours[name].shape == part.shape
        assert torch.equal(bits(ours[name]), bits(part)), name
    assert torch.equal(bits(tensor), bits(before))
    if expected_state.nested:
        assert torch.equal(bits(state.offset), bits(expected_state.offset))


def at_the_bounds(generator: torch.Generator, count: int) -> Tensor:
    """Values at and right beside every decision bound, in blocks whose largest value is one."""
    bounds = torch.cat([code(kind).bounds for kind in ("nf4", "fp4")])
    one = torch.ones(1)
    near = torch.cat([bounds, bounds.nextafter(one), bounds.nextafter(-one), torch.tensor([1.0, -1.0, 0.0, -0.0])])
    values = near[torch.randint(len(near), (count,), generator=generator)]
    values[::16] = 1.0
    return values


def code(quant_type: str) -> fourbit.Code:
    found = fourbit.code_of(quant_type)
    assert found is not None
    return found


def with_some(value: float) -> Callable[[torch.Generator, int], Tensor]:
    def make(generator: torch.Generator, count: int) -> Tensor:
        values = torch.randn(count, generator=generator)
        values[torch.rand(count, generator=generator) < 0.01] = value
        return values

    return make


KINDS: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    "normal": lambda g, n: torch.randn(n, generator=g) * 0.02,
    "uniform": lambda g, n: torch.rand(n, generator=g) * 2 - 1,
    "bounds": at_the_bounds,
    "zeros": lambda g, n: torch.zeros(n),
    "minus zeros": lambda g, n: -torch.zeros(n),
    "ternary": lambda g, n: torch.randint(-1, 2, (n,), generator=g).float(),
    "sparse": lambda g, n: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.01),
    "denormal": lambda g, n: torch.randn(n, generator=g) * 1e-40,
    "tiny": lambda g, n: torch.randn(n, generator=g) * 1e-37,
    "huge": lambda g, n: torch.randn(n, generator=g) * 3e37,
    "wide": lambda g, n: torch.randn(n, generator=g) * torch.exp2(torch.randint(-140, 120, (n,), generator=g)),
    "infinite": with_some(INFINITY),
    "minus infinite": with_some(-INFINITY),
    "nan": with_some(float("nan")),
}


@settings(deadline=None, max_examples=100)
@given(
    kind=st.sampled_from(list(KINDS)),
    count=st.integers(1, 5000),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from(BLOCKSIZES),
    nested=st.booleans(),
)
def test_any_tensor(
    kind: str, count: int, seed: int, dtype: torch.dtype, quant_type: str, blocksize: int, nested: bool
) -> None:
    tensor = KINDS[kind](torch.Generator().manual_seed(seed), count).to(dtype)
    same_as_bitsandbytes(tensor, quant_type=quant_type, blocksize=blocksize, nested=nested)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_across_chunks(kind: str, quant_type: str) -> None:
    """Several chunks, a last one that is shorter, and a block that isn't whole."""
    count = 2 * CHUNK + 7 * 64 + 13
    tensor = KINDS[kind](torch.Generator().manual_seed(1), count)
    for dtype in DTYPES:
        same_as_bitsandbytes(tensor.to(dtype), quant_type=quant_type, blocksize=64)
    same_as_bitsandbytes(tensor, quant_type=quant_type, blocksize=4096, nested=True)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_slice_by_slice(quant_type: str) -> None:
    """Slices of whole blocks, quantized in any order, make the same result as all at once."""
    tensor = KINDS["normal"](torch.Generator().manual_seed(2), 64 * 100 + 37).bfloat16()
    expected, expected_state = four_bits(
        tensor, quant_type=quant_type, blocksize=64, nested=True, quant_storage=torch.uint8
    )
    packed = torch.empty((len(tensor) + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(101)
    for start, end in ((64 * 70, len(tensor)), (0, 64 * 3), (64 * 3, 64 * 70)):
        fourbit.quantize_into(
            tensor[start:end],
            packed[start // 2 : (end + 1) // 2],
            absmax[start // 64 : -(-end // 64)],
            quant_type=quant_type,
            blocksize=64,
        )
    state = fourbit.state_of(
        absmax, shape=tensor.shape, dtype=tensor.dtype, blocksize=64, quant_type=quant_type, nested=True
    )
    whole = fourbit.to_components("weight", expected, expected_state)
    parts = fourbit.to_components("weight", packed.unsqueeze(1), state)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@settings(deadline=None, max_examples=50)
@given(kind=st.sampled_from(list(KINDS)), count=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_any_scales(kind: str, count: int, seed: int) -> None:
    scales = KINDS[kind](torch.Generator().manual_seed(seed), count)
    codes, state = fourbit.quantize_scales(scales)
    expected, expected_state = bnb.functional.quantize_blockwise(scales, blocksize=256)
    assert torch.equal(codes, expected)
    assert torch.equal(bits(state.absmax), bits(expected_state.absmax))
    assert torch.equal(state.code, expected_state.code)
    assert (state.blocksize, state.dtype) == (expected_state.blocksize, expected_state.dtype)


def test_every_cell_of_the_scale_map() -> None:
    scale_map = fourbit.scale_map_of()
    assert scale_map is not None
    near = (torch.arange(1 << 16, dtype=torch.float64) / 32767.5 - 1).float()
    edges = (near[:-1] + near[1:]) / 2
    one = torch.ones(1)
    for values in (edges, edges.nextafter(one), edges.nextafter(-one)):
        blocks = torch.cat([values.view(-1, 255), one.expand(257, 1)], 1).view(-1)
        codes, _ = fourbit.quantize_scales(blocks)
        expected, _ = bnb.functional.quantize_blockwise(blocks, blocksize=256)
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("count", [CHUNK - 64, CHUNK, CHUNK + 1, CHUNK + 64, LARGE_CHUNK + 65, 64, 63, 1])
def test_at_the_edges_of_chunks(count: int) -> None:
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count))
    for quant_type in ("nf4", "fp4"):
        same_as_bitsandbytes(tensor, quant_type=quant_type, blocksize=64)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_bfloat16_of_a_block(quant_type: str) -> None:
    """All values that a bfloat16 weight can have in a block whose scale is one of a few."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for scale in (1.0, 0.75, 0.0234375, 1.1875e-3):
        values = every[every.abs() <= scale]
        pad = -len(values) % 63
        blocks = torch.cat([values, values.new_zeros(pad)]).view(-1, 63)
        scales = torch.full((len(blocks), 1), scale, dtype=torch.bfloat16)
        same_as_bitsandbytes(torch.cat([scales, blocks], 1).view(-1), quant_type=quant_type, blocksize=64)


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
@pytest.mark.parametrize("shape", [(32, 64), (5, 48), (16, 33)])
def test_quant_storage(storage: torch.dtype, shape: tuple[int, int]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected, _ = bnb.functional.quantize_4bit(tensor, quant_type="nf4", quant_storage=storage)
    data, state = four_bits(tensor, quant_type="nf4", blocksize=64, nested=False, quant_storage=storage)
    assert data.dtype == storage
    assert data.shape == expected.shape
    assert torch.equal(bits(data), bits(expected))
    assert state.shape == shape


def test_without_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bitsandbytes that quantizes differently is asked itself, piece by piece."""
    monkeypatch.setattr(fourbit, "code_of", lambda quant_type: None)
    monkeypatch.setattr(fourbit, "scale_map_of", lambda: None)
    tensor = torch.randn(CHUNK + 77, generator=torch.Generator().manual_seed(0))
    for blocksize in (32, 64, 4096):
        same_as_bitsandbytes(tensor, quant_type="nf4", blocksize=blocksize, nested=True)


def test_a_code_that_bitsandbytes_contradicts_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    fourbit.code_of.cache_clear()
    real = bnb.functional.get_4bit_type
    monkeypatch.setattr(bnb.functional, "get_4bit_type", lambda *args, **kwargs: real(*args, **kwargs) * 1.001)
    try:
        assert fourbit.code_of("nf4") is None
    finally:
        fourbit.code_of.cache_clear()


def test_a_scale_map_that_bitsandbytes_contradicts_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    fourbit.scale_map_of.cache_clear()
    real = bnb.functional.quantize_blockwise
    monkeypatch.setattr(bnb.functional, "quantize_blockwise", lambda a, **kwargs: real(a.pow(3), **kwargs))
    try:
        assert fourbit.scale_map_of() is None
    finally:
        fourbit.scale_map_of.cache_clear()


@pytest.mark.parametrize("shape", [(48, 64), (33, 65), (7, 31)])
@pytest.mark.parametrize("nested", [False, True])
def test_dequantize(shape: tuple[int, int], nested: bool) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, state = bnb.functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=nested)
    expected = bnb.functional.dequantize_4bit(packed, state)
    data, ours = four_bits(tensor, quant_type="nf4", blocksize=64, nested=nested, quant_storage=torch.uint8)
    assert torch.equal(fourbit.dequantize(data, ours), expected)
