"""Property: each instruction set gives the bits of the definition in torch, whatever the weights: the first kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantdock_kernels as kernels
from quantdock import ops

sys.path.insert(0, str(Path(__file__).parent))
from kernel_weights import (
    DTYPES,
    bits,
    definitions,  # noqa: F401 - a fixture
    every_instruction_set,
    guarded,
    nothing_else_was_written,
    same_floats,
    some_weights,
    weights,
)

BLOCKSIZES = [2, 6, 30, 32, 34, 64, 96, 128, 256, 4096]


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
    assert same_floats(absmax, scales)
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
    assert same_floats(absmax, scales)
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
        assert same_floats(absmax, scales)
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
    assert same_floats(scales, expected_scales)
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
