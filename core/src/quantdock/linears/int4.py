"""Codes of up to 4 bits, as torch's CPU kernel reads them: made, multiplied with, and turned back."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from quantdock.linears.affine import STEP, pieces
from quantdock.linears.crossover import most_rows
from quantdock.linears.weights import Maker, Weight, by_rows, grouped, is_fast_cpu

PATH = "int4pack"

_GROUPS = (256, 128, 64, 32)  # inputs per group that the kernel knows
_BLOCK = 64  # outputs that the kernel packs on their own, whatever the instruction set (some pack 32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Int4Form:
    """A weight in the kernel's form. It depends on the CPU, so it stays in this process."""

    path: ClassVar[str] = PATH
    rounds: ClassVar[bool] = True
    elements: ClassVar[int] = STEP
    packed: Tensor
    """In the kernel's order; here uint8 ``[outputs, inputs / 2]``."""
    scales: Tensor
    """bfloat16 ``[groups, outputs]``."""
    zeros: Tensor
    """uint8 ``[groups, outputs]``, shifted."""
    shift: int
    """What is added to codes and zero points before packing. The kernel adds what a code of 8 stands for in bfloat16,
    so codes of fewer bits lose the least when their middle is at 8, too."""
    affine: Tensor
    """bfloat16 ``[kernel's groups, outputs, 2]``: scale, and what a code of 8 stands for."""
    size: int
    """Inputs per group."""
    kernel_size: int
    """Inputs per group as the kernel has them; it divides ``size``."""
    order: Tensor | None
    """The inputs in the order that they are packed in; ``None`` for the stored one."""
    most_rows: int
    """Of activations, for which the kernel is faster than dequantizing."""

    def multiply(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` in bfloat16 to ``[..., outputs]``, for few rows."""
        return by_rows(self._product, x)

    def arranged(self, x: Tensor) -> Tensor:
        """The activations in the order of the packed inputs."""
        return x.contiguous() if self.order is None else x.index_select(1, self.order)

    def columns(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Some outputs of the weight, ``[inputs, n]`` in ``dtype``; the inputs in the order that they are packed in."""
        codes = self._unpacked(part)
        grouped = codes.view(len(self.scales), self.size, codes.shape[1])
        # The differences are exact as bytes, which torch subtracts several times faster than bfloat16.
        differences = grouped.sub_(self.zeros[:, None, part]).view(torch.int8)
        return differences.to(dtype).mul_(self.scales[:, None, part]).view(codes.shape)

    def codes(self, part: slice) -> Tensor:
        """Some outputs' codes, uint8 ``[inputs, n]``, as ``Weight.codes`` gave them; ``part`` starts at a multiple of
        64."""
        codes = self._unpacked(part).sub_(self.shift)
        return codes if self.order is None else torch.empty_like(codes).index_copy_(0, self.order, codes)

    def _product(self, rows: Tensor) -> Tensor:
        packed, affine = self.packed, self.affine
        return torch._weight_int4pack_mm_for_cpu(self.arranged(rows), packed, self.kernel_size, affine)

    def _unpacked(self, part: slice) -> Tensor:
        """The shifted codes, uint8 ``[inputs, n]``."""
        return _unpack(self.packed[part])


def fits(weight: Weight) -> bool:
    """Whether the kernel can read a weight."""
    return is_fast_cpu() and weight.bits <= 4 and weight.outputs % 16 == 0 and is_grouped_for_kernel(weight)


def make(weight: Weight) -> Int4Form:
    """The kernel's form of a weight that fits."""
    packed = torch.empty(weight.outputs, weight.inputs // 2, dtype=torch.uint8, device="cpu")
    for part, codes in shifted(weight, STEP):
        packed[part] = _pack(codes)
    return assemble(Int4Form, weight, packed, most_rows(PATH))


def is_grouped_for_kernel(weight: Weight) -> bool:
    """Whether it has groups that torch's kernels for 4 bits know, on any device."""
    found = grouped(weight)
    if found is None or not weight.outputs:
        return False
    return any(found[0] % known == 0 for known in _GROUPS) and weight.inputs % found[0] == 0


def shifted(weight: Weight, elements: int) -> Iterator[tuple[slice, Tensor]]:
    """Some outputs at a time, and their codes with the middle at 8, uint8 ``[inputs, n]`` in the form's order."""
    found = grouped(weight)
    assert found is not None
    for part in pieces(weight.outputs, weight.inputs, elements):
        codes = weight.codes(part)
        yield part, (codes if found[1] is None else codes.index_select(0, found[1])) + _shift(weight)


def _shift(weight: Weight) -> int:
    return 8 - (1 << weight.bits >> 1)


_Form = TypeVar("_Form", bound=Int4Form)


def assemble(kind: type[_Form], weight: Weight, packed: Tensor, most: int) -> _Form:
    """A form, given the packed codes and the rows that it is good for."""
    found = grouped(weight)
    assert found is not None
    size, order = found
    kernel_size = next(known for known in _GROUPS if size % known == 0)
    every, shift = slice(0, weight.outputs), _shift(weight)
    scales, zeros = weight.scales(every).to(torch.bfloat16), weight.zeros(every) + shift
    affine = torch.stack([scales, (8 - zeros.to(torch.bfloat16)) * scales], dim=-1)
    affine = affine.repeat_interleave(size // kernel_size, dim=0)
    return kind(
        packed=packed,
        scales=scales,
        zeros=zeros,
        shift=shift,
        affine=affine,
        size=size,
        kernel_size=kernel_size,
        order=order,
        most_rows=most,
    )


def _pack(codes: Tensor) -> Tensor:
    """uint8 ``[inputs, n]`` to uint8 ``[n, inputs / 2]``."""
    result: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.t().to(torch.int32).contiguous(), 1)
    return result.view(codes.shape[1], codes.shape[0] // 2)


def _unpack(packed: Tensor) -> Tensor:
    """What ``_pack`` undoes, of outputs from a multiple of ``_BLOCK`` on."""
    count, inputs = packed.shape[0], packed.shape[1] * 2
    codes = torch.empty(inputs, count, dtype=torch.uint8, device="cpu")
    whole = count // _BLOCK * _BLOCK
    if whole:
        _unpack_blocks(packed[:whole].view(-1, _BLOCK * inputs // 2), codes[:, :whole].view(inputs, -1, _BLOCK))
    if whole < count:
        _unpack_blocks(packed[whole:].reshape(1, -1), codes[:, whole:, None].transpose(1, 2))
    return codes


def _unpack_blocks(packed: Tensor, codes: Tensor) -> None:
    """``[blocks, bytes]`` into ``[inputs, blocks, outputs of a block]``."""
    inputs, blocks, outputs = codes.shape
    if _is_halved(outputs, inputs):
        pairs = packed.view(blocks, inputs, outputs // 2).transpose(0, 1)
        codes[..., : outputs // 2] = pairs & 15
        codes[..., outputs // 2 :] = pairs >> 4
        return
    found = torch.empty(blocks, outputs * inputs, dtype=torch.uint8, device="cpu")
    found[:, _places(outputs, inputs)] = torch.stack([packed & 15, packed >> 4], dim=-1).view(blocks, -1)
    codes.copy_(found.view(blocks, outputs, inputs).permute(2, 0, 1))


def _places(outputs: int, inputs: int) -> Tensor:
    """Where each code of a packed block comes from, as an index into ``[outputs, inputs]``: found by packing the
    indices themselves, 4 bits at a time, since torch's order depends on the instruction set and is written nowhere."""
    index = torch.arange(outputs * inputs).view(outputs, inputs)
    places = torch.zeros(outputs * inputs, dtype=torch.int64)
    for shift in range(0, max(1, int(index[-1, -1]).bit_length()), 4):
        digits = _pack((index >> shift & 15).to(torch.uint8).t()).reshape(-1)
        places += torch.stack([digits & 15, digits >> 4], dim=-1).view(-1).to(torch.int64) << shift
    return places


@functools.lru_cache(maxsize=256)
def _is_halved(outputs: int, inputs: int) -> bool:
    """Whether a block's bytes go input by input, and hold an output in the low half and in the high one that half a
    block further on; so it is with AVX512."""
    index = torch.arange(outputs * inputs).view(2, outputs // 2, inputs)
    return torch.equal(_places(outputs, inputs), index.permute(2, 1, 0).reshape(-1))


# float16 keeps 3 bits more than bfloat16; without that rounding, a token takes 20 times as long on this path.
MAKER = Maker(path=PATH, device="cpu", rounds=True, dtypes=(torch.bfloat16, torch.float16), fits=fits, make=make)
