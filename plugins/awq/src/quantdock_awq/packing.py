"""The forms that the tensors of an AWQ weight have on disk: where its codes, scales and zero points are.

Facts from AutoAWQ 0.2.9 (``WQLinear_GEMM``, ``WQLinear_GEMV``, ``WQLinear_GEMVFast``) and gptqmodel 7.6.0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from quantdock import TensorSpec, ops

BITS = 4
MIDDLE = 8
"""The zero point of symmetric weights."""

_PER_WORD = 8


class Packing(ABC):
    """One form. Shapes are of a weight ``[outputs, inputs]``, in groups of ``size`` inputs."""

    label: str
    """As messages call it."""
    zeros_names: tuple[str, ...] = ("qzeros",)
    """What the tensor of zero points may be called, the usual name first."""

    @abstractmethod
    def misfit(self, outputs: int, inputs: int, size: int) -> str | None:
        """Why a weight has no such form; ``None`` when it has. That groups divide the inputs is known."""

    @abstractmethod
    def components(self, outputs: int, inputs: int, size: int, scale_dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The stored tensors of a weight that fits: ``qweight``, ``scales`` and the first of ``zeros_names``."""

    @abstractmethod
    def shape_of(self, qweight: tuple[int, ...]) -> tuple[int, int]:
        """``[outputs, inputs]`` of the weight whose ``qweight`` has a shape."""

    @abstractmethod
    def codes(self, qweight: Tensor, part: slice) -> Tensor:
        """The codes of some outputs, uint8 ``[inputs, n]``."""

    @abstractmethod
    def put_codes(self, codes: Tensor, qweight: Tensor, part: slice) -> None:
        """What ``codes`` undoes; ``part`` starts at a multiple of 8, and so it ends, unless with the last output."""

    @abstractmethod
    def scales(self, scales: Tensor, groups: int, part: slice) -> Tensor:
        """The scales of some outputs, ``[groups, n]``."""

    @abstractmethod
    def zeros(self, zeros: Tensor, scales: Tensor, groups: int, part: slice) -> Tensor:
        """The zero points of some outputs, uint8 ``[groups, n]``."""

    def damage(self, tensors: Mapping[str, Tensor], groups: int) -> str | None:
        """What is wrong with the values of stored tensors; ``None`` when nothing is."""
        return None


