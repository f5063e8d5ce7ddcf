"""Property: each instruction set gives the bits of the definition in torch, whatever the weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quantdock_kernels as kernels
from quantdock import ops
from quantdock.ops import choice

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKSIZES = [2, 6, 30, 32, 34, 64, 96, 128, 256, 4096]
GUARD = 171
every_instruction_set = pytest.mark.parametrize("instruction_set", kernels.instruction_sets())


@pytest.fixture(autouse=True, scope="module")
def _definitions() -> Iterator[None]:
    """Inside this file, the operations run on torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(choice.VARIABLE, "off")
        choice._choice.cache_clear()
        assert ops.implementation().startswith("torch")
        yield
    choice._choice.cache_clear()


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_scales(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but for which of the many NaNs it is."""
    ordinary = ~expected.isnan()
    return torch.equal(found.isnan(), ~ordinary) and torch.equal(bits(found[ordinary]), bits(expected[ordinary]))


def some_weights(generator: torch.Generator, kind: str, count: int, dtype: torch.dtype) -> Tensor:
    """Weights that start at any element of their memory, not only where a vector would like them to."""
    start = int(torch.randint(0, 9, (1,), generator=generator))
    normal = torch.randn(count + start, generator=generator)
    match kind:
        case "patterns":  # of which some hundredth is NaNs, quiet and signalling
            size = 4 if dtype == torch.float32 else 2
            values = torch.randint(0, 256, ((count + start) * size,), generator=generator, dtype=torch.uint8)
            return values.view(dtype)[start:]
        case "infinities":
            normal[torch.rand(len(normal), generator=generator) < 0.01] = float("inf")
            normal[torch.rand(len(normal), generator=generator) < 0.01] = float("-inf")
        case "zeros":
            normal = normal.sign() * 0.0
        case "denormals":
            normal = normal * (1e-40 if dtype != torch.float16 else 1e-7)
        case "wide":
            normal = normal * torch.exp2(torch.randint(-140, 120, normal.shape, generator=generator))
        case "ternary":
            normal = normal.round().clamp(-1, 1)
    return normal.to(dtype)[start:]


KINDS = ["normal", "patterns", "infinities", "zeros", "denormals", "wide", "ternary"]
weights = {
    "kind": st.sampled_from(KINDS),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 2**32),
}


def guarded(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    """A result, and the memory that it is in the middle of."""
    count = torch.Size(shape).numel()
    memory = torch.full(((count + 64) * dtype.itemsize,), GUARD, dtype=torch.uint8).view(dtype)
    return memory[32 : 32 + count].view(shape), memory


def nothing_else_was_written(result: Tensor, memory: Tensor) -> None:
    count = result.numel()
    assert (bits(memory[:32]) == GUARD).all()
    assert (bits(memory[32 + count :]) == GUARD).all()


@every_instruction_set
@settings(deadline=None, max_examples=150)
@given(count=st.integers(0, 3000), blocksize=st.sampled_from(BLOCKSIZES), **weights)
def test_4bit(instruction_set: str, kind: str, dtype: torch.dtype, seed: int, count: int, blocksize: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    flat = some_weights(generator, kind, count, dtype)
    bounds = torch.rand(15, generator=generator).mul(2).sub(1).sort().values
    if seed % 2 and count:  # bounds that values meet exactly
        bounds = (flat.float() / flat.float().abs().max()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        bounds = bounds.clamp(-1, 1)[torch.randint(0, count, (15,), generator=generator)].sort().values
    codes = torch.randperm(16, generator=generator).to(torch.uint8)
    packed, memory = guarded(torch.uint8, (count + 1) // 2)
    absmax, scales_memory = guarded(torch.float32, -(-count // blocksize))
    before = flat.clone()
    kernels.quantize_4bit(
        flat,
        bounds=bounds,
        codes=codes,
        blocksize=blocksize,
        packed=packed,
        absmax=absmax,
        instruction_set=instruction_set,
    )
    expected, scales = torch.empty_like(packed), torch.empty_like(absmax)
    ops.quantize_blockwise_4bit(flat, bounds=bounds, codes=codes, blocksize=blocksize, packed=expected, absmax=scales)
    assert same_scales(absmax, scales)
    assert torch.equal(packed, expected)
    assert torch.equal(bits(flat), bits(before))
    nothing_else_was_written(packed, memory)
    nothing_else_was_written(absmax, scales_memory)


@every_instruction_set
@settings(deadline=None, max_examples=100)
@given(count=st.integers(0, 3000), blocksize=st.sampled_from(BLOCKSIZES), **weights)
def test_8bit(instruction_set: str, kind: str, dtype: torch.dtype, seed: int, count: int, blocksize: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    flat = some_weights(generator, kind, count, dtype)
    table = torch.randint(0, 256, (1 << 16,), generator=generator, dtype=torch.uint8)
    codes, memory = guarded(torch.uint8, count)
    absmax, scales_memory = guarded(torch.float32, -(-count // blocksize))
    kernels.quantize_8bit(
        flat, table=table, blocksize=blocksize, codes=codes, absmax=absmax, instruction_set=instruction_set
    )
    expected, scales = torch.empty_like(codes), torch.empty_like(absmax)
    ops.quantize_blockwise_8bit(flat, table=table, blocksize=blocksize, codes=expected, absmax=scales)
    assert same_scales(absmax, scales)
    assert torch.equal(codes, expected)
    nothing_else_was_written(codes, memory)
    nothing_else_was_written(absmax, scales_memory)


@every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_16_bit_value(instruction_set: str, dtype: torch.dtype) -> None:
    """Each beside a scale that makes it the only one of its block, so that no value hides another."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    flat = torch.stack([every, torch.full_like(every, 0.75)], 1).view(-1)
    bounds = torch.linspace(-0.9, 0.9, 15)
    codes = torch.arange(16, dtype=torch.uint8)
    for blocksize in (2, 64):
        packed, absmax = torch.empty(1 << 16, dtype=torch.uint8), torch.empty((1 << 17) // blocksize)
        kernels.quantize_4bit(
            flat,
            bounds=bounds,
            codes=codes,
            blocksize=blocksize,
            packed=packed,
            absmax=absmax,
            instruction_set=instruction_set,
        )
        expected, scales = torch.empty_like(packed), torch.empty_like(absmax)
        ops.quantize_blockwise_4bit(
            flat, bounds=bounds, codes=codes, blocksize=blocksize, packed=expected, absmax=scales
        )
        assert same_scales(absmax, scales)
        assert torch.equal(packed, expected)


@every_instruction_set
@settings(deadline=None, max_examples=150)
@given(rows=st.integers(0, 40), columns=st.integers(1, 200), gap=st.integers(0, 5), **weights)
def test_rows_int8(
    instruction_set: str, kind: str, dtype: torch.dtype, seed: int, rows: int, columns: int, gap: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = some_weights(generator, kind, rows * (columns + gap), dtype).view(rows, columns + gap)
    if kind == "wide":
        wide = (wide.float() * torch.exp2(torch.randint(-20, 17, (rows, 1), generator=generator))).to(dtype)
    matrix = wide[:, :columns]
    codes, memory = guarded(torch.int8, rows, columns)
    scales, scales_memory = guarded(torch.float32, rows)
    kernels.quantize_rows_int8(matrix, codes=codes, scales=scales, instruction_set=instruction_set)
    expected, expected_scales = torch.empty_like(codes), torch.empty_like(scales)
    ops.quantize_rows_int8(matrix, codes=expected, scales=expected_scales)
    assert same_scales(scales, expected_scales)
    assert torch.equal(codes, expected)
    nothing_else_was_written(codes, memory)
    nothing_else_was_written(scales, scales_memory)


@every_instruction_set
def test_every_rounding_to_float16(instruction_set: str) -> None:
    """Around each float16: the value, its neighbours in float32, and the middle between it and the next one."""
    every = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middles = (every[:-1] + every[1:]) / 2
    up = torch.tensor(float("inf"))
    column = torch.cat([every, middles, *[t.nextafter(s) for t in (every, middles) for s in (up, -up)], up.view(1)])
    column = torch.cat([column, torch.tensor([65519.996, 65520.0, 65536.0, 3e38])])
    matrix = torch.stack([column, -column, column], 1)
    codes, scales = torch.empty_like(matrix, dtype=torch.int8), torch.empty_like(column)
    kernels.quantize_rows_int8(matrix, codes=codes, scales=scales, instruction_set=instruction_set)
    assert torch.equal(scales, column.half().float().abs())
    finite = scales.isfinite() & (scales > 0)
    assert torch.equal(codes[finite], torch.tensor([127, -127, 127], dtype=torch.int8).expand(int(finite.sum()), 3))
    assert not codes[~finite].any()
