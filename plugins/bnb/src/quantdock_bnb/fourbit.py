"""4-bit quantization as pure tensor functions, with the bits that bitsandbytes itself gives.

On CPU, bitsandbytes finds each code by a binary search per element; ``quantdock.ops`` has faster ways to the same
codes. Whether they are the same with the installed bitsandbytes is asked once per process, and where they aren't, its
own operators do the work.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from quantdock import caller_threads, ops

NESTED_BLOCKSIZE = 256
"""Block size of the scales' own quantization; bitsandbytes' kernels know no other."""

WORKING_BYTES = ops.WORKING_BYTES_4BIT
"""Upper bound of the temporaries of ``quantize_into``, on any device."""

NESTED_WORKING_BYTES = ops.WORKING_BYTES_8BIT + (64 << 10)
"""Upper bound of the temporaries of ``state_of`` with nested scales, 8 bytes per scale apart. Most of it is what
bitsandbytes is asked for in the first call of a process."""

_PIECE = 3584
"""Elements that bitsandbytes' own operator gets at a time: so few that torch searches in the calling thread."""

_DEVICE_PIECE = 1 << 20
"""The same where a launch must not be too small; a multiple of every block size."""


def quantize_into(flat: Tensor, packed: Tensor, absmax: Tensor, *, quant_type: str, blocksize: int) -> None:
    """Quantize some blocks of a tensor as ``bitsandbytes.functional.quantize_4bit`` does, bit for bit.

    They don't depend on one another, so a result may be filled in any order.

    Args:
        flat: ``[count]`` 16- or 32-bit floats; whole blocks, unless they are the tensor's last ones; not changed.
        packed: contiguous ``uint8 [ceil(count / 2)]``, written.
        absmax: contiguous ``float32 [ceil(count / blocksize)]``, written.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: elements that share a scale.
    """
    code = code_of(quant_type) if flat.device.type == "cpu" else None
    if code is None:
        piece = _PIECE if flat.device.type == "cpu" else _DEVICE_PIECE
        _by_bitsandbytes(flat, blocksize, quant_type, packed, absmax, piece)
    else:
        ops.quantize_blockwise_4bit(
            flat, bounds=code.bounds, codes=code.codes, blocksize=blocksize, packed=packed, absmax=absmax
        )


def state_of(
    absmax: Tensor, *, shape: torch.Size, dtype: torch.dtype, blocksize: int, quant_type: str, nested: bool
) -> QuantState:
    """The state of a tensor all of whose blocks have been quantized.

    Args:
        absmax: ``float32``, one scale per block; kept, or quantized if they are to be ``nested``.
        shape: the tensor's.
        dtype: the tensor's.
        blocksize: elements that share a scale.
        quant_type: ``"nf4"`` or ``"fp4"``.
        nested: quantize the scales too.
    """
    state = QuantState(
        absmax=absmax,
        shape=shape,
        dtype=dtype,
        blocksize=blocksize,
        code=bnb.functional.get_4bit_type(quant_type, device=absmax.device),
        quant_type=quant_type,
    )
    if nested:
        _nest(state)
    return state


def _nest(state: QuantState) -> None:
    """Quantize the scales of ``state``, step by step as bitsandbytes does it."""
    # On the whole vector at once: how torch adds up a mean depends on its length and on the threads.
    with caller_threads():
        state.offset = state.absmax.mean()
    state.absmax, state.state2 = quantize_scales(state.absmax - state.offset)
    state.nested = True


