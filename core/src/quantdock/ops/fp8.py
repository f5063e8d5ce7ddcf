"""8-bit floats with a scale per block of rows and columns: a whole tensor, a row, 128 x 128 elements, or 1 x 32."""

from __future__ import annotations

import torch
from torch import Tensor

from quantdock.ops.arguments import expect, expect_matrix, expect_positive, has_whole_rows
from quantdock.ops.blocks import row_pieces, spread
from quantdock.ops.choice import compiled, kernels

LARGEST_E4M3 = 448.0

_NAN_E4M3 = 0x7F
_NEGATIVE_NAN_E4M3 = 0xFF
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def encode_fp8(
    matrix: Tensor, *, scales: Tensor, block: tuple[int, int], divide: bool, codes: Tensor, narrow: bool = False
) -> None:
    """Scale elements as float32, and round them to the nearest float8_e4m3fn, ties to even.

    What is beyond the largest code, 448, gets that code. A NaN, such as an infinity or a zero times the wrong scale
    becomes, has the code 0x7F.

    Args:
        matrix: float32, bfloat16 or float16 ``[rows, columns]`` with any strides; not changed. Compiled code
            needs it on CPU, and the elements of a row side by side.
        scales: float32 ``[ceil(rows / block[0]), ceil(columns / block[1])]``.
        block: rows and columns that share a scale; blocks at the edges may be smaller.
        divide: by scales, instead of multiplying with them. The two round differently.
        codes: float8_e4m3fn ``[rows, columns]``, written.
        narrow: round what is scaled to the matrix's dtype first, as where all the arithmetic is in that.

    Raises:
        ValueError: an argument isn't as described; nothing has been written.
    """
    expect_matrix("matrix", matrix)
    _expect_scales(matrix, scales, block)
    expect("codes", codes, torch.float8_e4m3fn, *matrix.shape, device=matrix.device)
    chosen = compiled(matrix)
    if chosen is not None and has_whole_rows(matrix):
        chosen.encode_fp8(matrix, scales=scales, block=block, divide=divide, codes=codes, narrow=narrow)
        return
    for rows in row_pieces(*matrix.shape):
        scale = spread(scales, block, rows, matrix.shape[1])
        values = matrix[rows].float()
        values = values / scale if divide else values * scale
        if narrow and matrix.dtype != torch.float32:
            values = values.to(matrix.dtype).float()
        # Not every version of torch limits what it converts.
        codes[rows] = values.clamp_(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
        # The sign of a NaN depends on the processor. On CPU, bools are slow in torch, the largest element isn't.
        found = codes[rows].view(torch.uint8)
        if found.device.type != "cpu" or found.max() == _NEGATIVE_NAN_E4M3:
            found.masked_fill_(found == _NEGATIVE_NAN_E4M3, _NAN_E4M3)


def decode_fp8(codes: Tensor, *, scales: Tensor, block: tuple[int, int], out: Tensor) -> None:
    """``codes.to(torch.float32) * scales``, rounded once to the dtype of the result.

    Args:
        codes: float8_e4m3fn or float8_e5m2 ``[rows, columns]`` with any strides; not changed. Compiled code
            needs it on CPU, and the elements of a row side by side.
        scales: floats ``[ceil(rows / block[0]), ceil(columns / block[1])]``; powers of two as float8_e8m0fnu
            are floats, too. Used as float32.
        block: rows and columns that share a scale; blocks at the edges may be smaller.
        out: float32, bfloat16 or float16 ``[rows, columns]``, written. Nobody says which NaN a NaN is.

    Raises:
        ValueError: an argument isn't as described; nothing has been written.
    """
    expect_matrix("codes", codes, _FP8)
    expect_matrix("out", out)
    expect("out", out, out.dtype, *codes.shape, device=codes.device)
    single = scales.to(torch.float32).contiguous() if scales.is_floating_point() else scales
    _expect_scales(codes, single, block)
    chosen = compiled(codes)
    if chosen is not None and has_whole_rows(codes):
        chosen.decode_fp8(codes, scales=single, block=block, out=out)
        return
    for rows in row_pieces(*codes.shape):
        values = _values(codes[rows]).mul_(spread(single, block, rows, codes.shape[1]))
        out[rows].copy_(values)


def multiply_fp8(
    x: Tensor, *, codes: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype | None = None
) -> Tensor:
    """``x @ weight.T`` with a weight of codes times scales in float32; summed in float32, and rounded once.

    Compiled code never has the weight in memory, and takes longer the more rows there are.

    Args:
        x: float32, bfloat16 or float16 ``[rows, columns]``.
        codes, scales, block: of the weight, as of ``decode_fp8``.
        dtype: of the result, another one of those; by default that of ``x``.

    Returns:
        ``[rows, rows of the weight]``. A row of the weight with the code of a NaN makes NaNs.

    Raises:
        ValueError: an argument isn't as described.
    """
    expect_matrix("codes", codes, _FP8)
    expect_matrix("x", x)
    own = x.float().contiguous()
    expect("x", own, torch.float32, len(x), codes.shape[1], device=codes.device)
    single = scales.to(torch.float32).contiguous() if scales.is_floating_point() else scales
    _expect_scales(codes, single, block)
    out = x.new_empty(len(x), len(codes), dtype=dtype or x.dtype)
    expect_matrix("the result", out)
    chosen = compiled(codes)
    if chosen is not None and has_whole_rows(codes):
        chosen.multiply_fp8(own, codes=codes, scales=single, block=block, out=out)
        return out
    for rows in row_pieces(*codes.shape):
        weight = _values(codes[rows]).mul_(spread(single, block, rows, codes.shape[1]))
        out[:, rows] = own @ weight.t()
    return out


def has_fast_products() -> bool:
    """Whether ``multiply_fp8`` on CPU is compiled for this processor's vectors, and takes torch's threads."""
    found = kernels()
    return found is not None and found.has_fast_products()


def _expect_scales(matrix: Tensor, scales: Tensor, block: tuple[int, int]) -> None:
    expect_positive("block", *block)
    rows, columns = matrix.shape
    expect("scales", scales, torch.float32, -(-rows // block[0]), -(-columns // block[1]), device=matrix.device)


def _values(codes: Tensor) -> Tensor:
    """What ``to(torch.float32)`` gives, faster: 8-bit floats are float16 with fewer bits."""
    bits = codes.view(torch.int8).to(torch.int16)
    if codes.dtype == torch.float8_e5m2:
        return bits.bitwise_left_shift_(8).view(torch.float16).float()
    magnitudes = bits.bitwise_and(0x7F)
    # The sign and seven bits; the exponent is 8 lower than that of float16.
    values = bits.bitwise_left_shift_(7).bitwise_and_(-0x4080).view(torch.float16).float()
    values.mul_(256.0)
    if magnitudes.device.type != "cpu" or magnitudes.max() == _NAN_E4M3:
        values.masked_fill_(magnitudes == _NAN_E4M3, float("nan"))
    return values
