"""A linear layer that keeps its weight in 8-bit floats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quantdock import TensorSpec
from quantdock_fp8 import codes
from quantdock_fp8.bits import Bits
from quantdock_fp8.scheme import Block, as_grid, grid, scale_of

_CPU_ROWS = 128
"""Rows of a weight that are decoded at a time, so that the cache holds them until they are used."""

_DEVICE_ELEMENTS = 1 << 24
"""Elements that are decoded at a time on other devices, where a multiplication must not be too small."""


class Fp8Linear(Bits, nn.Linear):
    """A linear layer whose weight is decoded for each use, a part at a time; activations aren't quantized.

    It computes with the weight that ``quantdock.dequantize`` gives: codes times scales in float32, rounded once to the
    dtype of the input. Conversions of the model to another dtype leave codes and scales alone, and nothing that is
    stored changes with use.

    Args:
        linear: the layer whose place this one takes, on the meta device; its bias is taken over.
        components: the stored tensors; ``weight`` and one scale, and more that are only kept.
        block: rows and columns of the weight that share a scale.
    """

    def __init__(self, linear: nn.Linear, components: Mapping[str, TensorSpec], block: Block) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.block = linear.in_features, linear.out_features, block
        for name, spec in components.items():
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)
        self.scale_name = scale_of(components)
        self.register_parameter("bias", linear._parameters["bias"])
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        down, across = grid(tuple(self.weight.shape), self.block)
        scales = as_grid(self.get_buffer(self.scale_name), down, across)
        return multiply(input, self.weight, scales, self.block, self._parameters["bias"])

    def _bits(self) -> list[str]:
        return ["weight", *self._buffers]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={list(self.block)}"


def multiply(input: Tensor, weight: Tensor, scales: Tensor, block: Block, bias: Tensor | None) -> Tensor:
    """``nn.functional.linear`` with a weight in 8-bit floats, in the dtype of the input or of autocast.

    Args:
        input: ``[..., columns]``.
        weight: codes ``[rows, columns]``.
        scales: float32 ``[blocks down, blocks across]``.
        block: rows and columns that share a scale.
        bias: ``[rows]``.
    """
    if torch.is_autocast_enabled(input.device.type):
        input = input.to(torch.get_autocast_dtype(input.device.type))
    own = None if bias is None else bias.to(input.dtype)
    result: Tensor = _Multiply.apply(input, weight, scales, block, own)  # type: ignore[no-untyped-call]
    return result


class _Multiply(torch.autograd.Function):
    """``input @ weight.T + bias`` with gradients for the input and the bias, so that adapters can be trained."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, scales: Tensor, block: Block, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.block = block
        result = input.new_empty((*input.shape[:-1], len(weight)))
        step = _rows_at_a_time(weight, block)
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            part = codes.decode(weight[rows], _scales_of(scales, block, rows), block, input.dtype)
            result[..., rows] = nn.functional.linear(input, part, None if bias is None else bias[rows])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, scales = ctx.saved_tensors
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = gradient @ codes.decode(weight, scales, ctx.block, gradient.dtype)
        if ctx.needs_input_grad[4]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return of_input, None, None, None, of_bias


def _rows_at_a_time(weight: Tensor, block: Block) -> int:
    """So many that each part begins with a block."""
    on_cpu = weight.device.type == "cpu"
    wanted = _CPU_ROWS if on_cpu else max(_CPU_ROWS, _DEVICE_ELEMENTS // max(1, weight.shape[1]))
    if block[0] >= len(weight):
        return wanted
    return max(1, wanted // block[0]) * block[0]


def _scales_of(scales: Tensor, block: Block, rows: slice) -> Tensor:
    return scales if len(scales) == 1 else scales[rows.start // block[0] : -(-rows.stop // block[0])]
