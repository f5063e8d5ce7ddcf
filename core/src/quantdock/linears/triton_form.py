"""Codes in the words that our Triton kernel reads, on devices: made, multiplied with, and turned back.

A chunk of words has the codes of some neighbouring inputs, of all outputs: word ``[i, n]`` of 16 has those of output
``n`` and of the inputs ``i``, ``16 + i``, ``32 + i`` and so on, from its lowest bits up. So a shift gives the codes of
16 neighbouring inputs, which is what tensor cores multiply at a time, and neighbouring threads read neighbouring words.
Of 3 bits, the lower two are in 32 words, 16 for each half of the inputs, and the highest is in 16 more.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantdock.linears.affine import DEVICE_STEP, Grouping, dequantize_columns, pieces
from quantdock.linears.crossover import DEVICE_ROWS
from quantdock.linears.paths import DTYPES
from quantdock.linears.trial import Trial
from quantdock.linears.trusting import trusted
from quantdock.linears.weights import Maker, Weight, by_rows, capability_of, dequantize, device_of, grouped

PATH = "triton"

_CHUNK = {2: (16, 256), 3: (48, 512), 4: (16, 128), 8: (16, 64)}
"""Bits of a code -> words of a chunk, per output, and the inputs whose codes they have."""
_RUN = 16  # inputs whose codes have the same place in their words
_RUNS = {2: 8, 3: 8, 4: 8, 8: 4}
"""Bits of a code -> runs of a step, which are unrolled: as many as are in a word, but no more than compile fast."""
_BLOCK_OUTPUTS = 64
_SCALES = (torch.float32, torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)  # the first one whose tensor cores multiply bfloat16
_PROGRAMS = 4
"""Per multiprocessor, if there are rows and outputs for so many: how much it takes to keep memory busy."""


class TritonForm:
    """A weight in the kernel's words. It is as exact as the stored one, for activations of any dtype, where groups have
    a multiple of 16 inputs; elsewhere each element is rounded to the dtype of the activations.

    Args:
        weight: one that fits.
    """

    path: ClassVar[str] = PATH
    rounds: ClassVar[bool] = False
    elements: ClassVar[int] = DEVICE_STEP
    most_rows: ClassVar[int] = DEVICE_ROWS[PATH]

    def __init__(self, weight: Weight) -> None:
        self._bits, self._inputs, self._outputs = weight.bits, weight.inputs, weight.outputs
        self._order: Tensor | None = None
        self._grouping: Grouping = weight.grouping()
        found = grouped(weight)
        if found is not None:
            self._grouping, self._order = found
        every, device = slice(0, weight.outputs), device_of(weight)
        self._scales, self._zeros = weight.scales(every).contiguous(), weight.zeros(every).contiguous()
        per_chunk, inputs = _CHUNK[self._bits]
        self._chunks = -(-self._inputs // inputs)
        self._size, self._sharing, self._index = self._groups_of_runs(device)
        self._words = torch.empty(self._chunks, per_chunk, self._outputs, dtype=torch.int32, device=device)
        for part in pieces(self._outputs, self._inputs, DEVICE_STEP):
            codes = weight.codes(part)
            codes = codes if self._order is None else codes.index_select(0, self._order)
            self._words[..., part] = _packed(codes, self._bits)

    def multiply(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]`` in the same dtype, for few rows."""
        return by_rows(self._product, x)

    def arranged(self, x: Tensor) -> Tensor:
        """The activations in the order of the packed inputs."""
        return x.contiguous() if self._order is None else x.index_select(1, self._order)

    def columns(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Some outputs of the weight, ``[inputs, n]`` in ``dtype``; the inputs in the order that they are packed in."""
        codes = _unpacked(self._words[..., part], self._bits)[: self._inputs]
        return dequantize_columns(codes, self._scales[:, part], self._zeros[:, part], self._grouping, dtype)

    def codes(self, part: slice) -> Tensor:
        """Some outputs' codes, uint8 ``[inputs, n]``, as ``Weight.codes`` gave them."""
        codes = _unpacked(self._words[..., part], self._bits)[: self._inputs]
        return codes if self._order is None else torch.empty_like(codes).index_copy_(0, self._order, codes)

    def _product(self, x: Tensor) -> Tensor:
        from quantdock.linears.triton_product import product

        x, rows = self.arranged(x), len(x)
        block = 16 if rows <= 16 else 32 if rows <= 32 else 64
        tiles = (-(-self._outputs // _BLOCK_OUTPUTS), -(-rows // block))
        steps = -(-self._inputs // (_RUN * _RUNS[self._bits]))
        each = max(1, steps * tiles[0] * tiles[1] // (_PROGRAMS * _multiprocessors(x.device)))
        splits = -(-steps // each)
        sums = torch.empty(splits, rows, self._outputs, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current one
            product[tiles[0], splits, tiles[1]](
                *(x, self._words, self._scales, self._zeros, self._index, sums),
                *(rows, self._inputs, self._outputs, self._size, steps, each),
                **constants(self._bits, self._sharing, block),
                WIDE=x.device.type == "cpu",
            )
        # In one order, so that a product has the same bits each time.
        return (sums[0] if splits == 1 else sums.sum(0)).to(x.dtype)

    def _groups_of_runs(self, device: torch.device) -> tuple[int, int, Tensor]:
        """Inputs per group, how many neighbouring runs surely share one, and the group of each input if none do."""
        grouping, runs = self._grouping, _RUNS[self._bits]
        if isinstance(grouping, int):
            if grouping >= self._inputs:
                return self._chunks * _CHUNK[self._bits][1], runs, self._words_of_none(device)
            if grouping % _RUN == 0:
                return grouping, math.gcd(runs, grouping // _RUN), self._words_of_none(device)
            grouping = torch.arange(self._inputs, device=device) // grouping
        return _RUN, 0, grouping.to(torch.int32)

    @staticmethod
    def _words_of_none(device: torch.device) -> Tensor:
        return torch.empty(0, dtype=torch.int32, device=device)


def constants(bits: int, sharing: int, block: int) -> dict[str, Any]:
    """What the kernel is compiled for; see there. ``block`` is the number of rows at a time: 16, 32 or 64."""
    return {
        "BITS": bits,
        "RUNS": _RUNS[bits],
        "SHARING": sharing,
        "PRECISION": "ieee",
        "BLOCK_ROWS": block,
        "BLOCK_OUTPUTS": _BLOCK_OUTPUTS,
        "num_stages": 3 if block == 16 and sharing else 2,  # what else is read ahead takes too much shared memory
    }


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``[inputs, n]`` to int32 ``[chunks, words of a chunk, n]``."""
    inputs = _CHUNK[bits][1]
    missing = -len(codes) % inputs
    padded = torch.nn.functional.pad(codes, (0, 0, 0, missing)) if missing else codes
    chunks = padded.reshape(-1, inputs, codes.shape[1])
    if bits != 3:
        return _joined(chunks, bits)
    low = _joined((chunks & 3).view(-1, inputs // 2, codes.shape[1]), 2)
    return torch.cat([low.view(len(chunks), 32, -1), _joined(chunks >> 2, 1)], dim=1)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """What ``_packed`` undoes; with the codes of inputs that it put behind the last one."""
    chunks, _, outputs = words.shape
    if bits == 3:
        low = _apart(words[:, :32].reshape(2 * chunks, _RUN, outputs), 2).view(chunks, _CHUNK[3][1], outputs)
        codes = low.bitwise_or_(_apart(words[:, 32:], 1) << 2)
    else:
        codes = _apart(words, bits)
    return codes.view(chunks * _CHUNK[bits][1], outputs)


def _joined(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``[chunks, 16 * codes of a word, n]`` to int32 ``[chunks, 16, n]``."""
    places = codes.view(len(codes), 4, 8 // bits, _RUN, -1)  # the bytes of a word, and the codes of a byte
    packed = places[:, :, 0].clone()
    for place in range(1, 8 // bits):
        packed |= places[:, :, place] << place * bits
    return packed.permute(0, 2, 3, 1).contiguous().view(torch.int32).squeeze(-1)


def _apart(words: Tensor, bits: int) -> Tensor:
    """What ``_joined`` undoes."""
    chunks, _, outputs = words.shape
    packed = words.contiguous().view(torch.uint8).view(chunks, _RUN, outputs, 4).permute(0, 3, 1, 2)
    codes = torch.empty(chunks, 4, 8 // bits, _RUN, outputs, dtype=torch.uint8, device=words.device)
    for place in range(8 // bits):
        codes[:, :, place] = (packed >> place * bits) & (1 << bits) - 1
    return codes.view(chunks, _RUN * 32 // bits, outputs)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def fits(weight: Weight) -> bool:
    """Whether the kernel works where a weight is, and can read it."""
    if weight.bits not in _CHUNK or not weight.inputs or not weight.outputs:
        return False
    if weight.scales(slice(0, 1)).dtype not in _SCALES:
        return False
    device = device_of(weight)
    return capability_of(device) >= _CAPABILITY and trusted(PATH, device, works)


def make(weight: Weight) -> TritonForm:
    """The kernel's form of a weight that fits."""
    return TritonForm(weight)


def works(device: torch.device) -> bool:
    """Multiply the identity, whose product is the weight."""
    weight = Trial(device, inputs=192, outputs=80)
    product = TritonForm(weight).multiply(torch.eye(weight.inputs, dtype=torch.bfloat16, device=device))
    return torch.equal(product.t(), dequantize(weight, torch.bfloat16))


MAKER = Maker(path=PATH, device="cuda", rounds=False, dtypes=DTYPES, fits=fits, make=make)
