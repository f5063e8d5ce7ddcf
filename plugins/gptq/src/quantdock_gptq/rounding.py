"""Quantization without data: each weight becomes the code that is nearest to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantdock_gptq import words
from quantdock_gptq.config import Settings

SCALE_DTYPE = torch.float16
"""What GPTQ checkpoints have, whatever the model's dtype is."""

_STEP = 1 << 18  # weights at a time, so that the temporaries stay small
_WORKING = 12  # bytes per weight of a step: itself and its magnitude in float32, and its code on the way into words


def working_bytes(outputs: int, inputs: int) -> int:
    """Bytes that ``quantize_into`` allocates at the most."""
    return _WORKING * min(outputs, _rows(inputs)) * inputs


def quantize_into(
    matrix: Tensor, settings: Settings, parts: Mapping[str, Tensor], start: int, *, less_one: bool
) -> bool:
    """Quantize some outputs of a weight.

    Per group of inputs, with ``top = 2 ** bits - 1``: the scale is ``2 * max(|w|) / top`` and the zero point
    ``2 ** (bits - 1)`` if symmetric; else the scale is ``(max(w, 0) - min(w, 0)) / top`` and the zero point
    ``round(-min(w, 0) / scale)``. A code is ``round(w / scale) + zero``, with the scale as it is stored.

    Args:
        matrix: ``[n, in]``, floating, any strides; not changed.
        settings: bits, group size and symmetry.
        parts: ``qweight``, ``qzeros`` and ``scales`` of the whole weight; those of these outputs are written.
        start: the first one's index, a multiple of 32.
        less_one: whether zero points are stored less one.

    Returns:
        Whether every scale is finite as it is stored.
    """
    finite = True
    bits, step = settings.bits, _rows(matrix.shape[1])
    for first in range(0, len(matrix), step):
        codes, zeros, scales = _quantize(matrix[first : first + step], settings)
        outputs = slice(start + first, start + first + len(codes))
        packed = slice(outputs.start * bits // 32, outputs.stop * bits // 32)
        parts["qweight"][:, outputs] = words.pack(codes.t(), bits)
        parts["qzeros"][:, packed] = words.encode_zeros(zeros.t(), bits, less_one=less_one)
        parts["scales"][:, outputs] = scales.t()
        finite = finite and bool(torch.isfinite(scales).all())
    return finite


def _rows(inputs: int) -> int:
    return max(1, _STEP // max(1, inputs) // 32) * 32


def _quantize(rows: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[n, in]``, and zero points and scales ``[n, groups]``."""
    top = 2**settings.bits - 1
    size, groups = settings.groups(rows.shape[1])
    values = rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format).view(len(rows), groups, size)
    scales, zeros = scales_and_zeros(values, settings)
    values.div_(scales.float()[:, :, None]).round_().add_(zeros[:, :, None]).clamp_(0, top)
    return values.to(torch.uint8).view(rows.shape), zeros.to(torch.uint8), scales


def scales_and_zeros(values: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Of groups in the last dimension of float32 values: scales as they are stored, and zero points in float32."""
    top = 2**settings.bits - 1
    if settings.sym:
        scales = _stored(2 / top * values.abs().amax(-1))
        return scales, torch.full_like(scales, 2 ** (settings.bits - 1), dtype=torch.float32)
    smallest = values.amin(-1).clamp_(max=0)
    scales = _stored((values.amax(-1).clamp_(min=0) - smallest) / top)
    return scales, (smallest / -scales.float()).round_().clamp_(0, top)


def _stored(scales: Tensor) -> Tensor:
    """As they are stored. Where there is nothing but zeros, any scale will do but zero."""
    scales = scales.to(SCALE_DTYPE)
    return scales.masked_fill_(scales == 0, 1)
