"""From weights to 8-bit codes and back, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from quantdock import ops
from quantdock_fp8.scheme import Block


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


def decode(codes: Tensor, scales: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """``codes.to(torch.float32) * scales``, rounded once to ``dtype``.

    Args:
        codes: float8_e4m3fn ``[rows, columns]``.
        scales: ``float32 [blocks down, blocks across]``.
        block: rows and columns of a block.
        dtype: float32, bfloat16 or float16.
    """
    out = torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format)
    ops.decode_fp8(codes, scales=scales, block=block, out=out)
    return out
