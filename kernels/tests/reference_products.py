"""What products with codes are, in torch: how activations are split, and in which order anything is added."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

STEP, DIGITS, FRACTION, BLOCK = 128, 3, 22, 64


def packed(codes: Tensor, bits: int) -> Tensor:
    """``[inputs, outputs]``, uint8, in the blocks of words that a ``WordMatrix`` has: int32, one dimension."""
    per_word = 32 // bits
    blocks = []
    for block in codes.long().split(BLOCK, dim=1):
        words = torch.zeros(len(codes) // per_word, block.shape[1], dtype=torch.int64)
        for k in range(per_word):
            words |= block[k::per_word] << (8 * (k % 4) + bits * (k // 4))
        blocks.append(words.flatten())
    return torch.cat([*blocks, torch.empty(0, dtype=torch.int64)]).to(torch.int32)


def steps(inputs: int, group: int) -> Iterator[tuple[int, int, int]]:
    """Group, and the first input and the one after the last of each step."""
    for first in range(0, inputs, group):
        end = min(first + group, inputs)
        for k in range(first, end, STEP):
            yield first // group, k, min(k + STEP, end)


def split(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A step of activations, float32 ``[rows, n]``: what 1 stands for, ``[rows, 1]``, and the digits of the integers
    that they are rounded to, int64 ``[rows, n]``, the lowest first."""
    largest = x.abs().amax(1, keepdim=True)
    exponent = torch.frexp(largest).exponent.clamp(min=-100)  # 2 ** exponent > largest
    finite = largest.isfinite()  # a NaN is the largest of its row
    exponent = exponent.where(finite, 0)
    unit = torch.ldexp(torch.ones_like(largest), exponent - FRACTION)
    integers = torch.round(x / unit).nan_to_num(0, 0, 0).where(finite, 0).long()
    digits = []
    for _ in range(DIGITS):
        digits.append((integers + 128) % 256 - 128)
        integers = (integers - digits[-1]) // 256
    return unit.where(finite, torch.nan), digits


def multiply(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    """``x @ (scale * (code - zero))``: ``[rows, inputs]`` to ``[rows, outputs]`` in the dtype of ``x``.

    Args:
        x: floating.
        codes: uint8 ``[inputs, outputs]``.
        scales, zeros: ``[groups, outputs]``.
        group: inputs that share them.
    """
    totals = torch.zeros(len(x), codes.shape[1], dtype=torch.float32)
    for number, first, end in steps(len(codes), group):
        unit, digits = split(x[:, first:end].float())
        result = torch.zeros_like(totals)
        for digit in reversed(digits):
            # Both products are integers below 2 ** 24, as is their difference.
            sums = digit @ codes[first:end].long() - zeros[number].long() * digit.sum(1, keepdim=True)
            result = result * 256 + sums.float()
        totals = totals + scales[number].float() * (result * unit)
    return totals.to(x.dtype)


def decode(codes: Tensor, scales: Tensor, zeros: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The matrix in full precision, ``[inputs, outputs]``, each element rounded once."""
    of = torch.arange(len(codes)) // group
    return ((codes.float() - zeros.float()[of]) * scales.float()[of]).to(dtype)


LANES, UNIT = 16, 256.0


def multiply_fp8(x: Tensor, codes: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """``x @ (code * scale).T``: float32 ``[rows, columns]`` to ``[rows, rows of the codes]`` in ``dtype``.

    Args:
        x: float32.
        codes: float8_e4m3fn or float8_e5m2 ``[rows of the weight, columns]``.
        scales: float32 ``[blocks down, blocks across]``.
        block: rows and columns that share one.
    """
    unit = UNIT if codes.dtype == torch.float8_e4m3fn else 1.0
    weight, totals = codes.float(), torch.zeros(len(x), len(codes), LANES)
    nans = weight.isnan() if unit != 1 else torch.zeros_like(weight, dtype=torch.bool)
    weight = weight.masked_fill(nans, 0) / unit
    of = torch.arange(len(codes)) // block[0]
    for number, first in enumerate(range(0, codes.shape[1], block[1])):
        end = min(first + block[1], codes.shape[1])
        sums = torch.zeros_like(totals)
        for k in range(first, end, LANES):
            some = slice(k, min(k + LANES, end))
            sums[..., : some.stop - k] += x[:, None, some] * weight[None, :, some]
        scaled = sums * unit * scales[of, number, None]
        totals[..., : end - first] += scaled[..., : end - first]
    half = LANES // 2
    while half:
        totals = totals[..., :half] + totals[..., half : 2 * half]
        half //= 2
    return totals[..., 0].masked_fill(nans.any(1), torch.nan).to(dtype)
