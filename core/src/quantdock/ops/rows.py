"""8-bit codes of float16 values, with a scale per row."""

from __future__ import annotations

import torch
from torch import Tensor

from quantdock.ops.arguments import FLOATS, expect
from quantdock.ops.choice import compiled
from quantdock.ops.chunks import LARGE_CHUNK, chunk

_ROUNDER = 1.5 * 2**23


def rows_int8_working_bytes(columns: int) -> int:
    """Upper bound of the temporaries of ``quantize_rows_int8``, for rows of ``columns`` elements."""
    return 12 * max(LARGE_CHUNK, columns)


def quantize_rows_int8(matrix: Tensor, *, codes: Tensor, scales: Tensor) -> None:
    """Cast to float16, and divide each row by its largest magnitude to integers from -127 to 127.

    An element is multiplied with the float32 ``(1 / scale) * 127`` and rounded to the nearest integer, ties to even.
    What float16 can't hold becomes infinite. Whatever comes out as a NaN has code 0: elements of a row of zeros or
    with a NaN, and the infinite ones of a row (the others are 0 there anyhow).

    Args:
        matrix: floats ``[rows, columns]`` with any strides, on CPU; not changed. Compiled code needs the elements of a
            row side by side.
        codes: int8 ``[rows, columns]``, written.
        scales: float32 ``[rows]``, written: the largest magnitude of each row, as float16 has it.

    Raises:
        ValueError: an argument isn't as described; nothing has been written.
    """
    if not matrix.is_floating_point() or matrix.dim() != 2 or matrix.device.type != "cpu":
        raise ValueError(
            f"matrix is {matrix.dtype} {list(matrix.shape)} on {matrix.device}, expected a matrix of floats on cpu"
        )
    expect("codes", codes, torch.int8, *matrix.shape)
    expect("scales", scales, torch.float32, matrix.shape[0])
    kernels = compiled(matrix)
    if kernels is not None and matrix.dtype in FLOATS and (matrix.stride(1) == 1 or matrix.shape[1] == 1):
        kernels.quantize_rows_int8(matrix, codes=codes, scales=scales)
    elif matrix.numel():
        _by_rows(matrix, codes, scales)
    else:
        scales.zero_()


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
