"""From the extremes of a group to what ``quantize_affine`` takes: the formulas that are in use for integers.

Extremes come from ``group_extremes``. Every formula is in the dtype that they are in, the one of the weights, as the
libraries have it; ``dtype`` is what the result is rounded to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parameters:
    """How a group becomes integers. All tensors have the shape of the extremes."""

    stored: Tensor
    """The step from a code to the next: what a checkpoint calls scale."""
    scales: Tensor
    """What ``quantize_affine`` takes: ``stored``, or its reciprocal."""
    divide: bool
    lowest: int
    highest: int
    shifts: Tensor | None = None
    zeros: Tensor | None = None
    middles: Tensor | None = None
    """What the code in the middle stands for, where a checkpoint has that as its zero."""


def symmetric(
    smallest: Tensor, largest: Tensor, *, lowest: int, highest: int, least: float, dtype: torch.dtype
) -> Parameters:
    """Half of the range of codes for the largest magnitude; a product with the reciprocal of the scale.

    The formula of torchao 0.18, ``choose_qparams_affine`` with ``MappingType.SYMMETRIC``: per row, with codes from -128
    to 127, ``least=torch.finfo(torch.float32).eps`` and ``dtype=torch.float32``, that of its ``Int8Tensor``.

    Args:
        smallest, largest: the extremes.
        lowest, highest: the limits of codes.
        least: what a smaller scale is taken for.
        dtype: of scales.
    """
    scale = torch.maximum(-smallest.clamp(max=0), largest.clamp(min=0)) / ((highest - lowest) / 2)
    scale = scale.clamp(min=least)
    zeros = torch.full_like(scale, (highest + lowest + 1) // 2, dtype=_codes(lowest))
    return _with_reciprocal(scale.to(dtype), zeros, lowest, highest)


def asymmetric(
    smallest: Tensor, largest: Tensor, *, lowest: int, highest: int, least: float, dtype: torch.dtype
) -> Parameters:
    """The whole range of codes for the extremes and zero, which is exact; a product with the reciprocal of the scale.

    The formula of torchao 0.18, ``choose_qparams_affine`` with ``MappingType.ASYMMETRIC``. The arguments are those of
    ``symmetric``.
    """
    smallest, largest = smallest.clamp(max=0), largest.clamp(min=0)
    scale = ((largest - smallest) / float(highest - lowest)).clamp(min=least)
    zeros = (lowest - (smallest / scale).round()).clamp(lowest, highest)
    return _with_reciprocal(scale.to(dtype), zeros.to(_codes(lowest)), lowest, highest)


def midpoint(smallest: Tensor, largest: Tensor, *, bits: int, least: float, dtype: torch.dtype) -> Parameters:
    """The whole range of codes for the extremes; a quotient.

    The formula of torchao 0.18 for aten's 4-bit kernels, ``_choose_qparams_affine_tinygemm`` and
    ``_quantize_affine_tinygemm``; ``least`` is 1e-6 there.
    """
    highest = 2**bits - 1
    scale = ((largest - smallest) / float(highest)).clamp(min=least)
    half = 2 ** (bits - 1)
    middles = (smallest + scale * half).to(dtype)
    scale = scale.to(dtype)
    return Parameters(scale, scale, True, 0, highest, shifts=-(middles - scale * half), middles=middles)


def absmax(smallest: Tensor, largest: Tensor, *, highest: int) -> Parameters:
    """The highest code for the largest magnitude; a quotient. A group of zeros has scale 0, and code 0.

    The formula of optimum-quanto 0.2.7, ``AbsmaxOptimizer`` and ``quantize_symmetric``: qint8 with ``highest=127``.
    Codes go one below the negative of the highest one.
    """
    scale = torch.maximum(-smallest, largest) / highest
    return Parameters(scale, scale, True, -highest - 1, highest)


def shifted(smallest: Tensor, largest: Tensor, *, bits: int) -> Parameters:
    """The whole range of codes for the extremes, of which the smallest is subtracted first; a quotient.

    The formula of optimum-quanto 0.2.7, ``MaxOptimizer`` and ``quantize_affine``: qint4 and qint2.
    """
    scale = (largest - smallest) / (2**bits - 1)
    return Parameters(scale, scale, True, 0, 2**bits - 1, shifts=-smallest)


def including_zero(smallest: Tensor, largest: Tensor, *, bits: int, is_symmetric: bool) -> Parameters:
    """Round to nearest as GPTQ's ``Quantizer.find_params`` has it: the extremes and zero, in float32; a quotient.

    If symmetric, the range is that of the largest magnitude to both sides, and zero is the code in the middle. A group
    of zeros is taken for one from -1 to 1.
    """
    smallest, largest = smallest.float().clamp(max=0), largest.float().clamp(min=0)
    if is_symmetric:
        largest = torch.maximum(-smallest, largest)
        smallest = torch.where(smallest < 0, -largest, smallest)
    empty = (smallest == 0) & (largest == 0)
    smallest, largest = smallest.masked_fill(empty, -1.0), largest.masked_fill(empty, 1.0)
    highest = 2**bits - 1
    scale = (largest - smallest) / highest
    if is_symmetric:
        zeros = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    else:
        zeros = (-smallest / scale).round().clamp(0, highest).to(torch.uint8)
    return Parameters(scale, scale, True, 0, highest, zeros=zeros)


def limited(smallest: Tensor, largest: Tensor, *, bits: int) -> Parameters:
    """Round to nearest as AWQ's ``pseudo_quantize_tensor`` has it: all codes for the extremes; a quotient.

    The zero is limited to codes, so that of a group without both signs doesn't stand for 0.
    """
    highest = 2**bits - 1
    scale = (largest - smallest).clamp(min=1e-5) / highest
    zeros = (-(smallest / scale).round()).clamp(0, highest).to(torch.uint8)
    return Parameters(scale, scale, True, 0, highest, zeros=zeros)


def _codes(lowest: int) -> torch.dtype:
    return torch.int8 if lowest < 0 else torch.uint8


def _with_reciprocal(stored: Tensor, zeros: Tensor, lowest: int, highest: int) -> Parameters:
    return Parameters(stored, 1.0 / stored, False, lowest, highest, zeros=zeros)
