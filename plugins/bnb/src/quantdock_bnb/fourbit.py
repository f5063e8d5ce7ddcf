"""4-bit quantization as pure tensor functions, with the bits that bitsandbytes itself gives.

On CPU, bitsandbytes finds each code by a binary search per element. Here a lookup table finds it: cell ``i`` of the
table holds the code of everything that falls between two points of a fine grid, and only the few cells that a decision
bound runs through need the search. The map from values to cells never decreases, so a value in any other cell is on
the same side of every bound as its whole cell is: the codes are equal, not close.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from quantdock import caller_threads
from quantdock_bnb.chunks import CHUNK, LARGE_CHUNK, chunk

NESTED_BLOCKSIZE = 256
"""Block size of the scales' own quantization; bitsandbytes' kernels know no other."""

_CELLS = 16384
_AMBIGUOUS = -128
_AMBIGUOUS_IN_EIGHT = -0x7F7F7F7F7F7F7F80  # the sign bits of eight codes at once
_FLUSH = 2048

WORKING_BYTES = 32 * LARGE_CHUNK + 256 * _FLUSH
"""Upper bound of the temporaries of ``quantize``, those for nested scales apart."""


def quantize(
    tensor: Tensor, *, quant_type: str, blocksize: int, nested: bool, quant_storage: torch.dtype
) -> tuple[Tensor, QuantState]:
    """Quantize as ``bitsandbytes.functional.quantize_4bit`` does, bit for bit.

    Args:
        tensor: contiguous, of 16- or 32-bit floats, any shape; not changed.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: elements that share a scale.
        nested: quantize the scales too ("double quantization").
        quant_storage: dtype that the packed codes are viewed as.

    Returns:
        The packed codes, ``[ceil(elements / 2) / itemsize, 1]``, and the state that undoes the quantization.
    """
    if tensor.device.type != "cpu":
        return bnb.functional.quantize_4bit(  # type: ignore[no-any-return]
            tensor,
            blocksize=blocksize,
            compress_statistics=nested,
            quant_type=quant_type,
            quant_storage=quant_storage,
        )
    packed, absmax = _codes_and_scales(tensor.reshape(-1), blocksize, quant_type)
    state = QuantState(
        absmax=absmax,
        shape=tensor.shape,
        dtype=tensor.dtype,
        blocksize=blocksize,
        code=bnb.functional.get_4bit_type(quant_type, device="cpu"),
        quant_type=quant_type,
    )
    if nested:
        _nest(state)
    return packed.view(quant_storage).unsqueeze(1), state


def _codes_and_scales(flat: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device="cpu")
    table = code_table(quant_type)
    if table is None:
        _by_bitsandbytes(flat, blocksize, quant_type, packed, absmax)
    else:
        _by_table(flat, blocksize, quant_type, table, packed, absmax)
    return packed, absmax


def _nest(state: QuantState) -> None:
    """Quantize the scales of ``state``, step by step as bitsandbytes does it."""
    # On the whole vector at once: how torch adds up a mean depends on its length and on the threads.
    with caller_threads():
        state.offset = state.absmax.mean()
    state.absmax, state.state2 = bnb.functional.quantize_blockwise(
        state.absmax - state.offset, blocksize=NESTED_BLOCKSIZE
    )
    state.nested = True


def to_components(leaf: str, data: Tensor, state: QuantState) -> dict[str, Tensor]:
    """The stored tensors of one parameter, in the order that bitsandbytes' state dict has them."""
    parts: Mapping[str, Tensor] = state.as_dict(packed=True)
    return {leaf: data} | {f"{leaf}.{name}": part for name, part in parts.items()}


def dequantize(data: Tensor, state: QuantState) -> Tensor:
    """What ``bitsandbytes.functional.dequantize_4bit`` gives: ``state.shape`` in ``state.dtype``."""
    return bnb.functional.dequantize_4bit(data, state)  # type: ignore[no-any-return]


# The quantization on CPU ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodeTable:
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


def _cells(values: Tensor) -> Tensor:
    # A power of two as the factor keeps this to one rounding, so it never decreases.
    return values.mul(_CELLS / 2).add_(_CELLS / 2).to(torch.int32)


