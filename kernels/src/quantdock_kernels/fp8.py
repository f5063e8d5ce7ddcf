"""Kernels for 8-bit floats with a scale per block of rows and columns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from quantdock_kernels._arguments import check, check_floats, check_positive, check_rows
from quantdock_kernels._library import function
from quantdock_kernels.products import parallel

FORMATS = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}
"""What can be decoded, and the numbers in ``csrc/fp8.c``."""


def encode_fp8(
    matrix: Tensor,
    *,
    scales: Tensor,
    block: tuple[int, int],
    divide: bool,
    codes: Tensor,
    narrow: bool = False,
    instruction_set: str | None = None,
) -> None:
    """See ``quantdock.ops.encode_fp8``.

    Args:
        matrix: float32, bfloat16 or float16 ``[rows, columns]``, any distance between rows; read.
        scales: float32 ``[ceil(rows / block[0]), ceil(columns / block[1])]``; read.
        block: rows and columns that share a scale.
        divide: by scales, instead of multiplying with them.
        codes: float8_e4m3fn ``[rows, columns]``; written.
        narrow: round to the matrix's dtype first.
        instruction_set: one of ``instruction_sets()``, instead of ``instruction_set()``.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    dtype = check_floats("matrix", matrix, 2)
    check_positive("block", *block)
    rows, columns = matrix.shape
    call = function(
        "encode_fp8",
        instruction_set,
        *[c_void_p, c_int, c_int64, c_int64, c_int64],
        *[c_void_p, c_int64, c_int64, c_int, c_int, c_void_p],
    )
    call(
        matrix.data_ptr(),
        dtype,
        rows,
        columns,
        matrix.stride(0),
        check("scales", scales, torch.float32, -(-rows // block[0]), -(-columns // block[1])),
        *block,
        divide,
        narrow,
        check("codes", codes, torch.float8_e4m3fn, rows, columns),
    )


def decode_fp8(
    codes: Tensor, *, scales: Tensor, block: tuple[int, int], out: Tensor, instruction_set: str | None = None
) -> None:
    """See ``quantdock.ops.decode_fp8``.

    Args:
        codes: float8_e4m3fn or float8_e5m2 ``[rows, columns]``, any distance between rows; read.
        scales: float32 ``[ceil(rows / block[0]), ceil(columns / block[1])]``; read.
        block: rows and columns that share a scale.
        out: float32, bfloat16 or float16 ``[rows, columns]``; written.
        instruction_set: one of ``instruction_sets()``, instead of ``instruction_set()``.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    dtype = check_floats("out", out, 2)
    address = _check_codes(codes, block)
    rows, columns = codes.shape
    call = function(
        "decode_fp8", instruction_set, c_void_p, c_int, *[c_int64] * 3, c_void_p, c_int64, c_int64, c_void_p, c_int
    )
    call(
        address,
        FORMATS[codes.dtype],
        rows,
        columns,
        codes.stride(0),
        check("scales", scales, torch.float32, -(-rows // block[0]), -(-columns // block[1])),
        *block,
        check("out", out, out.dtype, rows, columns),
        dtype,
    )


def multiply_fp8(
    x: Tensor, *, codes: Tensor, scales: Tensor, block: tuple[int, int], out: Tensor, instruction_set: str | None = None
) -> None:
    """See ``quantdock.ops.multiply_fp8``; in as many threads as torch uses.

    Args:
        x: float32 ``[rows, columns]``, contiguous; read.
        codes, scales, block: as of ``decode_fp8``.
        out: float32, bfloat16 or float16 ``[rows, rows of the codes]``; written.
        instruction_set: one of ``instruction_sets()``, instead of ``instruction_set()``.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    dtype = check_floats("out", out, 2)
    address = _check_codes(codes, block)
    outputs, columns = codes.shape
    rows = len(out)
    arguments = (
        address,
        FORMATS[codes.dtype],
        outputs,
        columns,
        codes.stride(0),
        check("scales", scales, torch.float32, -(-outputs // block[0]), -(-columns // block[1])),
        *block,
        check("x", x, torch.float32, rows, columns),
        rows,
        check("out", out, out.dtype, rows, outputs),
        dtype,
    )
    _multiply(instruction_set)(*arguments, parallel(), torch.get_num_threads())


@functools.cache
def _multiply(instruction_set: str | None) -> Callable[..., None]:
    matrix = (c_void_p, c_int, *[c_int64] * 3, c_void_p, c_int64, c_int64)
    return function("multiply_fp8", instruction_set, *matrix, c_void_p, c_int64, c_void_p, c_int, c_void_p, c_int)


def _check_codes(codes: Tensor, block: tuple[int, int]) -> int:
    if codes.dtype not in FORMATS:
        raise TypeError(f"codes are {codes.dtype}, expected one of {', '.join(map(str, FORMATS))}")
    check_positive("block", *block)
    return check_rows("codes", codes, codes.dtype)
