"""4-bit codes as they are defined, by a search among the bounds: the reference for everything that is faster."""

from __future__ import annotations

import torch
from torch import Tensor

from quantdock.ops.chunks import CHUNK

SMALLEST_SCALE = 1e-38
"""What a smaller scale is taken for: the reciprocal of some smaller ones is infinite."""


def quantize(flat: Tensor, bounds: Tensor, codes: Tensor, blocksize: int, packed: Tensor, absmax: Tensor) -> None:
    """Quantize whole blocks, as they are defined."""
    # Pieces so small that torch searches in the calling thread.
    piece = max(blocksize, CHUNK // 8 // blocksize * blocksize)
    for start in range(0, flat.numel(), piece):
        values = flat[start : start + piece].float().view(-1, blocksize)
        scales = values.abs().max(1).values
        absmax[start // blocksize : start // blocksize + len(scales)] = scales
        values = values * scales.clamp_(min=SMALLEST_SCALE).reciprocal_().unsqueeze(1)
        found = _search(values.view(-1), bounds, codes)
        packed[start // 2 : start // 2 + len(found)] = found


def quantize_rest(flat: Tensor, bounds: Tensor, codes: Tensor, packed: Tensor, absmax: Tensor) -> None:
    """Quantize what is less than a block, as it is defined."""
    scale = flat.float().abs().max().clamp(min=SMALLEST_SCALE)
    absmax[0] = scale
    values = flat.float() / scale
    packed[:] = _search(torch.nn.functional.pad(values, (0, len(values) % 2)), bounds, codes)


def _search(values: Tensor, bounds: Tensor, codes: Tensor) -> Tensor:
    found = codes.index_select(0, torch.bucketize(values, bounds, out_int32=True))
    return found[::2] << 4 | found[1::2]
