"""The layout that bitsandbytes' CPU kernel reads 4-bit weights in, made from the stored one and back.

Stored: a byte holds two neighbours of a row, the first in the high half. For the kernel, 32 rows form a group; column
pair by column pair, a byte holds the same column of row ``r`` (low half) and of row ``r + 16`` (high half) of the
group. So both forms of a group fill the same number of bytes, and none depends on another.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

GROUP = 32
_HALF = GROUP // 2
_STEP = 4 << 20  # bytes repacked at a time, so that the temporaries stay small beside the weight


def fits(state: QuantState) -> bool:
    """Whether the kernel can read a weight of this shape; bitsandbytes itself fails on others."""
    rows, columns = state.shape
    return bool(rows % GROUP == 0 and columns % state.blocksize == 0)


def to_kernel(data: Tensor, state: QuantState) -> tuple[Tensor, QuantState]:
    """The weight as the kernel wants it: ``uint8 [rows, columns / 2]`` and a state of its own; nothing given changes.

    The kernel wants scales in bfloat16, transposed, so those of ``state`` can't be had back from them.
    """
    rows, columns = state.shape
    stored = data.reshape(-1).view(torch.uint8).view(rows // GROUP, GROUP, columns // 2)
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device="cpu")
    kernel = packed.view(rows // GROUP, columns // 2, _HALF, 2)
    step = max(1, _STEP // (GROUP * columns // 2))
    for source, target in zip(_split(stored, step), _split(kernel, step), strict=True):
        low, high = source[:, :_HALF], source[:, _HALF:]
        target[..., 0] = ((low >> 4) | (high & 0xF0)).transpose(1, 2)
        target[..., 1] = ((low & 0x0F) | (high << 4)).transpose(1, 2)
    scales = _scales(state).view(rows, columns // state.blocksize)
    result = QuantState(
        absmax=scales.T.to(torch.bfloat16).contiguous(),
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=torch.bfloat16,
    )
    result.packing_format_for_cpu = True
    return packed, result


def from_kernel(packed: Tensor, quant_storage: torch.dtype) -> Tensor:
    """The stored form of a weight that ``to_kernel`` made: ``quant_storage [elements, 1]``; nothing given changes."""
    rows, half = packed.shape
    kernel = packed.view(rows // GROUP, half, _HALF, 2)
    data = torch.empty(rows * half, dtype=torch.uint8, device="cpu")
    stored = data.view(rows // GROUP, GROUP, half)
    step = max(1, _STEP // (GROUP * half))
    for source, target in zip(_split(kernel, step), _split(stored, step), strict=True):
        first, second = source[..., 0].transpose(1, 2), source[..., 1].transpose(1, 2)
        target[:, :_HALF] = (first << 4) | (second & 0x0F)
        target[:, _HALF:] = (first & 0xF0) | (second >> 4)
    return data.view(quant_storage).unsqueeze(1)


def _split(tensor: Tensor, step: int) -> tuple[Tensor, ...]:
    return torch.split(tensor, step)


def _scales(state: QuantState) -> Tensor:
    if not state.nested:
        return state.absmax  # type: ignore[no-any-return]
    scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
    scales += state.offset
    return scales.float()  # type: ignore[no-any-return]
