"""Stored weights: the tensors that make them up, and how they are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from quantdock_fp8 import codes, few_rows
from quantdock_fp8.multiplying import Product, in_autocast, multiply
from quantdock_fp8.tiling import Block, Tiling, as_grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Coding:
    """Which component of a weight is what, and how they are decoded; of experts, a ``quantdock.linears.Reading``."""

    codes: str
    """The component with the codes: float8_e4m3fn, or uint8 with two codes of four bits in each byte."""
    scale: str
    """The component with the scales of blocks."""
    tiling: Tiling
    """Which elements of a matrix share one of those."""
    factor: str | None = None
    """The component with one number for all of a matrix, or of each of its parts, that scales are scaled with."""
    divides: bool = False
    """Whether scales are divided by that number; they are multiplied with it otherwise."""
    in_blocks: bool = False
    """Whether codes have one more dimension, along which those are that share a scale."""
    swapped: bool = False
    """Whether the parameter is the transpose of what is stored."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the components that are decoded; there may be more, which are only kept."""
        return (self.codes, self.scale) if self.factor is None else (self.codes, self.scale, self.factor)

    def matrices(self, tensors: Mapping[str, Tensor]) -> Weights:
        """Those of experts."""
        return Weights(tensors=tensors, coding=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """The tensors of a matrix as they are stored: a ``quantdock.linears.Matrix``."""

    codes: Tensor
    """``[rows, columns]``, or ``[rows, columns / 2]`` with two in a byte."""
    scale: Tensor
    factor: Tensor | None
    coding: Coding

    @classmethod
    def of(cls, components: Mapping[str, Tensor], coding: Coding) -> Self:
        """The weight that is stored as ``components``."""
        stored = components[coding.codes]
        return cls(
            codes=stored.flatten(-2) if coding.in_blocks else stored,
            scale=components[coding.scale],
            factor=None if coding.factor is None else components[coding.factor],
            coding=coding,
        )

    @property
    def shape(self) -> Block:
        """``[rows, columns]``."""
        rows, columns = codes.shape_of(self.codes)
        return rows, columns

    def scales(self) -> Tensor:
        """What the codes are multiplied with: ``float32 [blocks down, blocks across]``."""
        down, across = self.coding.tiling.grid(self.shape)
        found = as_grid(self.scale, down, across)
        if self.factor is None:
            return found
        each = self.factor.to(torch.float32).reshape(-1, 1)
        if len(each) > 1:  # one for each part of an expert's matrix
            each = each.repeat_interleave(down // len(each), 0)
        return found / each if self.coding.divides else found * each

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Codes times scales in float32, rounded once to float32, bfloat16 or float16; ``[rows, columns]``."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        self.decode_into(out)
        return out

    def decode_into(self, out: Tensor) -> None:
        """Write what ``decode`` returns into ``out``, which may have any strides if codes are of four bits."""
        scales = self.scales()
        for rows, down in self.coding.tiling.ranges(len(out)):
            codes.decode(self.codes[rows], scales[down], self.coding.tiling.block, out[rows])

    def path(self, dtype: torch.dtype) -> str:
        """How activations of ``dtype`` are multiplied, where the weight is now.

        Returns:
            ``compiled`` on CPU and ``triton`` on CUDA devices for few rows that need no gradients; ``decode`` for
            weights that are decoded first.
        """
        return (few_rows.path(self.codes.device, dtype) if self._in_bytes else None) or "decode"

    @property
    def _in_bytes(self) -> bool:
        return self.codes.dtype == torch.float8_e4m3fn

    def multiply(
        self, x: Tensor, bias: Tensor | None = None, product: Product | None = None, *, plainly: bool = False
    ) -> Tensor:
        """``nn.functional.linear``, in the dtype of the input or of autocast.

        Args:
            x, bias: activations, and what is added.
            product: what multiplies, see ``multiplying.multiply``; ``None`` for what is fastest.
            plainly: decode the weight, unless there is a ``product``.
        """
        x = in_autocast(x)
        if product is None and not plainly and self._in_bytes:
            learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
            product = None if learns else few_rows.product(x)
        scales, block = self.scales(), self.coding.tiling.block
        found = [
            multiply(x, self.codes[rows], scales[down], block, None if bias is None else bias[rows], product)
            for rows, down in self.coding.tiling.ranges(len(self.codes))
        ]
        return found[0] if len(found) == 1 else torch.cat(found, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The tensors of one matrix per expert as they are stored: ``quantdock.linears.Matrices``."""

    tensors: Mapping[str, Tensor]
    """By the names of components; each has the experts in its first dimension."""
    coding: Coding

    @property
    def shape(self) -> tuple[int, int, int]:
        """``[experts, rows, columns]``."""
        stored = self.tensors[self.coding.codes]
        experts, rows, columns = codes.shape_of(stored.flatten(-2) if self.coding.in_blocks else stored)
        return experts, rows, columns

    @property
    def device(self) -> torch.device:
        return self.tensors[self.coding.codes].device

    def matrix(self, index: int) -> Weight:
        """That of one expert."""
        return Weight.of({name: self.tensors[name][index] for name in self.coding.names}, self.coding)

    def path(self, dtype: torch.dtype) -> str:
        """That of each of them; they are alike."""
        return self.matrix(0).path(dtype)

    def decode_into(self, out: Tensor) -> None:
        """Write what all of them stand for, as ``Weight.decode_into`` does."""
        for index, target in enumerate(out):
            self.matrix(index).decode_into(target)