def quantize_scales(scales: Tensor) -> tuple[Tensor, QuantState]:
    """What ``bitsandbytes.functional.quantize_blockwise`` makes of ``float32 [count]``."""
    scale_map = scale_map_of() if scales.device.type == "cpu" else None
    if scale_map is None:
        return bnb.functional.quantize_blockwise(scales, blocksize=NESTED_BLOCKSIZE)  # type: ignore[no-any-return]
    codes = torch.empty(scales.shape, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-len(scales) // NESTED_BLOCKSIZE), dtype=torch.float32, device="cpu")
    ops.quantize_blockwise_8bit(scales, table=scale_map.table, blocksize=NESTED_BLOCKSIZE, codes=codes, absmax=absmax)
    return codes, QuantState(
        absmax=absmax, code=scale_map.values.clone(), blocksize=NESTED_BLOCKSIZE, dtype=scales.dtype
    )


def to_components(leaf: str, data: Tensor, state: QuantState) -> dict[str, Tensor]:
    """The stored tensors of one parameter, in the order that bitsandbytes' state dict has them."""
    parts: Mapping[str, Tensor] = state.as_dict(packed=True)
    return {leaf: data} | {f"{leaf}.{name}": part for name, part in parts.items()}


def dequantize(data: Tensor, state: QuantState) -> Tensor:
    """What ``bitsandbytes.functional.dequantize_4bit`` gives: ``state.shape`` in ``state.dtype``."""
    return bnb.functional.dequantize_4bit(data, state)  # type: ignore[no-any-return]


def _by_bitsandbytes(flat: Tensor, blocksize: int, quant_type: str, packed: Tensor, absmax: Tensor, piece: int) -> None:
    """Run bitsandbytes' own operator piece by piece."""
    piece = max(blocksize, piece // blocksize * blocksize)
    for start in range(0, flat.numel(), piece):
        part = flat[start : start + piece]
        codes, scales = torch.ops.bitsandbytes.quantize_4bit(part, blocksize, quant_type, torch.uint8)
        packed[start // 2 : start // 2 + codes.numel()] = codes.view(-1)
        absmax[start // blocksize : start // blocksize + scales.numel()] = scales


# What bitsandbytes is asked for, once per process ---------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """A 4-bit code, as ``ops.quantize_blockwise_4bit`` takes it."""

    bounds: Tensor
    """``float32 [15]``: where one code ends and the next begins."""
    codes: Tensor
    """``uint8 [16]``: the codes in the order of their values."""


@dataclass(frozen=True)
class ScaleMap:
    """The 8-bit map of nested scales, as ``ops.quantize_blockwise_8bit`` takes it."""

    values: Tensor
    """``float32 [256]``: what each code stands for."""
    table: Tensor
    """``uint8 [65536]``: the codes of evenly spaced values from -1 to 1."""


@functools.cache
def code_of(quant_type: str) -> Code | None:
    """A code, or ``None`` if the installed bitsandbytes disagrees with it.

    It is asked at every bound and right beside it, and then trusted.
    """
    levels = bnb.functional.get_4bit_type(quant_type, device="cpu").sort().values
    bounds = (levels[:-1] + levels[1:]) / 2
    edges = torch.cat([levels[:1], bounds, levels[-1:]])
    code = Code(bounds, _ask((edges[:-1] + edges[1:]) / 2, quant_type))
    return code if _agrees(code, quant_type) else None


def _ask(values: Tensor, quant_type: str) -> Tensor:
    """The codes that bitsandbytes gives to up to 31 values from [-1, 1]."""
    block = values.new_zeros(32)
    block[: len(values)] = values
    block[-1] = 1.0
    packed, _ = torch.ops.bitsandbytes.quantize_4bit(block, 32, quant_type, torch.uint8)
    return torch.stack([packed >> 4, packed & 15], -1).view(-1)[: len(values)].clone()


def _agrees(code: Code, quant_type: str) -> bool:
    one = torch.ones_like(code.bounds[:1])
    near = [code.bounds, code.bounds.nextafter(one), code.bounds.nextafter(-one), one.expand(19)]
    random = _random(4096)
    sample = torch.cat([*near, random * 0.02, random.to(torch.bfloat16).float(), random.new_zeros(64), random[:7]])
    packed = torch.empty((sample.numel() + 1) // 2, dtype=torch.uint8, device="cpu")
    absmax = random.new_empty(-(-sample.numel() // 64))
    ops.quantize_blockwise_4bit(
        sample, bounds=code.bounds, codes=code.codes, blocksize=64, packed=packed, absmax=absmax
    )
    expected, scales = torch.ops.bitsandbytes.quantize_4bit(sample, 64, quant_type, torch.uint8)
    return torch.equal(packed, expected.view(-1)) and torch.equal(absmax, scales)


@functools.cache
def scale_map_of() -> ScaleMap | None:
    """The map of nested scales, or ``None`` if the installed bitsandbytes doesn't look codes up in that way."""
    table = torch.empty(1 << 16, dtype=torch.uint8, device="cpu")
    for start in range(0, len(table), 1023):
        part = table[start : start + 1023]
        cells = torch.arange(start, start + len(part), dtype=torch.float64, device="cpu")
        values = torch.nn.functional.pad(cells.div_(32767.5).sub_(1).float(), (0, 1), value=1.0)
        part.copy_(bnb.functional.quantize_blockwise(values, blocksize=1024)[0][:-1])
    random = _random(2048)
    sample = torch.cat([random, random * 1e-3, random.new_zeros(256), random[:77]])
    codes, absmax = torch.empty_like(sample, dtype=torch.uint8), random.new_empty(-(-len(sample) // NESTED_BLOCKSIZE))
    ops.quantize_blockwise_8bit(sample, table=table, blocksize=NESTED_BLOCKSIZE, codes=codes, absmax=absmax)
    expected, state = bnb.functional.quantize_blockwise(sample, blocksize=NESTED_BLOCKSIZE)
    agrees = torch.equal(codes, expected) and torch.equal(absmax, state.absmax)
    return ScaleMap(state.code, table) if agrees else None


def _random(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
