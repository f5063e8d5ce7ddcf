"""From weights to 8-bit codes and back: ``quantdock.ops`` on CPU, and the same bits in torch on other devices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantdock import ops
from quantdock_fp8.scheme import WEIGHT_DTYPE, Block

LARGEST = 448.0

_PIECE = 1 << 20
"""Elements that are worked on at a time where a launch must not be too small."""


def working_bytes(shape: tuple[int, ...], block: Block, itemsize: int) -> int:
    """Upper bound of the temporaries of ``largest``, ``ops.fp8_scales`` and ``encode``, on any device."""
    down, across = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    reduced = 3 * shape[0] * across * itemsize
    return reduced + 24 * down * across + max(16 * max(_PIECE, shape[1]), ops.working_bytes(shape[1]))


def largest(matrix: Tensor, block: Block) -> Tensor:
    """The largest magnitude of each block, in the dtype of the matrix; NaN for a block with a NaN.

    Args:
        matrix: ``[rows, columns]`` of floats, with any strides; not changed.
        block: rows and columns of a block.

    Returns:
        ``[blocks down, blocks across]``
    """
    if matrix.device.type == "cpu":
        return ops.block_magnitudes(matrix, block=block)
    return largest_in_torch(matrix, block)


def encode(matrix: Tensor, scales: ops.Fp8Scales, block: Block, codes: Tensor) -> None:
    """Scale elements as float32 and round them to codes, to nearest with ties to even.

    Args:
        matrix: as for ``largest``.
        scales: ``[blocks down, blocks across]``, see ``quantdock.ops.fp8_scales``.
        block: rows and columns of a block.
        codes: float8_e4m3fn of the matrix's shape, written.
    """
    if matrix.device.type == "cpu":
        ops.encode_fp8(matrix, scales=scales.scales, block=block, divide=scales.divide, codes=codes)
    else:
        encode_in_torch(matrix, scales, block, codes)


def decode(codes: Tensor, scales: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """``codes.to(torch.float32) * scales``, rounded once to ``dtype``.

    Args:
        codes: float8_e4m3fn ``[rows, columns]``.
        scales: ``float32 [blocks down, blocks across]``.
        block: rows and columns of a block.
        dtype: float32, bfloat16 or float16.
    """
    out = torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format)
    if codes.device.type == "cpu":
        ops.decode_fp8(codes, scales=scales, block=block, out=out)
    else:
        decode_in_torch(codes, scales, block, out)
    return out


def largest_in_torch(matrix: Tensor, block: Block) -> Tensor:
    """``largest`` on any device."""
    across = _largest_across(matrix, block[1])
    return _largest_across(across.t(), block[0]).t().contiguous()


def encode_in_torch(matrix: Tensor, scales: ops.Fp8Scales, block: Block, codes: Tensor) -> None:
    """``encode`` on any device."""
    for rows in _pieces(matrix):
        scale = _spread(scales.scales, block, rows, matrix.shape[1])
        values = matrix[rows].float()
        values = values / scale if scales.divide else values * scale
        codes[rows] = values.clamp_(-LARGEST, LARGEST).to(WEIGHT_DTYPE)


def decode_in_torch(codes: Tensor, scales: Tensor, block: Block, out: Tensor) -> None:
    """``decode`` on any device."""
    for rows in _pieces(codes):
        out[rows] = codes[rows].float().mul_(_spread(scales, block, rows, codes.shape[1]))


def _largest_across(matrix: Tensor, group: int) -> Tensor:
    whole = matrix.shape[1] // group * group
    groups = [matrix.unfold(1, group, group)] if whole else []
    if whole < matrix.shape[1]:
        groups.append(matrix[:, whole:].unsqueeze(1))
    found = [torch.maximum(part.amax(2), part.amin(2).neg_()) for part in groups]
    return torch.cat(found, 1).abs_()  # or a block of zeros may get a negative one


def _pieces(matrix: Tensor) -> Iterator[slice]:
    step = max(1, _PIECE // max(1, matrix.shape[1]))
    return (slice(start, min(start + step, len(matrix))) for start in range(0, len(matrix), step))


def _spread(scales: Tensor, block: Block, rows: slice, columns: int) -> Tensor:
    """The scale of each element of some rows, ``[rows, columns]``, or ``[rows, 1]`` where a row has only one."""
    found = scales[torch.arange(rows.start, rows.stop, device=scales.device) // block[0]]
    return found if found.shape[1] == 1 else found.repeat_interleave(block[1], 1)[:, :columns]
