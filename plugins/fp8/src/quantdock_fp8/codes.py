"""From weights to codes and back, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from quantdock import ops
from quantdock_fp8 import fp4
from quantdock_fp8.tiling import Block, Shape


def working_bytes(shape: tuple[int, ...], block: Block, itemsize: int) -> int:
    """Upper bound of the temporaries of ``ops.block_magnitudes``, ``ops.fp8_scales`` and ``encode``."""
    down, across = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    reduced = 3 * shape[0] * across * itemsize
    return reduced + 24 * down * across + ops.working_bytes(shape[1])


def encode(matrix: Tensor, scales: ops.Fp8Scales, block: Block, codes: Tensor) -> None:
    """Scale elements as float32 and round them to codes, to nearest with ties to even.

    Args:
        matrix: ``[rows, columns]`` of floats, with any strides; not changed.
        scales: ``[blocks down, blocks across]``, see ``quantdock.ops.fp8_scales``.
        block: rows and columns of a block.
        codes: float8_e4m3fn of the matrix's shape, written.
    """
    ops.encode_fp8(matrix, scales=scales.scales, block=block, divide=scales.divide, codes=codes)


def decode(codes: Tensor, scales: Tensor, block: Block, out: Tensor) -> None:
    """The value of each code times its scale, in float32, rounded once to the dtype of the result.

    Args:
        codes: float8_e4m3fn ``[rows, columns]``; or uint8 ``[rows, columns / 2]``, two codes of four bits in each byte.
        scales: ``float32 [blocks down, blocks across]``.
        block: rows and columns of a block.
        out: float32, bfloat16 or float16 ``[rows, columns]``, written.
    """
    if codes.dtype == torch.uint8:
        fp4.decode(codes, scales, block, out)
    else:
        ops.decode_fp8(codes, scales=scales, block=block, out=out)


def shape_of(codes: Tensor) -> Shape:
    """The shape of what is encoded: ``[..., rows, columns]``."""
    *outer, last = codes.shape
    return (*outer, 2 * last if codes.dtype == torch.uint8 else last)
