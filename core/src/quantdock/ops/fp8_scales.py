"""From the largest magnitude of a block to its scale: the formulas that are in use for float8_e4m3fn."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quantdock.ops.fp8 import LARGEST_E4M3

Rule = Literal["quotient", "reciprocal", "power_of_two", "floored"]


class Fp8Scales(NamedTuple):
    """What ``fp8_scales`` finds."""

    stored: Tensor
    """float32: what codes are multiplied with when they are decoded."""
    scales: Tensor
    """float32: what ``encode_fp8`` takes."""
    divide: bool
    """What ``encode_fp8`` takes, too."""


def fp8_scales(magnitudes: Tensor, *, rule: Rule) -> Fp8Scales:
    """The scales of blocks.

    Args:
        magnitudes: the largest magnitude of each block, in the dtype of the weights, on which some rules depend.
        rule:
            ``"quotient"``: elements are divided by ``magnitude / 448``, a quotient in the dtype of the weights. A block
            of zeros becomes NaNs. (torchao 0.18, ``_choose_scale_float8`` and ``_quantize_affine_float8``.)
            ``"reciprocal"``: elements are multiplied with ``448 / magnitude``, or 1 in a block of zeros, and the scale
            is the reciprocal of that. (transformers 5.23, ``integrations.finegrained_fp8.Fp8Quantize``.)
            ``"power_of_two"``: the same, with the scale rounded up to a power of two, which float8_e8m0fnu holds.
            (The same, with ``scale_fmt="ue8m0"``.)
            ``"floored"``: as ``"reciprocal"``, with magnitudes of at least 1e-12. (FBGEMM's ``quantize_fp8_row``.)

    Raises:
        ValueError: there is no such rule.
    """
    match rule:
        case "quotient":
            scales = (magnitudes / LARGEST_E4M3).float()
            return Fp8Scales(scales, scales, True)
        case "reciprocal" | "power_of_two":
            largest = magnitudes.float()
            scales = torch.where(largest > 0, LARGEST_E4M3 / largest, 1.0)
            stored = 1.0 / scales
            if rule == "power_of_two":
                exponents = stored.clamp(min=torch.finfo(torch.float32).tiny).log2().ceil()
                stored = torch.ldexp(torch.ones_like(exponents), exponents.to(torch.int32))
                scales = 1.0 / stored
        case "floored":
            scales = LARGEST_E4M3 / magnitudes.clamp(min=1e-12).float()
            scales = scales.masked_fill(scales.isinf(), 1.0)
            stored = 1.0 / scales
        case _:
            raise ValueError(f"rule is {rule!r}, expected one of quotient, reciprocal, power_of_two, floored")
    return Fp8Scales(stored, scales, False)
