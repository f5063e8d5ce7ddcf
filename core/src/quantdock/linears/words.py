"""Codes in the words that the compiled kernels of quantdock-kernels read: made, multiplied with, and turned back."""

from __future__ import annotations

import torch
from torch import Tensor

from quantdock.linears.affine import pieces
from quantdock.linears.crossover import most_rows
from quantdock.linears.paths import DTYPES
from quantdock.linears.weights import Maker, Weight, grouped, is_fast_cpu
from quantdock.ops.choice import kernels

PATH = "words"

_BLOCK = 64  # outputs whose words lie together
_BITS = {2: 2, 3: 4, 4: 4, 8: 8}  # of a code -> that it takes in a word
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


class WordsForm:
    """A weight as ``quantdock_kernels.WordMatrix`` has it. It is as exact as the stored one, for activations of any
    dtype.

    Args:
        weight: one that fits.
    """

    path, rounds = PATH, False
    elements = 1 << 22  # more than a cache holds, so that each thread has blocks to decode

    def __init__(self, weight: Weight) -> None:
        found, compiled = grouped(weight), kernels()
        assert found is not None
        assert compiled is not None
        size, self._order = found
        self._compiled = compiled
        self._bits, self._inputs, self._outputs = _BITS[weight.bits], weight.inputs, weight.outputs
        self._words = compiled.WordMatrix.room(weight.inputs * self._bits // 32 * weight.outputs)
        for part in pieces(weight.outputs, weight.inputs):
            codes = weight.codes(part)
            codes = codes.contiguous() if self._order is None else codes.index_select(0, self._order)
            compiled.pack_blocks(codes, bits=self._bits, words=self._words[self._place(part)])
        every = slice(0, weight.outputs)
        self._matrix = compiled.WordMatrix(
            self._words,
            weight.scales(every).contiguous(),
            weight.zeros(every).contiguous(),
            bits=self._bits,
            inputs=weight.inputs,
            group=size,
        )
        self.most_rows = most_rows(PATH)

    def multiply(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]`` in the same dtype, for few rows."""
        result: Tensor = self._matrix.multiply(self.arranged(x))
        return result

    def arranged(self, x: Tensor) -> Tensor:
        """The activations in the order of the packed inputs."""
        return x.contiguous() if self._order is None else x.index_select(-1, self._order)

    def columns(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Some outputs of the weight, ``[inputs, n]`` in ``dtype``; the inputs in the order that they are packed in."""
        result: Tensor = self._matrix.decode(part, dtype)
        return result

    def codes(self, part: slice) -> Tensor:
        """Some outputs' codes, uint8 ``[inputs, n]``, as ``Weight.codes`` gave them; ``part`` starts at a multiple of
        64."""
        first, stop, _ = part.indices(self._outputs)
        whole = slice(first, min(-(-stop // _BLOCK) * _BLOCK, self._outputs))
        codes = torch.empty(self._inputs, whole.stop - first, dtype=torch.uint8, device="cpu")
        self._compiled.unpack_blocks(self._words[self._place(whole)], bits=self._bits, codes=codes)
        codes = codes[:, : stop - first]
        return codes if self._order is None else torch.empty_like(codes).index_copy_(0, self._order, codes)

    def _place(self, part: slice) -> slice:
        """Where the words of some outputs are, whole blocks."""
        row = self._inputs * self._bits // 32
        return slice(part.start * row, part.stop * row)


def fits(weight: Weight) -> bool:
    """Whether the compiled kernels are there, fast on this CPU, and can read a weight."""
    compiled = kernels()
    if not is_fast_cpu() or compiled is None or not compiled.has_fast_products() or weight.bits not in _BITS:
        return False
    found, codes = grouped(weight), 32 // _BITS[weight.bits]
    if found is None or not weight.outputs or not weight.inputs or weight.inputs % codes:
        return False
    return (found[0] % codes == 0 or found[0] >= weight.inputs) and weight.scales(slice(0, 1)).dtype in _SCALES


def make(weight: Weight) -> WordsForm:
    """The kernels' form of a weight that fits."""
    return WordsForm(weight)


MAKER = Maker(path=PATH, device="cpu", rounds=False, dtypes=DTYPES, fits=fits, make=make)
