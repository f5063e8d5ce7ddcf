"""Quantization without data: each weight becomes the code that is nearest to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quantdock import ops
from quantdock_gptq import words
from quantdock_gptq.config import Settings

SCALE_DTYPE = torch.float16
"""What GPTQ checkpoints have, whatever the model's dtype is."""

_STEP = 1 << 19  # weights at a time, so that the temporaries stay small
_PER_WEIGHT = 6  # bytes of a step: itself in float32 where it isn't stored as ops read it, its code, and words of these
_PER_GROUP = 24  # its extremes, and its scale and zero point in several dtypes
_READ = (torch.float32, torch.bfloat16, torch.float16)


def working_bytes(outputs: int, inputs: int, settings: Settings) -> int:
    """Bytes that ``quantize_into`` allocates at the most."""
    rows, (_, groups) = min(outputs, _rows(inputs)), settings.groups(inputs)
    return rows * (_PER_WEIGHT * inputs + _PER_GROUP * groups) + ops.working_bytes(inputs)


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
        parts["qweight"][:, outputs] = words.pack_rows(codes, bits)
        parts["qzeros"][:, packed] = words.encode_zeros(zeros.t(), bits, less_one=less_one)
        parts["scales"][:, outputs] = scales.t()
        finite = finite and bool(torch.isfinite(scales).all())
    return finite


def _rows(inputs: int) -> int:
    return max(1, _STEP // max(1, inputs) // 32) * 32


def _quantize(rows: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[n, in]``, and zero points and scales ``[n, groups]``."""
    size, groups = settings.groups(rows.shape[1])
    rows = (rows if rows.dtype in _READ else rows.float()).contiguous()
    found = [rows.new_empty(len(rows), groups) for _ in range(1 if settings.sym else 2)]
    if settings.sym:
        ops.group_magnitudes(rows, group=size, magnitudes=found[0])
    else:
        ops.group_extremes(rows, group=size, smallest=found[0], largest=found[1])
    scales, zeros = _of_groups([extreme.float() for extreme in found], settings)
    codes, shifts = rows.new_empty(rows.shape, dtype=torch.uint8), zeros.to(torch.uint8)
    ops.quantize_affine(
        rows,
        group=size,
        scales=scales.float(),
        divide=True,
        lowest=0,
        highest=2**settings.bits - 1,
        codes=codes,
        zeros=shifts,
    )
    return codes, shifts, scales


def scales_and_zeros(values: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Of groups in the last dimension of float32 values: scales as they are stored, and zero points in float32."""
    return _of_groups([values.abs().amax(-1)] if settings.sym else [values.amin(-1), values.amax(-1)], settings)


def _of_groups(extremes: Sequence[Tensor], settings: Settings) -> tuple[Tensor, Tensor]:
    """The same of the largest magnitudes, if symmetric, or the smallest and the largest elements."""
    top = 2**settings.bits - 1
    if settings.sym:
        scales = _stored(2 / top * extremes[0])
        return scales, torch.full_like(scales, 2 ** (settings.bits - 1), dtype=torch.float32)
    smallest = extremes[0].clamp(max=0)
    scales = _stored((extremes[1].clamp(min=0) - smallest) / top)
    return scales, (smallest / -scales.float()).round_().clamp_(0, top)


def _stored(scales: Tensor) -> Tensor:
    """As they are stored. Where there is nothing but zeros, any scale will do but zero."""
    scales = scales.to(SCALE_DTYPE)
    return scales.masked_fill_(scales == 0, 1)
