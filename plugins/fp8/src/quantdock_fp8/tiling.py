"""Which elements of a matrix share a scale, and scales as they are multiplied with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantdock import ops

Block = tuple[int, int]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tiling:
    """Which elements of a matrix share a scale."""

    block: Block
    """Rows and columns; blocks at the edges may be smaller."""
    parts: int = 1
    """Ranges of rows of the same size, each of which begins with a block of its own."""

    def grid(self, shape: Shape) -> Block:
        """How many blocks a matrix has down and across."""
        down, across = grid((shape[0] // self.parts, shape[1]), self.block)
        return self.parts * down, across

    def ranges(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """The parts of a matrix: their rows, and the rows of scales that belong to them."""
        each = rows // self.parts
        down = -(-each // self.block[0])
        for part in range(self.parts):
            yield slice(part * each, (part + 1) * each), slice(part * down, (part + 1) * down)


def grid(shape: Shape, block: Block) -> Block:
    """How many blocks a matrix has down and across; those at the edges may be smaller."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def as_grid(scale: Tensor, down: int, across: int) -> Tensor:
    """A stored scale as ``float32 [blocks down, blocks across]``.

    One byte is an exponent (``2 ** (byte - 127)``, 255 is NaN), whether its dtype says so or not: OCP Microscaling
    Formats 1.0, section 5.4.1.
    """
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    if scale.dtype == torch.float8_e4m3fn:  # which torch itself converts slowly
        codes = scale.reshape(down, across)
        single = torch.empty(down, across, device=scale.device)
        ops.decode_fp8(codes, scales=single.new_ones(1, 1), block=(down, across), out=single)
        return single
    return scale.to(torch.float32).reshape(down, across)
