"""4-bit codes among decision bounds, with a scale per block."""

from __future__ import annotations

import torch
from torch import Tensor

from quantdock.ops import search_4bit, table_4bit
from quantdock.ops.arguments import FLOATS, expect, expect_blocks
from quantdock.ops.choice import compiled

WORKING_BYTES_4BIT = table_4bit.WORKING_BYTES
"""Upper bound of the temporaries of ``quantize_blockwise_4bit``, for blocks of up to 28672 elements."""


def quantize_blockwise_4bit(
    flat: Tensor, *, bounds: Tensor, codes: Tensor, blocksize: int, packed: Tensor, absmax: Tensor
) -> None:
    """Divide blocks by their largest magnitude, and give each element the code of the interval that it falls into.

    In a block of ``blocksize`` elements, each is multiplied with the float32 reciprocal of ``max(absmax, 1e-38)``. The
    elements after the last whole block are divided by it, and it is what ``absmax`` gets there. An element's rank is
    the number of bounds that it isn't at or below; a NaN's is 15. The scale of a block with NaNs is a NaN; nobody says
    which.

    Args:
        flat: floats ``[count]``, contiguous, on CPU; not changed.
        bounds: float32 ``[15]``, ascending, in [-1, 1].
        codes: uint8 ``[16]``, rank to code, each below 16.
        blocksize: elements that share a scale; even.
        packed: uint8 ``[ceil(count / 2)]``, written: two codes to a byte, the first in the high half. The last code of
            an odd count is paired with the code of zero.
        absmax: float32 ``[ceil(count / blocksize)]``, written.

    Raises:
        ValueError: an argument isn't as described; nothing has been written.
    """
    blocks = expect_blocks(flat, blocksize)
    expect("bounds", bounds, torch.float32, 15)
    expect("codes", codes, torch.uint8, 16)
    expect("packed", packed, torch.uint8, (flat.numel() + 1) // 2)
    expect("absmax", absmax, torch.float32, blocks)
    kernels = compiled(flat)
    if kernels is not None and flat.dtype in FLOATS:
        kernels.quantize_4bit(flat, bounds=bounds, codes=codes, blocksize=blocksize, packed=packed, absmax=absmax)
        return
    whole = flat.numel() // blocksize * blocksize
    table = None if blocksize % 8 else table_4bit.table_of(tuple(bounds.tolist()), tuple(codes.tolist()))
    if table is None:
        search_4bit.quantize(flat[:whole], bounds, codes, blocksize, packed, absmax)
    else:
        table_4bit.quantize(flat[:whole], table, bounds, codes, blocksize, packed, absmax)
    if whole < flat.numel():
        search_4bit.quantize_rest(flat[whole:], bounds, codes, packed[whole // 2 :], absmax[whole // blocksize :])
