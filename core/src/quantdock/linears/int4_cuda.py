"""Codes of 4 bits as torch's CUDA kernel reads them: made, multiplied with, and turned back.

Their order is that of ``matrix_to_m16n8k16_Bint4_layout`` in torch's ``aten/src/ATen/native/cuda/int4mm.cu``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantdock.linears import int4
from quantdock.linears.affine import DEVICE_STEP
from quantdock.linears.crossover import DEVICE_ROWS
from quantdock.linears.trial import Trial
from quantdock.linears.trusting import trusted
from quantdock.linears.weights import Maker, Weight, capability_of, dequantize, device_of

PATH = int4.PATH

_CAPABILITY = (8, 0)
_OUTPUTS = 8  # of a tile


@dataclass(frozen=True, kw_only=True, eq=False)
class Int4CudaForm(int4.Int4Form):
    """A weight in the kernel's form: ``packed`` is int32 ``[outputs / 8, tiles, 32, words]``. A tile has
    ``32 * words`` inputs, of 32 of which a word has eight."""

    elements: ClassVar[int] = DEVICE_STEP

    def _product(self, rows: Tensor) -> Tensor:
        return torch._weight_int4pack_mm(self.arranged(rows), self.packed, self.kernel_size, self.affine)

    def _unpacked(self, part: slice) -> Tensor:
        return unpacked(self.packed[part.start // _OUTPUTS : -(-part.stop // _OUTPUTS)])


def unpacked(packed: Tensor) -> Tensor:
    """Codes, uint8 ``[inputs, outputs]``, of packed ones.

    A word has the inputs ``2 * q`` and ``2 * q + 1`` of each of the four eights that are neighbours: the even ones in
    its lower half, the odd ones in the upper one; ``q`` and the output are its place among 32.
    """
    tiles, across, _, words = packed.shape
    halves = packed.view(torch.uint8).view(tiles, across, _OUTPUTS, 4, words, 2, 2)
    codes = torch.stack([halves & 15, halves >> 4], dim=-1)
    # [tile, across, output, q, word, odd, eights, eight] to [across, word, eights, eight, q, odd, tile, output]
    return codes.permute(1, 4, 6, 7, 3, 5, 0, 2).reshape(across * words * 32, tiles * _OUTPUTS)


def fits(weight: Weight) -> bool:
    """Whether the kernel works where a weight is, and can read it."""
    if weight.bits != 4 or weight.outputs % _OUTPUTS or not int4.is_grouped_for_kernel(weight):
        return False  # fewer bits would take the memory of 4
    device = device_of(weight)
    return capability_of(device) >= _CAPABILITY and trusted(f"{PATH} of torch", device, works)


def make(weight: Weight) -> Int4CudaForm:
    """The kernel's form of a weight that fits."""
    inner = next(count for count in (8, 4, 2) if weight.inputs % (16 * count) == 0)  # the wider, the fewer reads
    shape = (weight.outputs // _OUTPUTS, weight.inputs // (16 * inner), 32, inner // 2)
    packed = torch.empty(shape, dtype=torch.int32, device=device_of(weight))
    for part, codes in int4.shifted(weight, DEVICE_STEP):
        pairs = (codes[0::2] << 4 | codes[1::2]).t().contiguous()
        packed[part.start // _OUTPUTS : part.stop // _OUTPUTS] = torch._convert_weight_to_int4pack(pairs, inner)
    return int4.assemble(Int4CudaForm, weight, packed, DEVICE_ROWS[PATH])


def works(device: torch.device) -> bool:
    """Multiply the identity, whose product is the weight, and turn the form back."""
    weight = Trial(device, inputs=192, outputs=80, symmetric=True)  # with other zeros, the kernel would round
    form, every = make(weight), slice(0, weight.outputs)
    product = form.multiply(torch.eye(weight.inputs, dtype=torch.bfloat16, device=device))
    found = torch.equal(form.codes(every), weight.codes(every))
    return found and torch.equal(product.t(), dequantize(weight, torch.bfloat16))


# The Triton kernel takes other dtypes as they are, so none has to be rounded to this one.
MAKER = Maker(path=PATH, device="cuda", rounds=True, dtypes=(torch.bfloat16,), fits=fits, make=make)
