"""Multiplying few rows of activations with weights that are read as they are stored, and decoded on the way.

Decoding a weight first moves 5 bytes for each of its elements: a byte is read, and two are written and read again. A
kernel that decodes in registers moves one, which for few rows is all there is to do. On CPU it is one of
quantdock-kernels, which rounds no weight; elsewhere one of ours in Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantdock import linears, ops
from quantdock_fp8 import launching
from quantdock_fp8.multiplying import Product, multiply
from quantdock_fp8.tiling import Block

CPU_ROWS = 32
"""Of activations, up to which a product takes this way on CPU, where each row takes as long again. Measured with two
threads on weights of 576 x 576 to 4096 x 11008, in each dtype: decoding is as fast at 32 to 64 rows."""

ROWS = 64
"""The same on other devices. They fit one tile; with more of them, each further tile would read and decode the weight
once again. Worked out, not measured."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_COLUMNS = {torch.float32: 32}
"""Of a chunk, at most: without tensor cores, products are unrolled."""
_OUTPUTS = 64
"""Of a tile."""


def path(device: torch.device, dtype: torch.dtype) -> str | None:
    """What this way is called for activations of ``dtype`` on ``device``: ``compiled`` on CPU, ``triton`` on others;
    ``None`` if there is none."""
    if device.type == "cpu":
        return "compiled" if dtype in DTYPES and ops.has_fast_products() else None
    return "triton" if works_on(device, dtype) else None


def product(x: Tensor) -> Product | None:
    """What multiplies ``x`` this way, if its rows are few and there is something."""
    rows, most = x.numel() // max(1, x.shape[-1]), CPU_ROWS if x.device.type == "cpu" else ROWS
    if not 0 < rows <= most:
        return None
    found = path(x.device, x.dtype)
    return None if found is None else multiply_compiled if found == "compiled" else multiply_few


def multiply_compiled(x: Tensor, weight: Tensor, scales: Tensor, block: Block, bias: Tensor | None) -> Tensor:
    """``nn.functional.linear`` on CPU, with codes times scales in float32 as the weight: a ``Product``.

    Args:
        x, weight, scales, block, bias: as of ``multiply_few``.
    """
    rows = x.reshape(-1, x.shape[-1])
    summed = torch.float32 if bias is not None else x.dtype
    result = ops.multiply_fp8(rows, codes=weight, scales=scales, block=block, dtype=summed)
    if bias is not None:
        result = result.add_(bias).to(x.dtype)
    return result.view(*x.shape[:-1], len(weight))


def works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel multiplies activations of ``dtype`` on ``device``."""
    if device.type != "cuda" or dtype not in DTYPES or not launching.installed():
        return False
    name = f"8-bit floats times {str(dtype).removeprefix('torch.')} in Triton"
    return linears.trusted(name, device, lambda there: _trial(there, dtype))


def multiply_few(x: Tensor, weight: Tensor, scales: Tensor, block: Block, bias: Tensor | None) -> Tensor:
    """``nn.functional.linear`` with the weight that ``codes.decode`` gives in the dtype of ``x``: a ``Product``.

    Args:
        x: ``[..., columns]`` in one of ``DTYPES``, with at least one row; on a CUDA device, or on CPU in Triton's
            interpreter.
        weight: float8_e4m3fn ``[rows, columns]``.
        scales: float32 ``[blocks down, blocks across]``.
        block: rows and columns that share a scale.
        bias: ``[rows]``.
    """
    from quantdock_fp8 import kernels

    outputs, inputs = weight.shape
    own, device = x.reshape(-1, inputs).contiguous(), x.device
    rows, chunks = len(own), launching.Chunks.of(inputs, block, _COLUMNS.get(x.dtype, launching.LARGEST))
    tall = max(16, min(ROWS, launching.power_of_two(rows)))
    down, across = -(-outputs // _OUTPUTS), -(-rows // tall)
    each = chunks.each(down * across, rows, inputs, device)
    splits = -(-chunks.count // each)
    parts = launching.room(splits, rows, outputs, own, x.dtype)
    group = min(block[1], inputs)
    with launching.on(device):
        kernels.multiply_decoded[down, splits, across](
            own,
            weight.contiguous().view(torch.uint8),
            scales.contiguous(),
            parts,
            rows,
            inputs,
            outputs,
            min(block[0], outputs),
            group,
            scales.shape[1],
            chunks.per_group,
            chunks.count,
            each,
            HARDWARE=launching.has_instructions(device),
            WIDE=device.type == "cpu",
            EVEN=group % chunks.size == 0 and inputs % chunks.size == 0,
            BM=tall,
            BN=_OUTPUTS,
            BK=chunks.size,
            num_warps=4,
            num_stages=3,
        )
    result = launching.summed(parts, x.dtype)
    if bias is not None:
        result = result + bias
    return result.view(*x.shape[:-1], outputs)


def _trial(device: torch.device, dtype: torch.dtype) -> bool:
    """Every code, with blocks that fill chunks and with others."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.arange(72 * 256) % 254
    weight = (numbers % 127 + numbers // 127 * 128).to(torch.uint8).view(torch.float8_e4m3fn).view(72, 256)
    for block in ((72, 256), (16, 40)):
        scales = torch.rand(-(-72 // block[0]), -(-256 // block[1]), generator=generator) + 0.5
        for rows in (1, 40):
            x = torch.randn(rows, 256, generator=generator).to(dtype)
            expected = multiply(x, weight, scales, block, None)
            found = multiply_few(x.to(device), weight.to(device), scales.to(device), block, None).cpu()
            if not bool((found - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()):
                return False
    return True
