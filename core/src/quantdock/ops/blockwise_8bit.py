"""8-bit codes from a table, with a scale per block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantdock.ops.arguments import FLOATS, expect, expect_blocks
from quantdock.ops.choice import compiled

CELLS = 1 << 16

_STEP = 2048
"""Elements that torch works on at a time: these are scales more often than weights, so memory counts for more."""

WORKING_BYTES_8BIT = 32 * _STEP
"""Upper bound of the temporaries of ``quantize_blockwise_8bit``, for blocks of up to 2048 elements."""


def quantize_blockwise_8bit(flat: Tensor, *, table: Tensor, blocksize: int, codes: Tensor, absmax: Tensor) -> None:
    """Divide blocks by their largest magnitude, and look up each element's code in a table over [-1, 1].

    Each element is multiplied with the float32 reciprocal of its block's largest magnitude, in which NaNs don't count,
    and limited to [-1, 1]. A ``value`` is in cell ``int((value + 1) * 0.5 * 65535 + 0.5)``, where all is float32 but
    the last product and sum, which are rounded once, as a fused operation does it. A NaN, such as a zero in a block of
    zeros becomes, is in cell 0.

    Args:
        flat: floats ``[count]``, contiguous, on CPU; not changed.
        table: uint8 ``[65536]``: cell to code.
        blocksize: elements that share a scale; even. The last block may be shorter.
        codes: uint8 ``[count]``, written.
        absmax: float32 ``[ceil(count / blocksize)]``, written.

    Raises:
        ValueError: an argument isn't as described; nothing has been written.
    """
    blocks = expect_blocks(flat, blocksize)
    expect("table", table, torch.uint8, CELLS)
    expect("codes", codes, torch.uint8, flat.numel())
    expect("absmax", absmax, torch.float32, blocks)
    kernels = compiled(flat)
    if kernels is not None and flat.dtype in FLOATS:
        kernels.quantize_8bit(flat, table=table, blocksize=blocksize, codes=codes, absmax=absmax)
        return
    whole = flat.numel() // blocksize * blocksize
    step = max(blocksize, _STEP // blocksize * blocksize)
    for start in range(0, whole, step):
        end = min(start + step, whole)
        scales = absmax[start // blocksize : end // blocksize]
        _quantize(flat[start:end].view(-1, blocksize), table, codes[start:end], scales)
    if whole < flat.numel():
        _quantize(flat[whole:].unsqueeze(0), table, codes[whole:], absmax[whole // blocksize :])


def _quantize(blocks: Tensor, table: Tensor, codes: Tensor, absmax: Tensor) -> None:
    values = blocks.float()
    torch.amax(values.abs().nan_to_num_(nan=0.0, posinf=math.inf), 1, out=absmax)
    values = values.mul(absmax.reciprocal().unsqueeze(1)).clamp_(-1, 1)
    # float64 holds the product and the sum exactly.
    cells = values.add_(1).mul_(0.5).double().mul_(CELLS - 1).add_(0.5).float().nan_to_num_(nan=0.0)
    torch.index_select(table, 0, cells.to(torch.int32).view(-1), out=codes)
