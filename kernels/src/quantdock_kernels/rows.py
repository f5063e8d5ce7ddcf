"""Kernels that share a scale between the elements of a row."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from quantdock_kernels._arguments import check, check_floats
from quantdock_kernels._library import function


def quantize_rows_int8(matrix: Tensor, *, codes: Tensor, scales: Tensor, instruction_set: str | None = None) -> None:
    """See ``quantdock.ops.quantize_rows_int8``.

    Args:
        matrix: float32, bfloat16 or float16 ``[rows, columns]``, any distance between rows; read.
        codes: int8 ``[rows, columns]``; written.
        scales: float32 ``[rows]``; written.
        instruction_set: one of ``instruction_sets()``, instead of ``instruction_set()``.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    dtype = check_floats("matrix", matrix, 2)
    rows, columns = matrix.shape
    call = function(
        "quantize_rows_int8", instruction_set, c_void_p, c_int, c_int64, c_int64, c_int64, c_void_p, c_void_p
    )
    call(
        matrix.data_ptr(),
        dtype,
        rows,
        columns,
        matrix.stride(0),
        check("codes", codes, torch.int8, rows, columns),
        check("scales", scales, torch.float32, rows),
    )
