"""A linear layer that keeps its weight in 8-bit floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quantdock import TensorSpec
from quantdock_fp8 import codes
from quantdock_fp8.scheme import WEIGHT_DTYPE, Block, as_grid, scale_of

_CPU_ROWS = 128
"""Rows of a weight that are decoded at a time, so that the cache holds them until they are used."""

_DEVICE_ELEMENTS = 1 << 24
"""Elements that are decoded at a time on other devices, where a multiplication must not be too small."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Fp8Linear(nn.Linear):
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
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        scales = as_grid(self.get_buffer(self.scale_name), self.weight.shape, self.block)
        own = self._parameters["bias"]
        bias = None if own is None else own.to(input.dtype)
        result: Tensor = _Multiply.apply(input, self.weight, scales, self.block, bias)  # type: ignore[no-untyped-call]
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Move the layer. Codes and scales are bits to ``fn``, so that a change of dtype passes them by."""
        stored = [self.weight, *self._buffers.values()]

        def move(tensor: Tensor) -> Tensor:
            if not any(tensor is part for part in stored):
                return fn(tensor)
            return fn(tensor.view(_BITS[tensor.dtype.itemsize])).view(tensor.dtype)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies. torch can't pickle storages of 8-bit floats (2.13), so they go as their bytes."""
        state = self.__dict__ | {"_parameters": self._parameters.copy(), "_buffers": self._buffers.copy()}
        state["_parameters"]["weight"] = self.weight.data.view(torch.uint8)
        state["_exponents"] = [name for name, tensor in self._buffers.items() if _is_exponents(tensor)]
        for name in state["_exponents"]:
            state["_buffers"][name] = self.get_buffer(name).view(torch.uint8)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        exponents = state.pop("_exponents")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._parameters["weight"] = nn.Parameter(self.weight.view(WEIGHT_DTYPE), requires_grad=False)
        for name in exponents:
            self._buffers[name] = self.get_buffer(name).view(torch.float8_e8m0fnu)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={list(self.block)}"


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


def _is_exponents(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.float8_e8m0fnu


def _rows_at_a_time(weight: Tensor, block: Block) -> int:
    """So many that each part begins with a block."""
    on_cpu = weight.device.type == "cpu"
    wanted = _CPU_ROWS if on_cpu else max(_CPU_ROWS, _DEVICE_ELEMENTS // max(1, weight.shape[1]))
    if block[0] >= len(weight):
        return wanted
    return max(1, wanted // block[0]) * block[0]


def _scales_of(scales: Tensor, block: Block, rows: slice) -> Tensor:
    return scales if len(scales) == 1 else scales[rows.start // block[0] : -(-rows.stop // block[0])]
