"""What holds the GPTQ weight of a linear layer, and such a weight as codes, scales and zero points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from quantdock import TensorSpec, linears
from quantdock_gptq import words


@dataclass(frozen=True, kw_only=True, eq=False)
class GPTQWeight:
    """The stored tensors of one weight, read as ``quantdock.linears`` wants it."""

    bits: int
    inputs: int
    outputs: int
    group_size: int
    """Inputs per group, never -1."""
    less_one: bool
    """Whether zero points are stored less one."""
    qweight: Tensor | None
    """int32 ``[inputs * bits / 32, outputs]``; ``None`` when codes aren't asked for."""
    qzeros: Tensor
    """int32 ``[groups, outputs * bits / 32]``."""
    group_scales: Tensor
    """``[groups, outputs]``."""
    g_idx: Tensor | None
    """int32 ``[inputs]``: the group of each input; ``None`` when they are in order."""

    def codes(self, part: slice) -> Tensor:
        assert self.qweight is not None
        return words.unpack(self.qweight[:, part], self.bits)

    def scales(self, part: slice) -> Tensor:
        return self.group_scales[:, part]

    def zeros(self, part: slice) -> Tensor:
        first = part.start * self.bits // 32  # the words that have these outputs' zero points
        last = -(-part.stop * self.bits // 32)
        skipped = part.start - first * 32 // self.bits
        found = words.decode_zeros(self.qzeros[:, first:last], self.bits, less_one=self.less_one)
        return found[:, skipped : skipped + part.stop - part.start]

    def grouping(self) -> linears.Grouping:
        if self.g_idx is None:
            return self.group_size
        in_order = torch.arange(self.inputs, device=self.g_idx.device, dtype=self.g_idx.dtype) // self.group_size
        return self.group_size if torch.equal(self.g_idx, in_order) else self.g_idx.to(torch.int64)


class GPTQLinear(linears.GroupedLinear):
    """A linear layer with the buffers ``qweight``, ``qzeros``, ``scales`` and, unless the checkpoint lacks it,
    ``g_idx``; made on the meta device.

    Args:
        shape: ``[out, in]``.
        components: dtypes and shapes of the buffers.
        bits: per code.
        group_size: inputs per group, never -1.
        less_one: whether zero points are stored less one.
        bias: ``[out]``, or ``None``.
        compute_dtype: what activations are cast to; ``None`` leaves them as they come.
    """

    code_buffers: ClassVar[tuple[str, ...]] = ("qweight",)

    def __init__(
        self,
        shape: tuple[int, int],
        components: Mapping[str, TensorSpec],
        *,
        bits: int,
        group_size: int,
        less_one: bool,
        bias: nn.Parameter | None,
        compute_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(shape[1], shape[0], bias=bias, compute_dtype=compute_dtype)
        self.bits, self.group_size, self.less_one = bits, group_size, less_one
        for name, spec in components.items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))

    def stored_weight(self) -> GPTQWeight:
        return weight_of(
            self._buffers,
            (self.out_features, self.in_features),
            bits=self.bits,
            group_size=self.group_size,
            less_one=self.less_one,
        )

    def encode(self, codes: Callable[[slice], Tensor]) -> Mapping[str, Tensor]:
        rows = self.in_features * self.bits // 32
        result = torch.empty(rows, self.out_features, dtype=torch.int32, device=self.scales.device)
        for part in linears.pieces(self.out_features, self.in_features):
            result[:, part] = words.pack(codes(part), self.bits)
        return {"qweight": result}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


def weight_of(
    tensors: Mapping[str, Tensor | None], shape: tuple[int, int], *, bits: int, group_size: int, less_one: bool
) -> GPTQWeight:
    """The weight ``[out, in]`` that stored tensors are, by their names."""
    qzeros, scales = tensors["qzeros"], tensors["scales"]
    assert qzeros is not None
    assert scales is not None
    return GPTQWeight(
        bits=bits,
        inputs=shape[1],
        outputs=shape[0],
        group_size=group_size,
        less_one=less_one,
        qweight=tensors["qweight"],
        qzeros=qzeros,
        group_scales=scales,
        g_idx=tensors.get("g_idx"),
    )
