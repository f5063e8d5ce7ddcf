"""Property: each instruction set gives the bits of the definition in torch: 8-bit floats, extremes of groups, casts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quantdock_kernels as kernels
from quantdock import ops

sys.path.insert(0, str(Path(__file__).parent))
import reference_products as reference
from kernel_weights import (
    DTYPES,
    bits,
    definitions,  # noqa: F401 - a fixture
    every_instruction_set,
    guarded,
    nothing_else_was_written,
    same_floats,
    some_matrix,
    some_scales,
    some_weights,
    weights,
)

BLOCKS = [(1, 1), (1, 32), (1, 1000), (3, 5), (64, 16), (128, 128), (1000, 1000)]
sizes = {"rows": st.integers(0, 40), "columns": st.integers(0, 200), "gap": st.integers(0, 5)}


def grid(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    return -(-rows // block[0]), -(-columns // block[1])


@every_instruction_set
@settings(deadline=None, max_examples=120)
@given(group=st.sampled_from([1, 2, 7, 16, 31, 32, 64, 128, 1000]), **sizes, **weights)
def test_groups(
    instruction_set: str, kind: str, dtype: torch.dtype, seed: int, rows: int, columns: int, gap: int, group: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = some_matrix(generator, kind, rows, columns, gap, dtype)
    results = [guarded(dtype, rows, -(-columns // group)) for _ in range(3)]
    smallest, largest, magnitudes = (result for result, _ in results)
    kernels.group_extremes(matrix, group=group, smallest=smallest, largest=largest, instruction_set=instruction_set)
    kernels.group_magnitudes(matrix, group=group, magnitudes=magnitudes, instruction_set=instruction_set)
    expected = [torch.empty_like(smallest) for _ in range(3)]
    ops.group_extremes(matrix, group=group, smallest=expected[0], largest=expected[1])
    ops.group_magnitudes(matrix, group=group, magnitudes=expected[2])
    for (found, memory), right in zip(results, expected, strict=True):
        assert same_floats(found, right)
        nothing_else_was_written(found, memory)


@every_instruction_set
@settings(deadline=None, max_examples=150)
@given(
    block=st.sampled_from(BLOCKS), divide=st.booleans(), fitting=st.booleans(), narrow=st.booleans(), **sizes, **weights
)
def test_encode(
    instruction_set: str,
    kind: str,
    dtype: torch.dtype,
    seed: int,
    rows: int,
    columns: int,
    gap: int,
    block: tuple[int, int],
    divide: bool,
    fitting: bool,
    narrow: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = some_matrix(generator, kind, rows, columns, gap, dtype)
    if fitting:
        found = ops.fp8_scales(ops.block_magnitudes(matrix, block=block), rule="quotient" if divide else "reciprocal")
        assert found.divide == divide
        scales = found.scales
    else:
        scales = some_scales(generator, *grid(rows, columns, block))
    codes, memory = guarded(torch.float8_e4m3fn, rows, columns)
    how = {"scales": scales, "block": block, "divide": divide, "narrow": narrow}
    kernels.encode_fp8(matrix, codes=codes, instruction_set=instruction_set, **how)
    expected = torch.empty_like(codes)
    ops.encode_fp8(matrix, codes=expected, **how)
    assert torch.equal(bits(codes), bits(expected))
    nothing_else_was_written(codes, memory)


@every_instruction_set
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_encode_every_16_bit_value(instruction_set: str, dtype: torch.dtype, narrow: bool) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    codes, expected = torch.empty(2, 256, 256, dtype=torch.float8_e4m3fn)
    for scale in (1.0, 0.7, 2.0**-9):
        how = {"scales": torch.full((1, 1), scale), "block": (256, 256), "divide": False, "narrow": narrow}
        kernels.encode_fp8(every, codes=codes, instruction_set=instruction_set, **how)
        ops.encode_fp8(every, codes=expected, **how)
        assert torch.equal(bits(codes), bits(expected))


@every_instruction_set
def test_encode_every_rounding(instruction_set: str) -> None:
    """Around each code: its value, its neighbours in float32, and the middle between it and the next one."""
    every = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (every[:-1] + every[1:]) / 2
    up = torch.tensor(float("inf"))
    column = torch.cat([every, middles, *[t.nextafter(s) for t in (every, middles) for s in (up, -up)], up.view(1)])
    matrix = torch.cat([column, -column, torch.tensor([464.0, 465.0, 1e30])]).view(1, -1)
    codes, expected = torch.empty(2, *matrix.shape, dtype=torch.float8_e4m3fn)
    one = torch.ones(1, 1)
    block = (1, matrix.shape[1])
    kernels.encode_fp8(matrix, scales=one, block=block, divide=False, codes=codes, instruction_set=instruction_set)
    ops.encode_fp8(matrix, scales=one, block=block, divide=False, codes=expected)
    assert torch.equal(bits(codes), bits(expected))
    assert torch.equal(codes[0, :0x7F].float(), every)


@every_instruction_set
@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 200),
    gap=st.integers(0, 5),
    block=st.sampled_from(BLOCKS),
    format=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_decode(
    instruction_set: str,
    rows: int,
    columns: int,
    gap: int,
    block: tuple[int, int],
    format: torch.dtype,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(0, 256, (rows, columns + gap), generator=generator, dtype=torch.uint8)
    codes = wide.view(format)[:, :columns]
    scales = some_scales(generator, *grid(rows, columns, block))
    out, memory = guarded(dtype, rows, columns)
    kernels.decode_fp8(codes, scales=scales, block=block, out=out, instruction_set=instruction_set)
    expected = torch.empty_like(out)
    ops.decode_fp8(codes, scales=scales, block=block, out=expected)
    assert same_floats(out, expected)
    nothing_else_was_written(out, memory)


@every_instruction_set
@settings(deadline=None, max_examples=120)
@given(
    x_rows=st.sampled_from([0, 1, 2, 3, 4, 7]),
    rows=st.integers(0, 40),
    columns=st.integers(0, 300),
    gap=st.integers(0, 5),
    block=st.sampled_from(BLOCKS),
    format=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    kind=st.sampled_from(["normal", "zeros", "wide", "infinities"]),
    odd=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_multiply(
    instruction_set: str,
    x_rows: int,
    rows: int,
    columns: int,
    gap: int,
    block: tuple[int, int],
    format: torch.dtype,
    kind: str,
    odd: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(0, 256, (rows, columns + gap), generator=generator, dtype=torch.uint8)
    if not odd:  # or there would hardly be a row without a NaN
        wide.clamp_(max=0x7B)
    codes = wide.view(format)[:, :columns]
    x = some_weights(generator, kind, x_rows * columns, torch.float32).view(x_rows, columns).contiguous()
    scales = some_scales(generator, *grid(rows, columns, block))
    out, memory = guarded(dtype, x_rows, rows)
    kernels.multiply_fp8(x, codes=codes, scales=scales, block=block, out=out, instruction_set=instruction_set)
    assert same_floats(out, reference.multiply_fp8(x, codes, scales, block, dtype))
    nothing_else_was_written(out, memory)


@every_instruction_set
@settings(deadline=None, max_examples=100)
@given(count=st.integers(0, 600), **weights)
def test_cast(instruction_set: str, kind: str, dtype: torch.dtype, seed: int, count: int) -> None:
    if dtype != torch.float32:
        same_as_torch(some_weights(torch.Generator().manual_seed(seed), kind, count, dtype), instruction_set)


@every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_cast_every_value(instruction_set: str, dtype: torch.dtype) -> None:
    same_as_torch(torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype), instruction_set)


def same_as_torch(flat: Tensor, instruction_set: str) -> None:
    target = torch.float16 if flat.dtype == torch.bfloat16 else torch.bfloat16
    out, memory = guarded(target, flat.numel())
    kernels.cast(flat, out=out, instruction_set=instruction_set)
    assert same_floats(out, flat.to(target))
    nothing_else_was_written(out, memory)
