"""8-bit quantization (LLM.int8) as pure tensor functions, with the bits that bitsandbytes itself gives."""

from __future__ import annotations

import functools

import bitsandbytes as bnb
import torch
from torch import Tensor

from quantdock import ops

_CPU_PIECE = 28672
"""Elements that bitsandbytes' own operator gets at a time; up to 32768 torch works in the calling thread."""

_DEVICE_PIECE = 1 << 20
"""The same where memory is what has to be bounded, and a launch must not be too small."""


def working_bytes(columns: int) -> int:
    """Upper bound of the temporaries of ``quantize``, on any device."""
    return max(4 * max(_DEVICE_PIECE, 12 * columns), ops.rows_int8_working_bytes(columns))


def quantize_rows_into(matrix: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Quantize some rows of a matrix, which don't depend on one another, into their part of the result.

    Args:
        matrix: ``[rows, columns]`` of floats, with any strides; not changed.
        codes: contiguous ``int8 [rows, columns]``, written.
        scales: contiguous ``float32 [rows]``, written.
    """
    if matrix.device.type != "cpu":
        _by_bitsandbytes(matrix, codes, scales, _DEVICE_PIECE)
    elif _agrees():
        ops.quantize_rows_int8(matrix, codes=codes, scales=scales)
    else:
        _by_bitsandbytes(matrix, codes, scales, _CPU_PIECE)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """What ``bitsandbytes.functional.int8_vectorwise_dequant`` gives: ``float32 [rows, columns]``."""
    return bnb.functional.int8_vectorwise_dequant(codes, scales)  # type: ignore[no-any-return]


def _by_bitsandbytes(matrix: Tensor, codes: Tensor, scales: Tensor, piece: int) -> None:
    """Run bitsandbytes' own operator on a few rows at a time."""
    rows = max(1, piece // matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        part = matrix[start : start + rows].to(torch.float16, memory_format=torch.contiguous_format)
        codes[start : start + rows], scales[start : start + rows], _ = bnb.functional.int8_vectorwise_quant(part)


@functools.cache
def _agrees() -> bool:
    """Whether the installed bitsandbytes gives the bits of the operation; asked once per process."""
    sample = torch.randn(64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    sample[:3] *= sample.new_tensor([0.0, 1e-7, 6e4]).unsqueeze(1)
    codes = torch.empty_like(sample, dtype=torch.int8)
    scales = sample.new_empty(len(sample))
    ops.quantize_rows_int8(sample, codes=codes, scales=scales)
    expected, expected_scales, _ = bnb.functional.int8_vectorwise_quant(sample.to(torch.float16))
    return torch.equal(codes, expected) and torch.equal(scales, expected_scales)
