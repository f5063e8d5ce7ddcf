"""The products of codes with codes, each with a scale; ``eight_bits`` says which one is taken."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantdock_fp8 import launching
from quantdock_fp8.activations import Activations, defined
from quantdock_fp8.tiling import Block, Shape

Multiplication = Callable[[Tensor, Tensor, Tensor, Tensor, Block, torch.dtype], Tensor]
"""Of what the four of them take; ``multiply_in_triton`` says what that is."""

_FEW, _MANY = (16, 64), (64, 128)
"""Rows and outputs of a tile, for up to 16 rows and for more; worked out, not measured."""


def multiply_tensors(
    own: Tensor, own_scales: Tensor, weight: Tensor, scales: Tensor, block: Block, dtype: torch.dtype
) -> Tensor:
    """See ``multiply_in_triton``; one scale on each side."""
    return torch._scaled_mm(
        own, weight.t(), scale_a=own_scales.reshape(()), scale_b=scales.reshape(()), out_dtype=dtype
    )


def multiply_rows(
    own: Tensor, own_scales: Tensor, weight: Tensor, scales: Tensor, block: Block, dtype: torch.dtype
) -> Tensor:
    """See ``multiply_in_triton``; a scale for each row on both sides, or one for all of them."""
    left = own_scales.expand(len(own), 1).contiguous()
    right = scales.reshape(1, -1).expand(1, len(weight)).contiguous()
    return torch._scaled_mm(own, weight.t(), scale_a=left, scale_b=right, out_dtype=dtype)


def multiply_blocks(
    own: Tensor, own_scales: Tensor, weight: Tensor, scales: Tensor, block: Block, dtype: torch.dtype
) -> Tensor:
    """See ``multiply_in_triton``; blocks of 128 x 128, and groups of 128 columns.

    cuBLAS wants rows in multiples of 4, scales of activations with those of a group side by side, and scales of the
    weight with those of its rows side by side, in multiples of 4.
    """
    rows, more = len(own), -len(own) % 4
    if more:
        own = nn.functional.pad(own.view(torch.uint8), (0, 0, 0, more)).view(own.dtype)
        own_scales = nn.functional.pad(own_scales, (0, 0, 0, more))
    found = nn.functional.scaled_mm(
        own,
        weight.t(),
        own_scales.t().contiguous().t(),
        nn.functional.ScalingType.BlockWise1x128,
        nn.functional.pad(scales, (0, -scales.shape[1] % 4)).t(),
        nn.functional.ScalingType.BlockWise128x128,
        output_dtype=dtype if dtype == torch.bfloat16 else torch.float32,
    )
    return found.narrow(0, 0, rows).to(dtype)


def multiply_in_triton(
    own: Tensor, own_scales: Tensor, weight: Tensor, scales: Tensor, block: Block, dtype: torch.dtype
) -> Tensor:
    """The product of activations with a weight, both of them codes with scales.

    Args:
        own: of activations, float8_e4m3fn ``[rows, columns]``, at least one row; on CPU for Triton's interpreter.
        own_scales: float32 ``[rows, groups]`` or ``[1, 1]``, see ``Activations.quantize``.
        weight: float8_e4m3fn ``[weight rows, columns]``.
        scales: float32 ``[blocks down, blocks across]``.
        block: rows and columns of the weight that share a scale.
        dtype: of the result, rounded once to it; ``[rows, weight rows]``.
    """
    from quantdock_fp8 import kernels

    outputs, inputs = weight.shape
    rows, device, chunks = len(own), own.device, launching.Chunks.of(inputs, block)
    tall, wide = _FEW if rows <= _FEW[0] else _MANY
    down, across = -(-outputs // wide), -(-rows // tall)
    each = chunks.each(down * across, rows, inputs, device)
    splits = -(-chunks.count // each)
    parts = launching.room(splits, rows, outputs, own, dtype)
    with launching.on(device):
        kernels.multiply_codes[down, splits, across](
            own.view(torch.uint8),
            own_scales,
            weight.contiguous().view(torch.uint8),
            scales.contiguous(),
            parts,
            rows,
            inputs,
            outputs,
            own_scales.stride(0) if len(own_scales) > 1 else 0,
            own_scales.stride(1) if own_scales.shape[1] > 1 else 0,
            min(block[0], outputs),
            min(block[1], inputs),
            scales.shape[1],
            chunks.per_group,
            chunks.count,
            each,
            WIDE=device.type == "cpu",
            BM=tall,
            BN=wide,
            BK=chunks.size,
            num_warps=4,
            num_stages=3,
        )
    return launching.summed(parts, dtype)


MULTIPLICATIONS: dict[str, Multiplication] = {
    "tensor": multiply_tensors,
    "row": multiply_rows,
    "block": multiply_blocks,
    "triton8": multiply_in_triton,
}
"""Way -> what multiplies so."""

_TRIALS: dict[str, tuple[tuple[Shape, Block, bool], ...]] = {
    "tensor": (((48, 256), (48, 256), True),),
    "row": (((48, 256), (1, 256), False), ((48, 256), (48, 256), False)),
    "block": (((256, 640), (128, 128), False),),
    "triton8": (((48, 256), (1, 256), False), ((200, 600), (128, 128), False), ((72, 200), (16, 40), True)),
}
"""Way -> shapes and blocks of weights, and whether the scale of activations is static."""

_SUMMED = 1e-3
"""What sums may be off by, relative to the largest: tensor cores keep 14 bits or more of each product."""


def is_right(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of ``MULTIPLICATIONS`` is the one that is defined, for small weights on ``device``."""
    generator = torch.Generator().manual_seed(0)
    for shape, block, static in _TRIALS[name]:
        weight = torch.randn(shape, generator=generator).mul_(60).clamp_(-448, 448).to(torch.float8_e4m3fn)
        grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
        scales = torch.rand(grid, generator=generator) + 0.5
        for rows in (1, 40):
            x = torch.randn(rows, shape[1], generator=generator)
            own, own_scales = Activations(static=static).quantize(x, block, torch.tensor(0.01) if static else None)
            expected = defined(own, own_scales, weight, scales, block)
            here = (own, own_scales, weight, scales)
            left, left_scales, right, right_scales = (each.to(device) for each in here)
            found = MULTIPLICATIONS[name](left, left_scales, right, right_scales, block, dtype).cpu().float()
            tolerance = 4 * torch.finfo(dtype).eps + _SUMMED
            if not bool((found - expected).abs().max() <= tolerance * expected.abs().max()):
                return False
    return True
