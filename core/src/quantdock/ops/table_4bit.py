"""4-bit codes by a lookup table: torch's fastest way to search among 15 bounds on CPU.

Cell ``i`` of the table holds the code of everything that falls between two points of a fine grid, and only the few
cells that a bound runs through need a comparison. The map from values to cells never decreases, so a value in any other
cell is on the same side of every bound as its whole cell is: the codes are equal to those of a search, not close.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantdock.ops import search_4bit
from quantdock.ops.chunks import LARGE_CHUNK, chunk

_CELLS = 16384
_AMBIGUOUS = -128
_AMBIGUOUS_IN_EIGHT = -0x7F7F7F7F7F7F7F80  # the sign bits of eight codes at once
_FLUSH = 2048

WORKING_BYTES = 32 * LARGE_CHUNK + 256 * _FLUSH
"""Upper bound of the temporaries."""


@dataclass(frozen=True)
class Table:
    """How normalised values become codes."""

    cells: Tensor
    """``int8 [_CELLS + 1]``: the code of each cell, or ``_AMBIGUOUS`` where a bound runs through it."""
    ranks: Tensor
    """``int32 [_CELLS + 1]``: how many bounds are in the cells before."""
    bounds: Tensor
    """``float32 [16]``: a value above ``i`` of them has rank ``i``; infinity closes the list."""
    codes: Tensor
    """``int8 [16]``: rank to code."""

    def search(self, values: Tensor) -> Tensor:
        """The codes of any values; no cell has two bounds, so one comparison is left to do."""
        ranks = self.ranks.index_select(0, _cells(values))
        ranks += values > self.bounds.index_select(0, ranks)
        return self.codes.index_select(0, ranks)


@functools.lru_cache(maxsize=16)
def table_of(bounds: tuple[float, ...], codes: tuple[int, ...]) -> Table | None:
    """The table of a code, or ``None`` if two of its bounds are so close that they share a cell."""
    # Dtypes and devices are spelled out: torch's defaults are the user's to change.
    limits = torch.tensor(bounds, dtype=torch.float32, device="cpu")
    values = torch.tensor(codes, dtype=torch.int8, device="cpu")
    crossed = _cells(limits)
    every = torch.arange(_CELLS + 1, dtype=torch.int32, device="cpu")
    ranks = torch.bucketize(every, crossed, out_int32=True)
    cells = values.index_select(0, ranks)
    if crossed.diff().min() <= 0 or crossed[0] < 0 or crossed[-1] > _CELLS:
        return None
    cells[crossed.long()] = _AMBIGUOUS
    return Table(cells, ranks, torch.nn.functional.pad(limits, (0, 1), value=math.inf), values)


def _cells(values: Tensor) -> Tensor:
    # A power of two as the factor keeps this to one rounding, so it never decreases.
    return values.mul(_CELLS / 2).add_(_CELLS / 2).to(torch.int32)


def quantize(
    flat: Tensor, table: Table, bounds: Tensor, codes: Tensor, blocksize: int, packed: Tensor, absmax: Tensor
) -> None:
    """As ``search_4bit.quantize``, which takes over where a scale isn't finite."""
    whole = flat.numel()
    step = chunk(math.lcm(blocksize, 8))
    scratch = _Scratch(min(step, whole), blocksize)
    pending: list[Tensor] = []
    for start in range(0, whole, step):
        end = min(start + step, whole)
        if end - start < scratch.size:
            scratch = _Scratch(end - start, blocksize)
        part, out = flat[start:end], packed[start // 2 : end // 2]
        scales = absmax[start // blocksize : end // blocksize]
        unsure = scratch.codes_of(part, table, scales)
        if unsure is None:
            search_4bit.quantize(part, bounds, codes, blocksize, out, scales)
            continue
        out.copy_(scratch.packed())
        pending.append(unsure.add_(start // 8))
        if sum(map(len, pending)) > _FLUSH:
            _resolve(pending, flat, absmax, blocksize, table, packed)
            pending = []
    _resolve(pending, flat, absmax, blocksize, table, packed)


class _Scratch:
    """Room for one chunk and its views, made once: with chunks this small, every call counts."""

    def __init__(self, size: int, blocksize: int) -> None:
        self.size = size
        self._values, self._positions = torch.empty(2, size, dtype=torch.float32, device="cpu")
        self._cells = torch.empty(size, dtype=torch.int32, device="cpu")
        self._codes = torch.empty(size, dtype=torch.int8, device="cpu")
        self._blocks = self._values.view(-1, blocksize)
        self._absolute = self._positions.view(-1, blocksize)
        self._factors = torch.empty(size // blocksize, 1, dtype=torch.float32, device="cpu")
        self._half = torch.tensor(_CELLS / 2, dtype=torch.float32, device="cpu")
        self._eights = self._codes.view(torch.int64)
        self._marks = torch.empty_like(self._eights)
        self._signs = torch.tensor(_AMBIGUOUS_IN_EIGHT, device="cpu")
        self._pairs = self._codes.view(torch.int16)
        self._high_bytes = self._codes.view(torch.uint8)[1::2]

    def codes_of(self, part: Tensor, table: Table, scales: Tensor) -> Tensor | None:
        """Find scales and codes of a chunk.

        Returns:
            The positions, in eights, of codes that are yet to be searched; ``None`` when a scale isn't finite.
        """
        self._values.copy_(part)
        torch.abs(self._values, out=self._positions)
        torch.amax(self._absolute, -1, out=scales)
        if not math.isfinite(scales.amax().item()):
            return None
        torch.clamp(scales.unsqueeze(1), min=search_4bit.SMALLEST_SCALE, out=self._factors).reciprocal_()
        self._blocks.mul_(self._factors)
        torch.add(self._half, self._values, alpha=_CELLS / 2, out=self._positions)
        self._cells.copy_(self._positions)  # as in _cells()
        torch.index_select(table.cells, 0, self._cells, out=self._codes)
        return torch.bitwise_and(self._eights, self._signs, out=self._marks).nonzero().view(-1)

    def packed(self) -> Tensor:
        """Two codes to a byte, the first one in the high half; a view that spoils the codes."""
        # A pair read as one little-endian number is first + 256 * second; its product with 4097 has 16 * first + second
        # as the high byte.
        self._pairs.mul_(4097)
        return self._high_bytes


def _resolve(pending: list[Tensor], flat: Tensor, absmax: Tensor, blocksize: int, table: Table, packed: Tensor) -> None:
    """Search the codes of the elements that the table couldn't tell, eight neighbours (four bytes) at a time."""
    whole = flat.numel() // 8 * 8
    for eights in torch.cat(pending).split(_FLUSH) if pending else ():  # type: ignore[no-untyped-call]
        scales = absmax.index_select(0, eights.mul(8).div_(blocksize, rounding_mode="floor"))
        factors = scales.clamp_(min=search_4bit.SMALLEST_SCALE).reciprocal_().unsqueeze(1)
        values = flat[:whole].view(-1, 8).index_select(0, eights).float().mul_(factors)
        codes = table.search(values.view(-1)).view(torch.uint8)
        packed[: whole // 2].view(-1, 4).index_copy_(0, eights, (codes[::2] << 4 | codes[1::2]).view(-1, 4))
