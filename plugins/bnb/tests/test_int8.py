"""Property: 8-bit components are those of bitsandbytes, bit for bit, whatever the matrix."""

from __future__ import annotations

import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantdock_bnb import int8

sys.path.insert(0, str(Path(__file__).parent))
from whole import eight_bits


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def same_as_bitsandbytes(matrix: Tensor) -> None:
    before = matrix.clone()
    reference = bnb.nn.Int8Params(matrix.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    codes, scales = eight_bits(matrix)
    assert codes.dtype == torch.int8
    assert torch.equal(codes, reference.data)
    assert torch.equal(scales.isnan(), reference.SCB.isnan())  # which of the many NaNs it is, nobody says
    assert torch.equal(scales.nan_to_num(), reference.SCB.nan_to_num())
    assert torch.equal(bits(matrix), bits(before))


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.02, 1.0, 1e-6, 1e-8, 3e4, 1e5]),
    special=st.sampled_from([None, 0.0, float("inf"), -float("inf"), float("nan")]),
    transposed=st.booleans(),
)
def test_any_matrix(
    rows: int, columns: int, seed: int, dtype: torch.dtype, scale: float, special: float | None, transposed: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * scale
    if special is not None:
        matrix[torch.randint(rows, (1,), generator=generator)] = special
    matrix = matrix.to(dtype)
    same_as_bitsandbytes(matrix.t() if transposed else matrix)


@pytest.mark.parametrize(("rows", "columns"), [(100, 700), (3, 28677), (57, 1024), (1, 1)])
def test_across_chunks(rows: int, columns: int) -> None:
    same_as_bitsandbytes(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16())


def test_rows_by_rows() -> None:
    matrix = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scales = torch.empty(50, 70, dtype=torch.int8), torch.empty(50)
    for rows in (slice(20, 50), slice(0, 20)):
        int8.quantize_rows_into(matrix[rows], codes[rows], scales[rows])
    expected, expected_scales = eight_bits(matrix)
    assert torch.equal(codes, expected)
    assert torch.equal(scales, expected_scales)


def test_when_bitsandbytes_quantizes_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_agrees", lambda: False)
    same_as_bitsandbytes(torch.randn(100, 700, generator=torch.Generator().manual_seed(0)))


def test_it_is_asked_whether_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    int8._agrees.cache_clear()
    real = bnb.functional.int8_vectorwise_quant
    monkeypatch.setattr(bnb.functional, "int8_vectorwise_quant", lambda a: real(a * 2))
    try:
        assert not int8._agrees()
    finally:
        int8._agrees.cache_clear()


def test_dequantize() -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    codes, scales = eight_bits(matrix)
    assert torch.equal(int8.dequantize(codes, scales), bnb.functional.int8_vectorwise_dequant(codes, scales))
