"""A layer over grouped integers that stores a byte per code, and its product by the definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from quantdock import linears


class Plain:
    """A weight that isn't packed at all."""

    def __init__(self, buffers: Mapping[str, Tensor | None], bits: int, size: int) -> None:
        self.bits, self._size, self._buffers = bits, size, buffers
        self.inputs = len(self._of("index")) if buffers["index"] is not None else size * len(self._of("scale"))
        self.outputs = self._of("scale").shape[1]

    def _of(self, name: str) -> Tensor:
        found = self._buffers[name]
        assert found is not None
        return found

    def codes(self, part: slice) -> Tensor:
        return self._of("code")[:, part]

    def scales(self, part: slice) -> Tensor:
        return self._of("scale")[:, part]

    def zeros(self, part: slice) -> Tensor:
        return self._of("zero")[:, part]

    def grouping(self) -> linears.Grouping:
        return self._size if self._buffers["index"] is None else self._of("index")


class PlainLinear(linears.GroupedLinear):
    """The format that stores a byte per code."""

    code_buffers: ClassVar[tuple[str, ...]] = ("code",)

    def __init__(
        self,
        *,
        bits: int,
        inputs: int,
        outputs: int,
        size: int,
        ordered: bool = True,
        sym: bool = False,
        bias: bool = True,
        scale_dtype: torch.dtype = torch.float16,
    ) -> None:
        generator = torch.Generator().manual_seed(bits * inputs + outputs + size)
        given = nn.Parameter(torch.randn(outputs, generator=generator)) if bias else None
        super().__init__(inputs, outputs, bias=given)
        self.bits, self.size = bits, size
        groups = inputs // size
        zero = torch.randint(0, 2**bits, (groups, outputs), generator=generator, dtype=torch.uint8)
        scale = 0.1 * torch.rand(groups, outputs, generator=generator) + 0.01
        index = (torch.arange(inputs) // size)[torch.randperm(inputs, generator=generator)]
        self.register_buffer("code", torch.randint(0, 2**bits, (inputs, outputs), generator=generator).to(torch.uint8))
        self.register_buffer("scale", scale.to(scale_dtype))
        self.register_buffer("zero", torch.full_like(zero, 2 ** (bits - 1)) if sym else zero)
        self.register_buffer("index", None if ordered else index)
        self.eval()

    def stored_weight(self) -> Plain:
        return Plain(self._buffers, self.bits, self.size)

    def encode(self, codes: Callable[[slice], Tensor]) -> Mapping[str, Tensor]:
        parts = [codes(part) for part in linears.pieces(self.out_features, self.in_features)]
        return {"code": torch.cat(parts, dim=1)}


def exact(layer: PlainLinear) -> Tensor:
    """The weight in float64, by the definition, ``[out, in]``."""
    index = torch.arange(layer.in_features) // layer.size if layer.index is None else layer.index
    return ((layer.code.double() - layer.zero.double()[index]) * layer.scale.double()[index]).t()


LAYERS = {  # what the path is with compiled kernels, and without
    "4 bits": (PlainLinear(bits=4, inputs=256, outputs=128, size=64), "words", "int4pack"),
    "4 bits, symmetric, no bias": (
        PlainLinear(bits=4, inputs=128, outputs=64, size=32, sym=True, bias=False),
        "words",
        "int4pack",
    ),
    "4 bits, a tail of outputs": (PlainLinear(bits=4, inputs=128, outputs=64 + 48, size=128), "words", "int4pack"),
    "4 bits, fewer outputs than a block": (PlainLinear(bits=4, inputs=64, outputs=16, size=64), "words", "int4pack"),
    "4 bits, one large group": (PlainLinear(bits=4, inputs=768, outputs=64, size=768), "words", "int4pack"),
    "4 bits, groups of 96": (PlainLinear(bits=4, inputs=192, outputs=64, size=96), "words", "int4pack"),
    "4 bits, any order": (PlainLinear(bits=4, inputs=256, outputs=192, size=64, ordered=False), "words", "int4pack"),
    "4 bits, scales in bfloat16": (
        PlainLinear(bits=4, inputs=128, outputs=64, size=64, scale_dtype=torch.bfloat16),
        "words",
        "int4pack",
    ),
    "3 bits": (PlainLinear(bits=3, inputs=128, outputs=64, size=64), "words", "int4pack"),
    "2 bits": (PlainLinear(bits=2, inputs=128, outputs=64, size=64, ordered=False), "words", "int4pack"),
    "4 bits, many outputs": (PlainLinear(bits=4, inputs=2048, outputs=320, size=128), "words", "int4pack"),
    "4 bits, small groups": (PlainLinear(bits=4, inputs=64, outputs=64, size=16), "words", "columns"),
    "4 bits, odd outputs": (PlainLinear(bits=4, inputs=64, outputs=17, size=64), "words", "columns"),
    "8 bits": (PlainLinear(bits=8, inputs=96, outputs=40, size=96, sym=True), "words", "int8pack"),
    "8 bits, many outputs": (PlainLinear(bits=8, inputs=2048, outputs=320, size=2048, sym=True), "words", "int8pack"),
    "8 bits, any order": (
        PlainLinear(bits=8, inputs=64, outputs=8, size=64, sym=True, ordered=False),
        "words",
        "int8pack",
    ),
    "8 bits, inputs that the kernel can't read": (
        PlainLinear(bits=8, inputs=24, outputs=40, size=24, sym=True),
        "words",
        "columns",
    ),
    "8 bits, odd inputs": (PlainLinear(bits=8, inputs=97, outputs=41, size=97, sym=True), "columns", "columns"),
    "8 bits, odd outputs": (PlainLinear(bits=8, inputs=48, outputs=7, size=48, sym=True), "words", "int8pack"),
    "8 bits, asymmetric": (PlainLinear(bits=8, inputs=64, outputs=64, size=64), "words", "columns"),
    "2 bits, inputs that don't fill words": (PlainLinear(bits=2, inputs=72, outputs=80, size=72), "columns", "columns"),
    "2 bits, small groups that don't fill words": (
        PlainLinear(bits=2, inputs=64, outputs=64, size=8),
        "columns",
        "columns",
    ),
    "8 bits, groups": (PlainLinear(bits=8, inputs=128, outputs=64, size=64, ordered=False), "words", "columns"),
}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())