def _by_bitsandbytes(flat: Tensor, blocksize: int, quant_type: str, packed: Tensor, absmax: Tensor) -> None:
    """Run bitsandbytes' own operator piece by piece; blocks don't depend on each other."""
    piece = max(blocksize, CHUNK // 8 // blocksize * blocksize)
    for start in range(0, flat.numel(), piece):
        part = flat[start : start + piece]
        codes, scales = torch.ops.bitsandbytes.quantize_4bit(part, blocksize, quant_type, torch.uint8)
        packed[start // 2 : start // 2 + codes.numel()] = codes.view(-1)
        absmax[start // blocksize : start // blocksize + scales.numel()] = scales


def _by_table(flat: Tensor, blocksize: int, quant_type: str, table: CodeTable, packed: Tensor, absmax: Tensor) -> None:
    whole = flat.numel() // blocksize * blocksize
    step = chunk()
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
            _by_bitsandbytes(part, blocksize, quant_type, out, scales)
            continue
        out.copy_(scratch.packed())
        pending.append(unsure.add_(start // 8))
        if sum(map(len, pending)) > _FLUSH:
            _resolve(pending, flat, absmax, blocksize, table, packed)
            pending = []
    _resolve(pending, flat, absmax, blocksize, table, packed)
    if whole < flat.numel():  # bitsandbytes divides by the scale here instead of multiplying with its reciprocal
        _by_bitsandbytes(flat[whole:], blocksize, quant_type, packed[whole // 2 :], absmax[whole // blocksize :])


class _Scratch:
    """Room for one chunk and its views, made once: with chunks this small, every call counts."""

    def __init__(self, size: int, blocksize: int) -> None:
        self.size = size
        # Dtypes and devices are spelled out: torch's defaults are the user's to change.
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

    def codes_of(self, part: Tensor, table: CodeTable, scales: Tensor) -> Tensor | None:
        """Find scales and codes of a chunk.

        Returns:
            The positions, in eights, of codes that are yet to be searched; ``None`` when a scale isn't finite.
        """
        self._values.copy_(part)
        torch.abs(self._values, out=self._positions)
        torch.amax(self._absolute, -1, out=scales)
        if not math.isfinite(scales.amax().item()):
            return None
        torch.clamp(scales.unsqueeze(1), min=1e-38, out=self._factors).reciprocal_()
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


def _resolve(
    pending: list[Tensor], flat: Tensor, absmax: Tensor, blocksize: int, table: CodeTable, packed: Tensor
) -> None:
    """Search the codes of the elements that the table couldn't tell, eight neighbours (four bytes) at a time."""
    whole = flat.numel() // 8 * 8
    for eights in torch.cat(pending).split(_FLUSH) if pending else ():  # type: ignore[no-untyped-call]
        scales = absmax.index_select(0, eights.mul(8).div_(blocksize, rounding_mode="floor"))
        factors = scales.clamp_(min=1e-38).reciprocal_().unsqueeze(1)
        values = flat[:whole].view(-1, 8).index_select(0, eights).float().mul_(factors)
        codes = table.search(values.view(-1)).view(torch.uint8)
        packed[: whole // 2].view(-1, 4).index_copy_(0, eights, (codes[::2] << 4 | codes[1::2]).view(-1, 4))


# The table ------------------------------------------------------------------------------------------------------------


@functools.cache
def code_table(quant_type: str) -> CodeTable | None:
    """The table of a code, or ``None`` if the installed bitsandbytes disagrees with it.

    It is asked once per process, at every bound and right beside it, and then trusted.
    """
    levels = bnb.functional.get_4bit_type(quant_type, device="cpu").sort().values
    bounds = (levels[:-1] + levels[1:]) / 2
    edges = torch.cat([levels[:1], bounds, levels[-1:]])
    codes = _ask((edges[:-1] + edges[1:]) / 2, quant_type)
    crossed = _cells(bounds)
    every = torch.arange(_CELLS + 1, dtype=torch.int32, device="cpu")
    ranks = torch.bucketize(every, crossed, out_int32=True)
    cells = codes.index_select(0, ranks)
    cells[crossed.long()] = _AMBIGUOUS
    table = CodeTable(
        cells=cells, ranks=ranks, bounds=torch.nn.functional.pad(bounds, (0, 1), value=math.inf), codes=codes
    )
    return table if crossed.diff().min() > 0 and _agrees(table, quant_type) else None


def _ask(values: Tensor, quant_type: str) -> Tensor:
    """The codes that bitsandbytes gives to up to 31 values from [-1, 1]."""
    block = values.new_zeros(32)
    block[: len(values)] = values
    block[-1] = 1.0
    packed, _ = torch.ops.bitsandbytes.quantize_4bit(block, 32, quant_type, torch.uint8)
    return torch.stack([packed >> 4, packed & 15], -1).view(-1)[: len(values)].to(torch.int8)


def _agrees(table: CodeTable, quant_type: str) -> bool:
    bounds = table.bounds[:-1]
    one = torch.ones_like(bounds[:1])
    near = [bounds, bounds.nextafter(one), bounds.nextafter(-one), one.expand(19)]
    random = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    sample = torch.cat([*near, random * 0.02, random.to(torch.bfloat16).float(), bounds.new_zeros(64), random[:7]])
    packed = torch.empty((sample.numel() + 1) // 2, dtype=torch.uint8, device="cpu")
    absmax = bounds.new_empty(-(-sample.numel() // 64))
    _by_table(sample, 64, quant_type, table, packed, absmax)
    expected, scales = torch.ops.bitsandbytes.quantize_4bit(sample, 64, quant_type, torch.uint8)
    return torch.equal(packed, expected.view(-1)) and torch.equal(absmax, scales)
