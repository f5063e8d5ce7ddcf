"""What quanto computes of a weight, row by row, by quantdock's operations: the same bits, sooner.

Nothing is taken for granted about the quanto that is installed: ``arithmetic_of`` gives these functions only after a
trial, in which quanto and they make the same of all kinds of values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantdock import ops

Arithmetic = Callable[[Tensor, Tensor, Tensor], bool]
"""``(matrix, codes, scale)``: matrix ``[rows, columns]`` on CPU, codes of its shape, scale ``[rows, 1]`` of its dtype.

Writes codes and scale. Returns whether they are quanto's; where it is False, quanto has to make them."""

Reference = Callable[[Tensor], tuple[Tensor, Tensor]]
"""quanto itself: from a matrix to codes and scale."""

WORKING_PER_ROW = 48
"""Bytes that each row takes on the way: its extremes, and what becomes of them; measured."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def int8(matrix: Tensor, codes: Tensor, scale: Tensor) -> bool:
    """``AbsmaxOptimizer`` and ``quantize_symmetric`` for qint8."""
    columns = matrix.shape[1]
    smallest, largest = torch.empty(2, len(matrix), 1, dtype=matrix.dtype, device=matrix.device)
    ops.group_extremes(matrix, group=columns, smallest=smallest, largest=largest)
    found = ops.parameters.absmax(smallest, largest, highest=127)
    if not _are_numbers(found.scales):
        return False
    ops.quantize_affine(
        matrix,
        group=columns,
        scales=found.scales,
        divide=found.divide,
        lowest=found.lowest,
        highest=found.highest,
        codes=codes,
    )
    scale.copy_(found.stored)
    return True


def float8(matrix: Tensor, codes: Tensor, scale: Tensor) -> bool:
    """``AbsmaxOptimizer`` and ``quantize_symmetric`` for qfloat8: quotients are in the dtype of the weights."""
    block = (1, matrix.shape[1])
    found = ops.fp8_scales(ops.block_magnitudes(matrix, block=block), rule="quotient")
    if not _are_numbers(found.scales):
        return False
    ops.encode_fp8(matrix, scales=found.scales, block=block, divide=found.divide, codes=codes, narrow=True)
    scale.copy_(found.stored)
    return True


def _are_numbers(scales: Tensor) -> bool:
    """Whether no code comes from a NaN, as in rows of zeros, which processors convert in their own ways."""
    return bool((scales.isfinite() & (scales > 0)).all())


def arithmetic_of(codes: torch.dtype, dtype: torch.dtype, reference: Reference) -> Arithmetic | None:
    """The function that gives quanto's bits, if there is one.

    Args:
        codes: what quanto stores.
        dtype: of weights.
        reference: quanto, with the type in question.
    """
    function = {torch.int8: int8, torch.float8_e4m3fn: float8}.get(codes)
    if function is None or dtype not in _DTYPES:
        return None
    matrix = ops.trial_matrix(256, dtype)
    expected = reference(matrix)
    found = torch.empty(matrix.shape, dtype=codes, device="cpu"), torch.empty(len(matrix), 1, dtype=dtype, device="cpu")
    same = function(matrix, *found) and all(
        one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        for one, other in zip(found, expected, strict=True)
    )
    return function if same else None
