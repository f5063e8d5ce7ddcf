"""Kernels that look for what the scale of a group of elements is made from."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

from torch import Tensor

from quantdock_kernels._arguments import check, check_floats, check_positive
from quantdock_kernels._library import function


def group_extremes(
    matrix: Tensor, *, group: int, smallest: Tensor, largest: Tensor, instruction_set: str | None = None
) -> None:
    """See ``quantdock.ops.group_extremes``.

    Args:
        matrix: float32, bfloat16 or float16 ``[rows, columns]``, any distance between rows; read.
        group: elements of a row that belong together; the last group of a row may be smaller.
        smallest, largest: of the matrix's dtype, ``[rows, ceil(columns / group)]``; written.
        instruction_set: one of ``instruction_sets()``, instead of ``instruction_set()``.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    dtype = check_floats("matrix", matrix, 2)
    check_positive("group", group)
    rows, columns = matrix.shape
    call = function("group_extremes", instruction_set, c_void_p, c_int, *[c_int64] * 4, c_void_p, c_void_p)
    call(
        matrix.data_ptr(),
        dtype,
        rows,
        columns,
        matrix.stride(0),
        group,
        check("smallest", smallest, matrix.dtype, rows, -(-columns // group)),
        check("largest", largest, matrix.dtype, rows, -(-columns // group)),
    )


def group_magnitudes(matrix: Tensor, *, group: int, magnitudes: Tensor, instruction_set: str | None = None) -> None:
    """See ``quantdock.ops.group_magnitudes``.

    Args:
        matrix: float32, bfloat16 or float16 ``[rows, columns]``, any distance between rows; read.
        group: elements of a row that belong together; the last group of a row may be smaller.
        magnitudes: of the matrix's dtype, ``[rows, ceil(columns / group)]``; written.
        instruction_set: one of ``instruction_sets()``, instead of ``instruction_set()``.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    dtype = check_floats("matrix", matrix, 2)
    check_positive("group", group)
    rows, columns = matrix.shape
    call = function("group_magnitudes", instruction_set, c_void_p, c_int, *[c_int64] * 4, c_void_p)
    call(
        matrix.data_ptr(),
        dtype,
        rows,
        columns,
        matrix.stride(0),
        group,
        check("magnitudes", magnitudes, matrix.dtype, rows, -(-columns // group)),
    )
