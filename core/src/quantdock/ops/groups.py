"""What the scale of a group of elements is made from: its extremes, or its largest magnitude."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantdock.ops.arguments import expect, expect_matrix, expect_positive, has_whole_rows
from quantdock.ops.blocks import row_pieces
from quantdock.ops.choice import compiled


def group_extremes(matrix: Tensor, *, group: int, smallest: Tensor, largest: Tensor) -> None:
    """The smallest and the largest element of each group along a row.

    Both are NaNs for a group with a NaN. A zero is a positive one.

    Args:
        matrix: float32, bfloat16 or float16 ``[rows, columns]`` with any strides; not changed. Compiled code
            needs it on CPU, and the elements of a row side by side.
        group: elements that belong together; the last group of a row may be smaller.
        smallest, largest: of the matrix's dtype, ``[rows, ceil(columns / group)]``, written.

    Raises:
        ValueError: an argument isn't as described; nothing has been written.
    """
    groups = _expect_groups(matrix, group)
    expect("smallest", smallest, matrix.dtype, len(matrix), groups, device=matrix.device)
    expect("largest", largest, matrix.dtype, len(matrix), groups, device=matrix.device)
    kernels = compiled(matrix)
    if kernels is not None and has_whole_rows(matrix):
        kernels.group_extremes(matrix, group=group, smallest=smallest, largest=largest)
        return
    for rows in row_pieces(*matrix.shape):
        _reduce(torch.amin, matrix[rows], group, smallest[rows])
        _reduce(torch.amax, matrix[rows], group, largest[rows])
    smallest.add_(0.0)
    largest.add_(0.0)


def group_magnitudes(matrix: Tensor, *, group: int, magnitudes: Tensor) -> None:
    """The largest magnitude of each group along a row, a NaN for a group with a NaN.

    Args:
        matrix: float32, bfloat16 or float16 ``[rows, columns]`` with any strides; not changed. Compiled code
            needs it on CPU, and the elements of a row side by side.
        group: elements that belong together; the last group of a row may be smaller.
        magnitudes: of the matrix's dtype, ``[rows, ceil(columns / group)]``, written.

    Raises:
        ValueError: an argument isn't as described; nothing has been written.
    """
    groups = _expect_groups(matrix, group)
    expect("magnitudes", magnitudes, matrix.dtype, len(matrix), groups, device=matrix.device)
    kernels = compiled(matrix)
    if kernels is not None and has_whole_rows(matrix):
        kernels.group_magnitudes(matrix, group=group, magnitudes=magnitudes)
        return
    for rows in row_pieces(*matrix.shape):
        _reduce(torch.amax, matrix[rows].abs(), group, magnitudes[rows])


def block_magnitudes(matrix: Tensor, *, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each block of rows and columns, of which those at the edges may be smaller.

    Args:
        matrix: as for ``group_magnitudes``.
        block: rows and columns that belong together.

    Returns:
        of the matrix's dtype, ``[ceil(rows / block[0]), ceil(columns / block[1])]``

    Raises:
        ValueError: an argument isn't as described.
    """
    expect_positive("block", *block)
    found = torch.empty(len(matrix), _expect_groups(matrix, block[1]), dtype=matrix.dtype, device=matrix.device)
    group_magnitudes(matrix, group=block[1], magnitudes=found)
    if block[0] == 1:
        return found
    result = torch.empty(-(-len(matrix) // block[0]), found.shape[1], dtype=matrix.dtype, device=matrix.device)
    # The rows of a block are a group of the matrix's other side.
    _reduce(torch.amax, found.t(), block[0], result.t())
    return result


def _expect_groups(matrix: Tensor, group: int) -> int:
    expect_matrix("matrix", matrix)
    expect_positive("group", group)
    return -(-matrix.shape[1] // group)


def _reduce(function: Callable[[Tensor, int], Tensor], part: Tensor, group: int, out: Tensor) -> None:
    columns = part.shape[1]
    whole = columns // group
    if whole:
        out[:, :whole] = function(part.unfold(1, group, group), 2)
    if whole * group < columns:
        out[:, whole] = function(part[:, whole * group :], 1)
