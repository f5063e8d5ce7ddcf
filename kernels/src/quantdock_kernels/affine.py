"""Integers nearest to scaled values."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from quantdock_kernels._arguments import check, check_floats, check_positive
from quantdock_kernels._library import function


def quantize_affine(
    matrix: Tensor,
    *,
    group: int,
    scales: Tensor,
    shifts: Tensor | None,
    zeros: Tensor | None,
    divide: bool,
    lowest: int,
    highest: int,
    codes: Tensor,
    instruction_set: str | None = None,
) -> None:
    """See ``quantdock.ops.quantize_affine``.

    Args:
        matrix: float32, bfloat16 or float16 ``[rows, columns]``, any distance between rows; read.
        group: elements of a row that share their parameters; the last group of a row may be smaller.
        scales: float32, bfloat16 or float16 ``[rows, ceil(columns / group)]``; read.
        shifts: of the dtype and shape of ``scales``; read.
        zeros: of the dtype of ``codes`` and the shape of ``scales``; read.
        divide: by scales, instead of multiplying with them.
        lowest, highest: the limits of codes; in the range of their dtype.
        codes: int8 or uint8 ``[rows, columns]``; written.
        instruction_set: one of ``instruction_sets()``, instead of ``instruction_set()``.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    dtype = check_floats("matrix", matrix, 2)
    check_positive("group", group)
    scale_dtype = check_floats("scales", scales, 2)
    if codes.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"codes are {codes.dtype}, expected {torch.int8} or {torch.uint8}")
    limits = torch.iinfo(codes.dtype)
    if not limits.min <= lowest <= highest <= limits.max:
        raise ValueError(f"codes from {lowest} to {highest}, expected a range within {limits.min} to {limits.max}")
    rows, columns = matrix.shape
    shape = (rows, -(-columns // group))
    call = function(
        "quantize_affine",
        instruction_set,
        *[c_void_p, c_int, c_int64, c_int64, c_int64, c_int64],
        *[c_void_p, c_void_p, c_int, c_void_p, c_int, c_int, c_int, c_int, c_void_p],
    )
    call(
        matrix.data_ptr(),
        dtype,
        rows,
        columns,
        matrix.stride(0),
        group,
        check("scales", scales, scales.dtype, *shape),
        None if shifts is None else check("shifts", shifts, scales.dtype, *shape),
        scale_dtype,
        None if zeros is None else check("zeros", zeros, codes.dtype, *shape),
        codes.dtype == torch.int8,
        divide,
        lowest,
        highest,
        check("codes", codes, codes.dtype, rows, columns),
    )
