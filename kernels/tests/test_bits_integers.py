"""Property: each instruction set gives the bits of the definition in torch: integers, and packed words."""

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
    definitions,  # noqa: F401 - a fixture
    every_instruction_set,
    guarded,
    nothing_else_was_written,
    some_matrix,
    some_scales,
    weights,
)

BYTES = [(torch.int8, -128, 127), (torch.uint8, 0, 255)]
LIMITS = [*BYTES, (torch.int8, -8, 7), (torch.uint8, 0, 15), (torch.uint8, 3, 3)]


@every_instruction_set
@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 200),
    gap=st.integers(0, 5),
    group=st.sampled_from([1, 7, 16, 32, 64, 128, 1000]),
    divide=st.booleans(),
    fitting=st.booleans(),
    shifted=st.booleans(),
    with_zeros=st.booleans(),
    scale_dtype=st.sampled_from(DTYPES),
    limits=st.sampled_from(LIMITS),
    **weights,
)
def test_affine(
    instruction_set: str,
    kind: str,
    dtype: torch.dtype,
    seed: int,
    rows: int,
    columns: int,
    gap: int,
    group: int,
    divide: bool,
    fitting: bool,
    shifted: bool,
    with_zeros: bool,
    scale_dtype: torch.dtype,
    limits: tuple[torch.dtype, int, int],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = some_matrix(generator, kind, rows, columns, gap, dtype)
    shape = rows, -(-columns // group)
    scales = some_scales(generator, *shape)
    if fitting:
        magnitudes = torch.empty(shape, dtype=dtype)
        ops.group_magnitudes(matrix, group=group, magnitudes=magnitudes)
        scales = magnitudes.float() / 7 if divide else 7 / magnitudes.float()
    scales = scales.to(scale_dtype)
    code_dtype, lowest, highest = limits
    info = torch.iinfo(code_dtype)
    zeros = torch.randint(info.min, info.max + 1, shape, generator=generator).to(code_dtype) if with_zeros else None
    shifts = torch.randn(shape, generator=generator).to(scale_dtype) if shifted else None
    codes, memory = guarded(code_dtype, rows, columns)
    arguments = {
        "group": group,
        "scales": scales,
        "shifts": shifts,
        "zeros": zeros,
        "divide": divide,
        "lowest": lowest,
        "highest": highest,
    }
    kernels.quantize_affine(matrix, codes=codes, instruction_set=instruction_set, **arguments)
    expected = torch.empty_like(codes)
    ops.quantize_affine(matrix, codes=expected, **arguments)
    assert torch.equal(codes, expected)
    nothing_else_was_written(codes, memory)


@every_instruction_set
@pytest.mark.parametrize("bits", [2, 3, 4, 8, "awq"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("turn", [False, True])
@settings(deadline=None, max_examples=40)
@given(streams=st.integers(0, 150), length=st.integers(0, 300), seed=st.integers(0, 2**32))
def test_words(
    instruction_set: str, bits: int | str, dim: int, turn: bool, streams: int, length: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    awq = bits == "awq"
    size = 4 if isinstance(bits, str) else bits
    length = length // 8 * 8 if awq else length
    count = -(-length * size // 32)
    shape = (streams, count) if dim else (count, streams)
    given_words = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    codes, memory = guarded(torch.uint8, *((streams, length) if dim != turn else (length, streams)))
    options = {"bits": size, "dim": dim, "turn": turn, "interleaved": awq}
    kernels.unpack_words(given_words, codes=codes, instruction_set=instruction_set, **options)
    expected = torch.empty_like(codes)
    ops.unpack_words(given_words, codes=expected, **options)
    assert torch.equal(codes, expected)
    nothing_else_was_written(codes, memory)

    codes = torch.randint(0, 256, codes.shape, generator=generator, dtype=torch.uint8)
    words, memory = guarded(torch.int32, *shape)
    kernels.pack_words(codes, words=words, instruction_set=instruction_set, **options)
    expected = torch.empty_like(words)
    ops.pack_words(codes, words=expected, **options)
    assert torch.equal(words, expected)
    nothing_else_was_written(words, memory)
