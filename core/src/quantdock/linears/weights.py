"""What the paths need to know of a stored weight, and its definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantdock.linears.affine import Grouping, dequantize_columns, pieces


class Weight(Protocol):
    """A weight of grouped integers, however it is packed. Its methods may make new tensors for each call."""

    @property
    def bits(self) -> int:
        """Bits per code; every code is below ``2 ** bits``."""

    @property
    def inputs(self) -> int: ...

    @property
    def outputs(self) -> int: ...

    def codes(self, part: slice) -> Tensor:
        """The codes of some outputs: uint8 ``[inputs, n]``."""

    def scales(self, part: slice) -> Tensor:
        """The scales of some outputs: floating ``[groups, n]``."""

    def zeros(self, part: slice) -> Tensor:
        """The zero points of some outputs: uint8 ``[groups, n]``."""

    def grouping(self) -> Grouping:
        """Inputs per group, or the group of each input as int64 ``[inputs]``."""


def grouped(weight: Weight) -> tuple[int, Tensor | None] | None:
    """Inputs per group, and the order that puts the inputs of a group side by side, if all groups are alike."""
    grouping = weight.grouping()
    if isinstance(grouping, int):
        return max(1, min(grouping, weight.inputs)), None
    order = torch.argsort(grouping, stable=True)
    groups = len(weight.scales(slice(0, 1)))
    size = max(1, weight.inputs // groups)
    alike = torch.arange(groups, device=grouping.device).repeat_interleave(size)
    return (size, order) if torch.equal(grouping[order], alike) else None


class Form(Protocol):
    """A weight as a kernel reads it. It stays in this process, where it takes the place of the stored codes."""

    @property
    def path(self) -> str:
        """See ``Maker.path``."""

    @property
    def rounds(self) -> bool:
        """Whether activations and scales are rounded to bfloat16, in which the kernel computes."""

    @property
    def elements(self) -> int:
        """Of the weight, to be dequantized at a time."""

    @property
    def most_rows(self) -> int:
        """Of activations, for which the kernel is faster than dequantizing."""

    def multiply(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]``, for few rows."""

    def arranged(self, x: Tensor) -> Tensor:
        """Activations, ``[rows, inputs]``, in the order of ``columns``."""

    def columns(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Some outputs of the weight: ``[inputs, n]`` in ``dtype``, inputs in the order of the form; ``part`` starts at
        a multiple of 64."""

    def codes(self, part: slice) -> Tensor:
        """What ``Weight.codes`` gave; ``part`` starts at a multiple of 64."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Maker:
    """What makes a kernel's forms."""

    path: str
    """What the path is called."""
    device: str
    """Type of devices that the kernel is for."""
    rounds: bool
    """See ``Form.rounds``."""
    dtypes: tuple[torch.dtype, ...]
    """Those of activations that it takes, unless told what to compute in."""
    fits: Callable[[Weight], bool]
    """Whether the kernel is there, works where the weight is, and can read it."""
    make: Callable[[Weight], Form]
    """The form of a weight that fits."""

    def takes(self, dtype: torch.dtype, computing: torch.dtype | None) -> bool:
        """Whether the kernel may multiply activations of a dtype, given what users want computed in, if anything."""
        if self.rounds:
            return dtype in self.dtypes if computing is None else computing == torch.bfloat16
        return (computing or dtype) in self.dtypes


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """What a weight stands for: ``scale * (code - zero)``, rounded once to ``dtype``.

    In float32, the product of a scale of 16 bits and a difference of codes is exact.

    Returns:
        ``[outputs, inputs]`` in ``dtype``, contiguous.
    """
    grouping, exact = weight.grouping(), torch.promote_types(dtype, torch.float32)
    result: Tensor | None = None
    for part in pieces(weight.outputs, weight.inputs):
        values = dequantize_columns(weight.codes(part), weight.scales(part), weight.zeros(part), grouping, exact)
        if result is None:
            result = values.new_empty(weight.outputs, weight.inputs, dtype=dtype)
        result[part] = values.t()
    return torch.empty(weight.outputs, weight.inputs, dtype=dtype) if result is None else result


def by_rows(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a product of ``[rows, inputs]`` makes of ``[..., inputs]``."""
    result = product(x.reshape(-1, x.shape[-1]))
    return result.view(*x.shape[:-1], result.shape[-1])


def is_fast_cpu() -> bool:
    """Whether this CPU has instructions that kernels for packed integers are written for."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def device_of(weight: Weight) -> torch.device:
    """Where a weight is."""
    return weight.scales(slice(0, 1)).device


def capability_of(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability; (0, 0) for other devices, and GPUs that have none."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0, 0
    return torch.cuda.get_device_capability(device)
