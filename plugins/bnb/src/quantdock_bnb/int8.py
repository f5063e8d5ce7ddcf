"""8-bit quantization (LLM.int8) as pure tensor functions, with the bits that bitsandbytes itself gives."""

from __future__ import annotations

import functools

import bitsandbytes as bnb
import torch
from torch import Tensor

from quantdock_bnb.chunks import CHUNK, chunk

_DEVICE_CHUNK = 1 << 20
"""The same where memory is what has to be bounded, and a launch must not be too small."""


_ROUNDER = 1.5 * 2**23


def working_bytes(columns: int) -> int:
    """Upper bound of the temporaries of ``quantize``, on any device."""
    return 4 * max(_DEVICE_CHUNK, 12 * columns)


def quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize as bitsandbytes' ``Int8Params`` does, bit for bit: cast to float16, then one scale per row.

    Args:
        matrix: ``[rows, columns]`` of floats, with any strides; not changed. What float16 can't hold becomes infinite,
            and its row zero, as in bitsandbytes.

    Returns:
        ``int8 [rows, columns]``, and the largest magnitude of each row, ``float32 [rows]``.
    """
    codes = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    scales = torch.empty(matrix.shape[0], dtype=torch.float32, device=matrix.device)
    if matrix.device.type != "cpu":
        _by_bitsandbytes(matrix, codes, scales, _DEVICE_CHUNK)
    elif _agrees():
        _by_rows(matrix, codes, scales)
    else:
        _by_bitsandbytes(matrix, codes, scales, CHUNK)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """What ``bitsandbytes.functional.int8_vectorwise_dequant`` gives: ``float32 [rows, columns]``."""
    return bnb.functional.int8_vectorwise_dequant(codes, scales)  # type: ignore[no-any-return]


def _by_bitsandbytes(matrix: Tensor, codes: Tensor, scales: Tensor, chunk: int) -> None:
    """Run bitsandbytes' own operator on a few rows at a time; rows don't depend on each other."""
    rows = max(1, chunk // matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        part = matrix[start : start + rows].to(torch.float16, memory_format=torch.contiguous_format)
        codes[start : start + rows], scales[start : start + rows], _ = bnb.functional.int8_vectorwise_quant(part)


def _by_rows(matrix: Tensor, codes: Tensor, scales: Tensor) -> None:
    count, columns = matrix.shape
    rows = min(count, max(1, chunk() // columns))
    # Dtypes and devices are spelled out: torch's defaults are the user's to change.
    half = torch.empty(rows, columns, dtype=torch.float16, device="cpu")
    values, magnitudes = torch.empty(2, rows, columns, dtype=torch.float32, device="cpu")
    for start in range(0, count, rows):
        size = min(rows, count - start)
        x, scale = values[:size], scales[start : start + size]
        part = matrix[start : start + size]
        # By way of float32 where that is exact, since torch is slow from bfloat16 to float16.
        x.copy_(half[:size].copy_(x.copy_(part) if part.dtype.itemsize < 8 else part))
        torch.amax(torch.abs(x, out=magnitudes[:size]), 1, out=scale)
        # So large a number leaves no room for a fraction: the sum is rounded to even, as round() does it. torch would
        # split round() between threads.
        x.mul_((127.0 / scale).unsqueeze(1)).add_(_ROUNDER).sub_(_ROUNDER)
        codes[start : start + size].copy_(x)


@functools.cache
def _agrees() -> bool:
    """Whether the installed bitsandbytes gives the bits of ``_by_rows``; asked once per process."""
    sample = torch.randn(64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    sample[:3] *= sample.new_tensor([0.0, 1e-7, 6e4]).unsqueeze(1)
    codes = torch.empty_like(sample, dtype=torch.int8)
    scales = sample.new_empty(len(sample))
    _by_rows(sample, codes, scales)
    expected, expected_scales, _ = bnb.functional.int8_vectorwise_quant(sample.to(torch.float16))
    return torch.equal(codes, expected) and torch.equal(scales, expected_scales)
