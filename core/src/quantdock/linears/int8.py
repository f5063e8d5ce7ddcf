"""Codes of 8 bits with one scale per output, as torch's CPU kernel reads them: made, multiplied with, turned back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantdock.linears.affine import STEP, pieces
from quantdock.linears.crossover import most_rows
from quantdock.linears.weights import Maker, Weight, by_rows, is_fast_cpu

PATH = "int8pack"

_ZERO = 128
_ALIGNMENT = 32  # bytes, of each row of the activations
_INPUTS = 16  # the kernel takes a multiple of these; of other counts it makes nonsense, or crashes (torch 2.13)


@dataclass(frozen=True, kw_only=True, eq=False)
class Int8Form:
    """A weight in the kernel's form."""

    path: ClassVar[str] = PATH
    rounds: ClassVar[bool] = True
    elements: ClassVar[int] = STEP
    signed: Tensor
    """int8 ``[outputs, inputs]``: the codes less 128."""
    scales: Tensor
    """bfloat16 ``[outputs]``."""
    most_rows: int
    """Of activations, for which the kernel is faster than dequantizing."""

    def multiply(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` in bfloat16 to ``[..., outputs]``, for few rows."""
        return by_rows(self._product, x)

    def arranged(self, x: Tensor) -> Tensor:
        """The activations as they are."""
        return x

    def columns(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Some outputs of the weight, ``[inputs, n]`` in ``dtype``."""
        return self.signed[part].to(dtype).mul_(self.scales[part, None]).t()

    def codes(self, part: slice) -> Tensor:
        """Some outputs' codes, uint8 ``[inputs, n]``, as ``Weight.codes`` gave them."""
        return self.signed[part].view(torch.uint8).bitwise_xor(_ZERO).t()

    def _product(self, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        if rows.data_ptr() % _ALIGNMENT:  # the kernel would crash
            rows = rows.clone()
        return torch._weight_int8pack_mm(rows, self.signed, self.scales)


def fits(weight: Weight) -> bool:
    """Whether the kernel can read a weight."""
    every = slice(0, weight.outputs)
    if not is_fast_cpu() or weight.bits != 8 or not weight.inputs or not weight.outputs or weight.inputs % _INPUTS:
        return False
    if len(weight.scales(every)) != 1:
        return False
    return bool(torch.all(weight.zeros(every) == _ZERO))


def make(weight: Weight) -> Int8Form:
    """The kernel's form of a weight that fits."""
    signed = torch.empty(weight.outputs, weight.inputs, dtype=torch.int8, device="cpu")
    for part in pieces(weight.outputs, weight.inputs):
        signed[part] = weight.codes(part).bitwise_xor(_ZERO).view(torch.int8).t()
    (scales,) = weight.scales(slice(0, weight.outputs))
    return Int8Form(signed=signed, scales=scales.to(torch.bfloat16), most_rows=most_rows(PATH))


# For CPUs alone: on GPUs, torch's kernel computes in float32, and each of its threads reads the weights of an output
# one by one. float16 is rounded as for ``int4``.
MAKER = Maker(path=PATH, device="cpu", rounds=True, dtypes=(torch.bfloat16, torch.float16), fits=fits, make=make)
