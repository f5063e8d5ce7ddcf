"""Activations as floats of 8 bits: how they are quantized, and what a product of them with a weight is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantdock_fp8 import codes
from quantdock_fp8.tiling import Block

LARGEST = torch.finfo(torch.float8_e4m3fn).max

TRANSFORMERS_FLOOR = 1e-12
"""The smallest scale: ``fp8_act_quant`` of the kernels that transformers 5.23 uses (kernels-community/finegrained-fp8).
It divides by no less and keeps the scale as it is, which differs for magnitudes up to 5e-10."""

FBGEMM_FLOOR = 1 / (LARGEST * 512)
"""The smallest scale of FBGEMM's ``quantize_fp8_per_row``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """How the activations of a layer are quantized. Each row has a scale for each group of columns that share scales in
    the weight: its largest magnitude is encoded as 448."""

    static: bool = False
    """Whether there is one scale for all of them, which is stored beside the weight, instead."""
    bound: float | None = None
    """Magnitudes above it don't count for a scale, and are encoded as it."""
    floor: float = TRANSFORMERS_FLOOR
    """No scale is smaller."""

    def quantize(self, x: Tensor, block: Block, stored: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes and scales of activations.

        Args:
            x: ``[rows, columns]`` of floats, with any strides.
            block: rows and columns of the weight that share a scale.
            stored: the scale, one element, if it is ``static``.

        Returns:
            float8_e4m3fn ``[rows, columns]``, row by row; float32 ``[rows, groups]``, or ``[1, 1]`` if it is
            ``static``. Otherwise the scale of a group with a NaN is NaN, and without a bound, that of one with an
            infinity is infinite: both decode to NaN.
        """
        x = x.contiguous()
        if self.static:
            assert stored is not None
            scale = stored.to(torch.float32).reshape(1, 1)
            return _encoded(x / scale), scale
        rows, columns = x.shape
        size = min(block[1], columns)
        groups = -(-columns // size)
        whole = x if groups * size == columns else nn.functional.pad(x, (0, groups * size - columns))
        padded = whole.view(rows, groups, size)
        largest = padded.abs().amax(-1).to(torch.float32)
        if self.bound is not None:
            largest = largest.clamp_(max=self.bound)
        scales = (largest / LARGEST).clamp_(min=self.floor)
        encoded = _encoded(padded / scales[:, :, None]).view(rows, groups * size)
        return encoded[:, :columns].contiguous(), scales


def _encoded(quotients: Tensor) -> Tensor:
    """Rounded to nearest with ties to even; what is too large becomes the largest."""
    return quotients.to(torch.float32).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def defined(own: Tensor, own_scales: Tensor, weight: Tensor, scales: Tensor, block: Block) -> Tensor:
    """What every kernel here computes, up to the order of sums: the product of decoded activations with the decoded
    weight, float32 ``[rows, weight rows]``. The arguments are those of ``products.multiply_in_triton``."""
    left, right = (torch.empty(each.shape, device=each.device) for each in (own, weight))
    group = block[1] if own_scales.shape[1] > 1 else own.shape[1]
    codes.decode(own, own_scales, (len(own) // len(own_scales), group), left)
    codes.decode(weight, scales, block, right)
    return left @ right.T
