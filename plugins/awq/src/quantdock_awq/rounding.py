"""From the values of a weight to codes, scales and zero points: what both the search and the result are made with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantdock import linears, ops
from quantdock_awq.packing import BITS, GEMM, MIDDLE

SCALE_DTYPE = torch.float16
"""What AWQ's readers want, whatever the model's dtype is."""

_TOP = 2**BITS - 1
_LEAST = 1e-5  # the range that a group is taken for if it has less


class Rounded(NamedTuple):
    """A weight rounded to nearest."""

    codes: Tensor
    """uint8 ``[out, in]``."""
    zeros: Tensor
    """uint8 ``[out, groups]``."""
    scales: Tensor
    """``[out, groups]`` in ``SCALE_DTYPE``."""

    def dequantized(self) -> Tensor:
        """float32 ``[out, in]``."""
        size = self.codes.shape[1] // self.scales.shape[1]
        return linears.dequantize_columns(self.codes.t(), self.scales.t(), self.zeros.t(), size, torch.float32).t()


def round_to_nearest(rows: Tensor, size: int, *, zero_point: bool) -> Rounded:
    """The codes nearest to a weight; AWQ's formulas (AutoAWQ's ``pseudo_quantize_tensor``), in float32.

    Per group: with a zero point, the scale is ``(max(w) - min(w)) / 15`` and the zero point ``round(-min(w) / scale)``,
    where zero counts as one of the values; AWQ doesn't count it, and then has no codes for values that are all on one
    side of it. Without, the scale is ``max(|w|) / 7`` and the zero point 8. A code is ``round(w / scale) + zero`` with
    the scale as it is stored, limited to 0 and 15.

    Args:
        rows: float32 ``[out, in]``; not changed.
        size: inputs per group; it divides ``in``.
        zero_point: whether groups have zero points.
    """
    shape = (len(rows), rows.shape[1] // size)
    smallest, largest = rows.new_empty(shape), rows.new_empty(shape)
    ops.group_extremes(rows, group=size, smallest=smallest, largest=largest)
    return _rounded(rows, size, smallest, largest, zero_point=zero_point)


def round_within(rows: Tensor, size: int, limit: Tensor, *, zero_point: bool) -> Rounded:
    """``round_to_nearest`` of a weight whose groups are cut off at ``limit``, float32 ``[out, groups]``, and at its
    negative: what is beyond gets the outermost code."""
    shape = (len(rows), rows.shape[1] // size)
    smallest, largest = rows.new_empty(shape), rows.new_empty(shape)
    ops.group_extremes(rows, group=size, smallest=smallest, largest=largest)
    return _rounded(rows, size, torch.maximum(smallest, -limit), torch.minimum(largest, limit), zero_point=zero_point)


def _rounded(rows: Tensor, size: int, smallest: Tensor, largest: Tensor, *, zero_point: bool) -> Rounded:
    if zero_point:
        found = ops.parameters.limited(smallest.clamp(max=0), largest.clamp(min=0), bits=BITS)
        assert found.zeros is not None
        scales, zeros = found.stored.to(SCALE_DTYPE), found.zeros
    else:
        scales = (torch.maximum(-smallest, largest).clamp_(min=_LEAST) / (MIDDLE - 1)).to(SCALE_DTYPE)
        zeros = torch.full_like(scales, MIDDLE, dtype=torch.uint8)
    codes = torch.empty_like(rows, dtype=torch.uint8, memory_format=torch.contiguous_format)
    ops.quantize_affine(
        rows, group=size, scales=scales.float(), divide=True, lowest=0, highest=_TOP, codes=codes, zeros=zeros
    )
    return Rounded(codes, zeros, scales)


def packed(rounded: Rounded) -> dict[str, Tensor]:
    """The tensors of the form ``gemm``."""
    outputs = len(rounded.codes)
    parts = {
        "qweight": rounded.codes.new_empty(rounded.codes.shape[1], outputs // 8, dtype=torch.int32),
        "qzeros": rounded.zeros.new_empty(rounded.zeros.shape[1], outputs // 8, dtype=torch.int32),
        "scales": rounded.scales.t().contiguous(),
    }
    for part in linears.pieces(outputs, rounded.codes.shape[1]):
        GEMM.put_codes(rounded.codes[part].t(), parts["qweight"], part)
        GEMM.put_codes(rounded.zeros[part].t(), parts["qzeros"], part)
    return parts


def working_bytes(outputs: int, inputs: int) -> int:
    """Bytes that rounding and packing a weight allocate at the most."""
    return 12 * outputs * inputs  # float32 values and what the quotients are made in, codes, words
