"""What holds the AWQ weight of a linear layer, and such a weight as codes, scales and zero points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from quantdock import TensorSpec, linears
from quantdock_awq.packing import BITS, Packing


@dataclass(frozen=True, kw_only=True, eq=False)
class AwqWeight:
    """The stored tensors of one weight, read as ``quantdock.linears`` wants it."""

    packing: Packing
    inputs: int
    outputs: int
    group_size: int
    """Inputs per group, never -1; it divides ``inputs``."""
    qweight: Tensor | None
    """``None`` when codes aren't asked for."""
    stored_zeros: Tensor
    stored_scales: Tensor

    @property
    def bits(self) -> int:
        return BITS

    @property
    def groups(self) -> int:
        return self.inputs // self.group_size

    def codes(self, part: slice) -> Tensor:
        assert self.qweight is not None
        return self.packing.codes(self.qweight, part)

    def scales(self, part: slice) -> Tensor:
        return self.packing.scales(self.stored_scales, self.groups, part)

    def zeros(self, part: slice) -> Tensor:
        return self.packing.zeros(self.stored_zeros, self.stored_scales, self.groups, part)

    def grouping(self) -> linears.Grouping:
        return self.group_size


class AwqLinear(linears.GroupedLinear):
    """A linear layer with the buffers of its packing; made on the meta device.

    Args:
        shape: ``[out, in]``.
        components: names, dtypes and shapes of the buffers.
        packing: how they are read.
        group_size: inputs per group, never -1.
        bias: ``[out]``, or ``None``.
        compute_dtype: what activations are cast to; ``None`` leaves them as they come.
    """

    code_buffers: ClassVar[tuple[str, ...]] = ("qweight",)

    def __init__(
        self,
        shape: tuple[int, int],
        components: Mapping[str, TensorSpec],
        *,
        packing: Packing,
        group_size: int,
        bias: nn.Parameter | None,
        compute_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(shape[1], shape[0], bias=bias, compute_dtype=compute_dtype)
        self.packing, self.group_size = packing, group_size
        self._stored_as = dict(components)
        for name, spec in components.items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))

    def stored_weight(self) -> AwqWeight:
        shape = self.out_features, self.in_features
        return weight_of(self._buffers, shape, packing=self.packing, group_size=self.group_size)

    def encode(self, codes: Callable[[slice], Tensor]) -> Mapping[str, Tensor]:
        spec = self._stored_as["qweight"]
        qweight = torch.empty(spec.shape, dtype=spec.dtype, device=self.scales.device)
        for part in linears.pieces(self.out_features, self.in_features):
            self.packing.put_codes(codes(part), qweight, part)
        return {"qweight": qweight}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}, version={self.packing.label}"


def weight_of(
    tensors: Mapping[str, Tensor | None], shape: tuple[int, int], *, packing: Packing, group_size: int
) -> AwqWeight:
    """The weight ``[out, in]`` that stored tensors are, by their names."""
    scales, zeros = tensors["scales"], next(tensors[name] for name in packing.zeros_names if name in tensors)
    assert scales is not None
    assert zeros is not None
    return AwqWeight(
        packing=packing,
        inputs=shape[1],
        outputs=shape[0],
        group_size=group_size,
        qweight=tensors["qweight"],
        stored_zeros=zeros,
        stored_scales=scales,
    )
