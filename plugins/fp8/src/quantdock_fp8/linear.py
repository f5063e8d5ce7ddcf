"""A linear layer that keeps its weight in floats of 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantdock import TensorSpec, linears
from quantdock_fp8.weight import Coding, Weight


class Fp8Linear(linears.Bits, nn.Linear):
    """A linear layer whose weight is decoded for each use, a part at a time; activations aren't quantized.

    It computes with the weight that ``quantdock.dequantize`` gives: codes times scales in float32, rounded once to the
    dtype of the input. Conversions of the model to another dtype leave codes and scales alone, and nothing that is
    stored changes with use.

    Args:
        linear: the layer whose place this one takes, on the meta device; its bias is taken over.
        components: the stored tensors; codes and scales, and more that are only kept.
        coding: which of them is what.
    """

    def __init__(self, linear: nn.Linear, components: Mapping[str, TensorSpec], coding: Coding) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.coding = linear.in_features, linear.out_features, coding
        self.register_parameter("weight", None)  # where codes have another name
        for name, spec in components.items():
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)
        self.register_parameter("bias", linear._parameters["bias"])
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return self._stored().multiply(input, self._parameters["bias"])

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
        return f"{super().extra_repr()}, block={list(self.coding.tiling.block)}"
