"""Multiplying with weights that are decoded for each use, a part at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quantdock_fp8 import codes
from quantdock_fp8.tiling import Block

_CPU_ROWS = 128
"""Rows of a weight that are decoded at a time, so that the cache holds them until they are used."""

_DEVICE_ELEMENTS = 1 << 24
"""Elements that are decoded at a time on other devices, where a multiplication must not be too small."""


Product = Callable[[Tensor, Tensor, Tensor, Block, Tensor | None], Tensor]
"""What computes ``multiply`` forwards, without autocast or gradients; the bias has the dtype of the input."""


def in_autocast(input: Tensor) -> Tensor:
    """The input in the dtype that a linear layer would multiply it in."""
    device = input.device.type
    return input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input


def multiply(
    input: Tensor,
    weight: Tensor,
    scales: Tensor,
    block: Block,
    bias: Tensor | None,
    product: Product | None = None,
) -> Tensor:
    """``nn.functional.linear`` with a weight in floats of 8 or 4 bits, in the dtype of the input.

    Args:
        input: ``[..., columns]``.
        weight: codes, as in ``codes.decode``.
        scales: float32 ``[blocks down, blocks across]``.
        block: rows and columns that share a scale.
        bias: ``[rows]``.
        product: what takes the place of decoding on the way forwards. Gradients are those of the decoded weight.
    """
    own = None if bias is None else bias.to(input.dtype)
    result: Tensor = _Multiply.apply(input, weight, scales, block, own, product)  # type: ignore[no-untyped-call]
    return result


def _decode_and_multiply(input: Tensor, weight: Tensor, scales: Tensor, block: Block, bias: Tensor | None) -> Tensor:
    """The ``Product`` that anything can compute."""
    result = input.new_empty((*input.shape[:-1], len(weight)))
    step = _rows_at_a_time(weight, block)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = _decoded(weight[rows], _scales_of(scales, block, rows), block, input.dtype)
        result[..., rows] = nn.functional.linear(input, part, None if bias is None else bias[rows])
    return result


class _Multiply(torch.autograd.Function):
    """``input @ weight.T + bias`` with gradients for the input and the bias, so that adapters can be trained."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        scales: Tensor,
        block: Block,
        bias: Tensor | None,
        product: Product | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.block = block
        return (product or _decode_and_multiply)(input, weight, scales, block, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, scales = ctx.saved_tensors
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = gradient @ _decoded(weight, scales, ctx.block, gradient.dtype)
        if ctx.needs_input_grad[4]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return of_input, None, None, None, of_bias, None


def _decoded(weight: Tensor, scales: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    out = torch.empty(codes.shape_of(weight), dtype=dtype, device=weight.device)
    codes.decode(weight, scales, block, out)
    return out


def _rows_at_a_time(weight: Tensor, block: Block) -> int:
    """So many that each part begins with a block."""
    on_cpu = weight.device.type == "cpu"
    wanted = _CPU_ROWS if on_cpu else max(_CPU_ROWS, _DEVICE_ELEMENTS // max(1, codes.shape_of(weight)[1]))
    if block[0] >= len(weight):
        return wanted
    return max(1, wanted // block[0]) * block[0]


def _scales_of(scales: Tensor, block: Block, rows: slice) -> Tensor:
    return scales if len(scales) == 1 else scales[rows.start // block[0] : -(-rows.stop // block[0])]
