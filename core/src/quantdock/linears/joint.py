"""Matrices of grouped integers that are stored in pieces: a gate above what is beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from quantdock.linears.affine import Columns, dequantize_columns, multiply_columns
from quantdock.linears.experts import Experts
from quantdock.linears.weights import Weight, dequantize


@dataclass(frozen=True, kw_only=True, eq=False)
class JointMatrix:
    """A ``Matrix`` whose outputs are those of one weight, then those of the next; all have the same inputs."""

    weights: Sequence[Weight]
    compute_dtype: torch.dtype | None = None
    """What activations are cast to; ``None`` leaves them as they come."""

    @property
    def shape(self) -> tuple[int, int]:
        return sum(weight.outputs for weight in self.weights), self.weights[0].inputs

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Each weight as ``quantdock.linears.dequantize`` has it."""
        return torch.cat([dequantize(weight, dtype) for weight in self.weights])

    def multiply(self, x: Tensor, *, plainly: bool = False) -> Tensor:
        """As ``GroupedLinear`` does it on the path ``columns``; there is no other."""
        rows = x.to(self.compute_dtype or x.dtype).reshape(-1, x.shape[-1])
        found = [multiply_columns(rows, _columns(weight, rows.dtype), weight.outputs) for weight in self.weights]
        return torch.cat(found, -1).view(*x.shape[:-1], -1).to(x.dtype)


def _columns(weight: Weight, dtype: torch.dtype) -> Columns:
    grouping = weight.grouping()
    return lambda part: dequantize_columns(weight.codes(part), weight.scales(part), weight.zeros(part), grouping, dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class JointMatrices:
    """``Matrices``, each of which is in ``parts`` pieces."""

    shape: tuple[int, int, int]
    """``[experts, outputs, inputs]``."""
    parts: int
    piece: Callable[[int, int], Weight]
    """Number of an expert, number of a piece -> its weight."""
    device: torch.device
    compute_dtype: torch.dtype | None = None

    def matrix(self, index: int) -> JointMatrix:
        weights = [self.piece(index, part) for part in range(self.parts)]
        return JointMatrix(weights=weights, compute_dtype=self.compute_dtype)

    def path(self, dtype: torch.dtype) -> str:
        """``columns``: each use dequantizes."""
        return "columns"


class WeightOf(Protocol):
    """What makes a weight of a layer's stored tensors; it can be pickled, as a ``functools.partial`` can."""

    def __call__(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Weight:
        """
        Args:
            tensors: component -> tensor.
            shape: ``[outputs, inputs]``.
        """


@dataclass(frozen=True, kw_only=True)
class JointReading:
    """A ``Reading`` of components that are stacked as ``Experts`` has them, each a layer of grouped integers."""

    leaf: str
    """Name of the parameter."""
    shape: tuple[int, int, int]
    """``[experts, outputs, inputs]``."""
    parts: int
    """Layers that the outputs of an expert are divided among."""
    weight_of: WeightOf
    compute_dtype: torch.dtype | None = None
    """What activations are cast to; ``None`` leaves them as they come."""

    @classmethod
    def of(cls, leaf: str, experts: Experts, weight_of: WeightOf, compute_dtype: torch.dtype | None) -> Self:
        """How the parameter ``leaf`` is read, which is made up of ``experts``."""
        return cls(
            leaf=leaf, shape=experts.whole, parts=experts.parts, weight_of=weight_of, compute_dtype=compute_dtype
        )

    def matrices(self, tensors: Mapping[str, Tensor]) -> JointMatrices:
        """See ``Reading.matrices``."""
        _, outputs, inputs = self.shape
        stacks = {name.removeprefix(f"{self.leaf}_"): tensor for name, tensor in tensors.items()}

        def piece(expert: int, part: int) -> Weight:
            own = {name: stack[expert, part] for name, stack in stacks.items()}
            return self.weight_of(own, (outputs // self.parts, inputs))

        return JointMatrices(
            shape=self.shape,
            parts=self.parts,
            piece=piece,
            device=next(iter(stacks.values())).device,
            compute_dtype=self.compute_dtype,
        )
