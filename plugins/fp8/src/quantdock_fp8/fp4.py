"""Floats of four bits (E2M1: OCP Microscaling Formats 1.0, section 5.3.3), two in a byte."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantdock_fp8.tiling import Block

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the codes 0 to 15 stand for."""

_ELEMENTS_AT_A_TIME = 1 << 20


def decode(codes: Tensor, scales: Tensor, block: Block, out: Tensor) -> None:
    """The value of each code times its scale, in float32, rounded once to the dtype of the result.

    Args:
        codes: uint8 ``[rows, columns / 2]``; of two neighbours, the first is in the lower half of a byte.
        scales: float32 ``[rows, columns / block[1]]``.
        block: one row, and the columns that share a scale; all blocks are as wide.
        out: float32, bfloat16 or float16 ``[rows, columns]``, written.
    """
    rows, columns = out.shape
    table = _pairs(codes.device)
    step = max(1, _ELEMENTS_AT_A_TIME // columns)
    for start in range(0, rows, step):
        part = codes[start : start + step]
        found = torch.index_select(table, 0, part.reshape(-1).to(torch.int32)).view(torch.float32)
        found.view(len(part), -1, block[1]).mul_(scales[start : start + step, :, None])
        out[start : start + step].copy_(found.view(len(part), columns))


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """Byte -> both of its values, as the bits of two float32."""
    single = torch.tensor(VALUES, device="cpu")
    both = torch.stack([single.repeat(16), single.repeat_interleave(16)], 1)
    return both.view(torch.int64).reshape(-1).to(device)
