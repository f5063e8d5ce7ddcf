"""What a grouped code stands for, and a product with codes that never has the whole weight in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Grouping = int | Tensor
"""Inputs per group, when input ``k`` is in group ``k // size``; else the group of each input, ``[in]``."""

STEP = 1 << 18  # elements that are dequantized at a time: in bfloat16, they fit into a second-level cache
DEVICE_STEP = 1 << 24  # the same on other devices, where a product must not be too small; 32 MiB in bfloat16
_HALF_1024 = 0x6400  # the bits of 1024 in float16; its lowest bit counts 1, so that 1024 + code is an "or" away


def dequantize_columns(codes: Tensor, scales: Tensor, zeros: Tensor, grouping: Grouping, dtype: torch.dtype) -> Tensor:
    """``scale * (code - zero)`` in ``dtype``; the differences are exact, and each product is rounded once.

    Args:
        codes: uint8 ``[in, n]``.
        scales: ``[groups, n]``, cast to ``dtype`` first.
        zeros: uint8 ``[groups, n]``.
        grouping: inputs per group (the last group may have fewer), or the group of each input.
        dtype: floating, of 16 bits or more.

    Returns:
        ``[in, n]`` in ``dtype``.
    """
    # Side by side, or each of the products below would have to look for its own.
    scales, shift = scales.to(dtype).contiguous(), zeros.to(dtype).contiguous()
    if dtype == torch.float16:  # torch's cast from bytes is several times slower
        values = codes.to(torch.int16).bitwise_or_(_HALF_1024).view(torch.float16)
        shift = shift + 1024
    else:
        values = codes.to(dtype)
    if isinstance(grouping, Tensor):
        return values.sub_(shift[grouping]).mul_(scales[grouping])
    whole = len(codes) // grouping
    if whole:
        grouped = values[: whole * grouping].view(whole, grouping, codes.shape[1])
        grouped.sub_(shift[:whole, None]).mul_(scales[:whole, None])
    if whole * grouping < len(codes):
        values[whole * grouping :].sub_(shift[whole]).mul_(scales[whole])
    return values


Columns = Callable[[slice], Tensor]
"""Some outputs of a dequantized weight: ``[in, n]``, in the dtype of the activations."""


def multiply_columns(x: Tensor, columns: Columns, outputs: int, elements: int = STEP) -> Tensor:
    """``x @ weight``, with some outputs of the weight at a time; gradients pass to ``x``.

    Args:
        x: ``[rows, in]``.
        columns: the weight.
        outputs: how many the weight has.
        elements: of the weight at a time.

    Returns:
        ``[rows, outputs]`` in the dtype of ``x``.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Multiply.apply(x, columns, outputs, elements)  # type: ignore[no-untyped-call]
        return result
    result = x.new_empty(len(x), outputs)
    for part in pieces(outputs, x.shape[1], elements):
        result[:, part] = x @ columns(part)
    return result


def pieces(outputs: int, inputs: int, elements: int = STEP) -> Iterator[slice]:
    """The outputs, in pieces of a multiple of 64 with about so many weights: as many as fit into a cache."""
    step = max(1, elements // max(1, inputs) // 64) * 64
    for start in range(0, outputs, step):
        yield slice(start, min(start + step, outputs))


class _Multiply(torch.autograd.Function):
    """Dequantizes again on the way back, instead of keeping the weight for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Columns, outputs: int, elements: int) -> Tensor:
        ctx.columns, ctx.inputs, ctx.elements = columns, x.shape[1], elements
        return multiply_columns(x, columns, outputs, elements)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        result = gradient.new_zeros(len(gradient), ctx.inputs)
        for part in pieces(gradient.shape[1], ctx.inputs, ctx.elements):
            result.addmm_(gradient[:, part], ctx.columns(part).t())
        return result, None, None, None