class Gemm(Packing):
    """Along the outputs, eight to a word, in AWQ's order: ``qweight`` int32 ``[inputs, outputs / 8]``, ``qzeros`` int32
    ``[groups, outputs / 8]``, ``scales`` ``[groups, outputs]``."""

    label = "gemm"

    def misfit(self, outputs: int, inputs: int, size: int) -> str | None:
        return f"{outputs} outputs, no multiple of 8, don't fill whole words" if outputs % _PER_WORD else None

    def components(self, outputs: int, inputs: int, size: int, scale_dtype: torch.dtype) -> dict[str, TensorSpec]:
        words, groups = outputs // _PER_WORD, inputs // size
        return {
            "qweight": TensorSpec(dtype=torch.int32, shape=(inputs, words)),
            "qzeros": TensorSpec(dtype=torch.int32, shape=(groups, words)),
            "scales": TensorSpec(dtype=scale_dtype, shape=(groups, outputs)),
        }

    def shape_of(self, qweight: tuple[int, ...]) -> tuple[int, int]:
        return qweight[1] * _PER_WORD, qweight[0]

    def codes(self, qweight: Tensor, part: slice) -> Tensor:
        first, last = part.start // _PER_WORD, -(-part.stop // _PER_WORD)
        words = qweight[:, first:last].contiguous()
        codes = words.new_empty(len(words), words.shape[1] * _PER_WORD, dtype=torch.uint8)
        ops.unpack_words(words, bits=BITS, dim=1, codes=codes, interleaved=True)
        return codes[:, part.start - first * _PER_WORD : part.stop - first * _PER_WORD]

    def put_codes(self, codes: Tensor, qweight: Tensor, part: slice) -> None:
        words = qweight.new_empty(len(codes), codes.shape[1] // _PER_WORD)
        ops.pack_words(codes.contiguous(), bits=BITS, dim=1, words=words, interleaved=True)
        qweight[:, part.start // _PER_WORD : part.stop // _PER_WORD] = words

    def scales(self, scales: Tensor, groups: int, part: slice) -> Tensor:
        return scales[:, part]

    def zeros(self, zeros: Tensor, scales: Tensor, groups: int, part: slice) -> Tensor:
        return self.codes(zeros, part)


class Gemv(Packing):
    """Along the inputs, eight to a word, in order: ``qweight`` int32 ``[outputs, inputs / 8]``, ``qzeros`` int32
    ``[outputs, width]`` along the groups, ``scales`` ``[outputs, 8 * width]``, zeros after the last group."""

    label = "gemv"

    def misfit(self, outputs: int, inputs: int, size: int) -> str | None:
        if inputs % _PER_WORD:
            return f"{inputs} inputs, no multiple of 8, don't fill whole words"
        return None if _width(inputs, size) else f"groups of {size} inputs, expected 16, 32, 64 or at least 128"

    def components(self, outputs: int, inputs: int, size: int, scale_dtype: torch.dtype) -> dict[str, TensorSpec]:
        width = _width(inputs, size)
        return {
            "qweight": TensorSpec(dtype=torch.int32, shape=(outputs, inputs // _PER_WORD)),
            "qzeros": TensorSpec(dtype=torch.int32, shape=(outputs, width)),
            "scales": TensorSpec(dtype=scale_dtype, shape=(outputs, width * _PER_WORD)),
        }

    def shape_of(self, qweight: tuple[int, ...]) -> tuple[int, int]:
        return qweight[0], qweight[1] * _PER_WORD

    def codes(self, qweight: Tensor, part: slice) -> Tensor:
        words = qweight[part].contiguous()
        codes = words.new_empty(words.shape[1] * _PER_WORD, len(words), dtype=torch.uint8)
        ops.unpack_words(words, bits=BITS, dim=1, codes=codes, turn=True)
        return codes

    def put_codes(self, codes: Tensor, qweight: Tensor, part: slice) -> None:
        ops.pack_words(codes.contiguous(), bits=BITS, dim=1, words=qweight[part], turn=True)

    def scales(self, scales: Tensor, groups: int, part: slice) -> Tensor:
        return scales[part, :groups].t()

    def zeros(self, zeros: Tensor, scales: Tensor, groups: int, part: slice) -> Tensor:
        return self.codes(zeros, part)[:groups]


class GemvFast(Packing):
    """Four outputs interleaved, four codes to a word: ``qweight`` int16 ``[outputs / 4, inputs]``; ``scales`` and
    ``qzeros``, the negative products of scales and zero points, both ``[8 * width, outputs]``, zeros after the last
    group. llm-awq calls the products ``scaled_zeros``.

    The words of a row of ``qweight`` are, for each 64 inputs and each of the four outputs, 16 side by side: 64 codes.
    Each 32 of them stand as ``[4, 4, 2]`` turned to ``[4 (the second), 4 (the first), 2]``, and each eight after that
    are in AWQ's order.
    """

    label = "gemv_fast"
    zeros_names = ("qzeros", "scaled_zeros")

    _ROWS = 4
    _STRIDE = 64

    def misfit(self, outputs: int, inputs: int, size: int) -> str | None:
        if outputs % self._ROWS or inputs % self._STRIDE:
            return f"{outputs} outputs and {inputs} inputs, expected multiples of {self._ROWS} and {self._STRIDE}"
        return None if _width(inputs, size) else f"groups of {size} inputs, expected 16, 32, 64 or at least 128"

    def components(self, outputs: int, inputs: int, size: int, scale_dtype: torch.dtype) -> dict[str, TensorSpec]:
        padded = TensorSpec(dtype=scale_dtype, shape=(_width(inputs, size) * _PER_WORD, outputs))
        qweight = TensorSpec(dtype=torch.int16, shape=(outputs // self._ROWS, inputs))
        return {"qweight": qweight, "qzeros": padded, "scales": padded}

    def shape_of(self, qweight: tuple[int, ...]) -> tuple[int, int]:
        return qweight[0] * self._ROWS, qweight[1]

    def codes(self, qweight: Tensor, part: slice) -> Tensor:
        first, last = part.start // self._ROWS, -(-part.stop // self._ROWS)
        blocks, inputs = last - first, qweight.shape[1]
        words = self._by_row(qweight[first:last].contiguous()).reshape(blocks * self._ROWS, inputs // _PER_WORD)
        codes = words.new_empty(inputs, len(words), dtype=torch.uint8)
        ops.unpack_words(words, bits=BITS, dim=1, codes=codes, turn=True, interleaved=True)
        ordered = codes.view(inputs // 32, 4, 4, 2, len(words)).transpose(1, 2).reshape(inputs, len(words))
        return ordered[:, part.start - first * self._ROWS : part.stop - first * self._ROWS]

    def put_codes(self, codes: Tensor, qweight: Tensor, part: slice) -> None:
        inputs, outputs = codes.shape
        ordered = codes.reshape(inputs // 32, 4, 4, 2, outputs).transpose(1, 2).reshape(inputs, outputs)
        words = torch.empty(outputs, inputs // _PER_WORD, dtype=torch.int32, device=codes.device)
        ops.pack_words(ordered, bits=BITS, dim=1, words=words, turn=True, interleaved=True)
        rows = self._by_row(qweight[part.start // self._ROWS : part.stop // self._ROWS])
        rows.copy_(words.view(rows.shape))

    def _by_row(self, qweight: Tensor) -> Tensor:
        """A view of ``qweight``: int32 ``[blocks of outputs, outputs, blocks of inputs, words]``."""
        blocks, inputs = qweight.shape
        words = qweight.view(torch.int32)
        return words.view(blocks, inputs // self._STRIDE, self._ROWS, self._STRIDE // _PER_WORD).transpose(1, 2)

    def scales(self, scales: Tensor, groups: int, part: slice) -> Tensor:
        return scales[:groups, part]

    def zeros(self, zeros: Tensor, scales: Tensor, groups: int, part: slice) -> Tensor:
        quotients = _quotients(zeros[:groups, part], scales[:groups, part])
        return quotients.round_().clamp_(0, 2**BITS - 1).to(torch.uint8)

    def damage(self, tensors: Mapping[str, Tensor], groups: int) -> str | None:
        name = next(name for name in self.zeros_names if name in tensors)
        quotients = _quotients(tensors[name][:groups], tensors["scales"][:groups])
        whole = quotients.round().clamp_(0, 2**BITS - 1)
        off = quotients.sub_(whole).abs_().max().item()
        if off <= 0.25:  # a product is rounded to the dtype of scales, which moves 15 by 0.06 at the most
            return None
        return f"{name} holds what isn't the negative product of a scale and a zero point from 0 to 15"


GEMM = Gemm()
GEMV = Gemv()
GEMV_FAST = GemvFast()


def _width(inputs: int, size: int) -> int:
    """Words that hold the zero points of an output, 0 when no kernel has such groups (``calculate_zeros_width``)."""
    multiple = 1 if size >= 128 else {64: 2, 32: 4, 16: 8}.get(size, 0)
    words = math.ceil(inputs // size / _PER_WORD)
    return math.ceil(words / multiple) * multiple if multiple else 0


def _quotients(products: Tensor, scales: Tensor) -> Tensor:
    """``-products / scales`` in float32; 0 where both are."""
    found = products.float().neg_().div_(scales.float())
    return found.masked_fill_((scales == 0) & (products == 0), 0)
