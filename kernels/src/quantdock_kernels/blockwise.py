"""Kernels that share a scale between a block of consecutive elements."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from quantdock_kernels._arguments import check, check_blocksize, check_floats
from quantdock_kernels._library import function


def quantize_4bit(
    flat: Tensor,
    *,
    bounds: Tensor,
    codes: Tensor,
    blocksize: int,
    packed: Tensor,
    absmax: Tensor,
    instruction_set: str | None = None,
) -> None:
    """See ``quantdock.ops.quantize_blockwise_4bit``.

    Args:
        flat: float32, bfloat16 or float16 ``[count]``; read.
        bounds: float32 ``[15]``, ascending; read.
        codes: uint8 ``[16]``, below 16; read.
        blocksize: elements that share a scale; even.
        packed: uint8 ``[ceil(count / 2)]``; written.
        absmax: float32 ``[ceil(count / blocksize)]``; written.
        instruction_set: one of ``instruction_sets()``, instead of ``instruction_set()``.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    dtype = check_floats("flat", flat, 1)
    check_blocksize(blocksize)
    count = flat.numel()
    call = function("quantize_4bit", instruction_set, c_void_p, c_int, c_int64, c_int64, *[c_void_p] * 4)
    call(
        flat.data_ptr(),
        dtype,
        count,
        blocksize,
        check("bounds", bounds, torch.float32, 15),
        check("codes", codes, torch.uint8, 16),
        check("packed", packed, torch.uint8, (count + 1) // 2),
        check("absmax", absmax, torch.float32, -(-count // blocksize)),
    )


def quantize_8bit(
    flat: Tensor,
    *,
    table: Tensor,
    blocksize: int,
    codes: Tensor,
    absmax: Tensor,
    instruction_set: str | None = None,
) -> None:
    """See ``quantdock.ops.quantize_blockwise_8bit``.

    Args:
        flat: float32, bfloat16 or float16 ``[count]``; read.
        table: uint8 ``[65536]``; read.
        blocksize: elements that share a scale; even.
        codes: uint8 ``[count]``; written.
        absmax: float32 ``[ceil(count / blocksize)]``; written.
        instruction_set: one of ``instruction_sets()``, instead of ``instruction_set()``.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    dtype = check_floats("flat", flat, 1)
    check_blocksize(blocksize)
    count = flat.numel()
    call = function("quantize_8bit", instruction_set, c_void_p, c_int, c_int64, c_int64, *[c_void_p] * 3)
    call(
        flat.data_ptr(),
        dtype,
        count,
        blocksize,
        check("table", table, torch.uint8, 1 << 16),
        check("codes", codes, torch.uint8, count),
        check("absmax", absmax, torch.float32, -(-count // blocksize)),
    )
