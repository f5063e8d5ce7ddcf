"""A linear layer that keeps its weight in floats of 8 or 4 bits."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantdock import TensorSpec, UnsupportedError, linears
from quantdock_fp8 import eight_bits
from quantdock_fp8.activations import Activations
from quantdock_fp8.multiplying import Product
from quantdock_fp8.scheme import ACTIVATION_NAMES
from quantdock_fp8.weight import Coding, Weight


class Fp8Linear(linears.Bits, linears.HasPaths, nn.Linear):
    """A linear layer whose weight is decoded for each use; activations aren't quantized, unless that was asked for.

    It computes with the weight that ``quantdock.dequantize`` gives: codes times scales in float32, rounded once to the
    dtype of the input. Conversions of the model to another dtype leave codes and scales alone, and nothing that is
    stored changes with use.

    Args:
        linear: the layer whose place this one takes, on the meta device; its bias is taken over.
        components: the stored tensors; codes and scales, and more that are only kept.
        coding: which of them is what.
        activations: how activations are quantized to 8 bits; ``None`` if they aren't. With codes of 8 bits only.
    """

    def __init__(
        self,
        linear: nn.Linear,
        components: Mapping[str, TensorSpec],
        coding: Coding,
        activations: Activations | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.coding = linear.in_features, linear.out_features, coding
        self.activations = activations
        self.register_parameter("weight", None)  # where codes have another name
        for name, spec in components.items():
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)
        self.register_parameter("bias", linear._parameters["bias"])
        self.train(linear.training)

    def path(self, dtype: torch.dtype) -> str:
        """How activations of ``dtype`` are multiplied in evaluation, where the layer is now.

        Returns:
            As of ``Weight.path``. With activations of 8 bits: ``scaled_mm``, ``triton8``, or ``refused`` where that
            can't be done.
        """
        stored = self._stored()
        if self.activations is None:
            return stored.path(dtype)
        try:
            block, static = self.coding.tiling.block, self.activations.static
            way = eight_bits.way(stored.codes.device, dtype, stored.shape, block, static)
        except UnsupportedError:
            return "refused"
        return "triton8" if way == "triton8" else "scaled_mm"

    def forward(self, input: Tensor) -> Tensor:
        plainly = self.training or torch.compiler.is_compiling()
        return self._stored().multiply(input, self._parameters["bias"], self._product(), plainly=plainly)

    def _product(self) -> Product | None:
        """What multiplies activations of 8 bits, if that was asked for."""
        if self.activations is None:
            return None
        stored_scale = self._scale_of_activations() if self.activations.static else None
        return functools.partial(eight_bits.multiply_quantized, activations=self.activations, stored=stored_scale)

    def _scale_of_activations(self) -> Tensor | None:
        return next((scale for name in ACTIVATION_NAMES if (scale := self._buffers.get(name)) is not None), None)

    def _stored(self) -> Weight:
        found = {name: self._slot(name) for name in self.coding.names}
        return Weight.of({name: tensor for name, tensor in found.items() if tensor is not None}, self.coding)

    def __getattr__(self, name: str) -> Any:
        """Others look at the weight's device and dtype: where codes have another name, they are what is found."""
        found: Any = super().__getattr__(name)
        return self._buffers.get(self.coding.codes) if found is None and name == "weight" else found

    def _names_of_bits(self) -> Iterable[str]:
        return "weight", *self._buffers

    def extra_repr(self) -> str:
        own = "" if self.activations is None else ", quantize_activations=True"
        return f"{super().extra_repr()}, block={list(self.coding.tiling.block)}{own}"
