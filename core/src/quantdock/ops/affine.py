"""Integers nearest to scaled values, with parameters per group of elements along a row."""

from __future__ import annotations

import torch
from torch import Tensor

from quantdock.ops.arguments import expect, expect_matrix, expect_positive, has_whole_rows
from quantdock.ops.blocks import row_pieces, spread
from quantdock.ops.choice import compiled


def quantize_affine(
    matrix: Tensor,
    *,
    group: int,
    scales: Tensor,
    divide: bool,
    lowest: int,
    highest: int,
    codes: Tensor,
    shifts: Tensor | None = None,
    zeros: Tensor | None = None,
) -> None:
    """``clamp(round((matrix + shifts) / scales) + zeros, lowest, highest)``, or ``* scales``; ties are rounded to even.

    Steps are in the dtype that torch would choose: that of both the matrix and the scales, or float32 if they differ.
    The functions of ``quantdock.ops.parameters`` find scales, shifts and zeros. A NaN has code 0, whatever the limits.

    Args:
        matrix: float32, bfloat16 or float16 ``[rows, columns]`` with any strides; not changed. Compiled code
            needs it on CPU, and the elements of a row side by side.
        group: elements that share their parameters; the last group of a row may be smaller.
        scales: float32, bfloat16 or float16 ``[rows, ceil(columns / group)]``.
        divide: by scales, instead of multiplying with them. The two round differently.
        lowest, highest: the limits of codes, in the range of their dtype.
        codes: int8 or uint8 ``[rows, columns]``, written.
        shifts: added before; of the dtype and shape of ``scales``.
        zeros: added after; of the dtype of ``codes`` and the shape of ``scales``.

    Raises:
        ValueError: an argument isn't as described; nothing has been written.
    """
    expect_matrix("matrix", matrix)
    expect_positive("group", group)
    expect_matrix("codes", codes, (torch.int8, torch.uint8))
    expect_matrix("scales", scales)
    shape = (len(matrix), -(-matrix.shape[1] // group))
    expect("scales", scales, scales.dtype, *shape, device=matrix.device)
    expect("codes", codes, codes.dtype, *matrix.shape, device=matrix.device)
    if shifts is not None:
        expect("shifts", shifts, scales.dtype, *shape, device=matrix.device)
    if zeros is not None:
        expect("zeros", zeros, codes.dtype, *shape, device=matrix.device)
    limits = torch.iinfo(codes.dtype)
    if not limits.min <= lowest <= highest <= limits.max:
        raise ValueError(f"codes from {lowest} to {highest}, expected a range within {limits.min} to {limits.max}")
    kernels = compiled(matrix)
    if kernels is not None and has_whole_rows(matrix):
        kernels.quantize_affine(
            matrix,
            group=group,
            scales=scales,
            shifts=shifts,
            zeros=zeros,
            divide=divide,
            lowest=lowest,
            highest=highest,
            codes=codes,
        )
        return
    block = (1, group)
    for rows in row_pieces(*matrix.shape):
        columns = matrix.shape[1]
        values = matrix[rows]
        if shifts is not None:
            values = values + spread(shifts, block, rows, columns)
        scale = spread(scales, block, rows, columns)
        values = (values / scale if divide else values * scale).round_()
        if zeros is not None:
            values += spread(zeros, block, rows, columns)
        codes[rows] = values.clamp_(lowest, highest).nan_to_num_(nan=0.0)
