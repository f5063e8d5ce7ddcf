"""Matrices in pieces that the cache holds, and the parameters that belong to each element of a piece."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantdock.ops.chunks import LARGE_CHUNK, chunk


def working_bytes(columns: int) -> int:
    """Upper bound of the temporaries of an operation on a matrix, for rows of ``columns`` elements.

    Of those that aren't documented to have another one.
    """
    return 24 * max(LARGE_CHUNK, columns)


def row_pieces(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows, each few enough for one step of work; none of rows without elements."""
    if not columns:
        return
    step = max(1, chunk() // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def spread(parameters: Tensor, block: tuple[int, int], rows: slice, columns: int) -> Tensor:
    """The parameter of each element of some rows, ``[rows, columns]`` or ``[rows, 1]`` if a row has only one.

    Args:
        parameters: ``[ceil(all rows / block[0]), ceil(columns / block[1])]``.
        block: rows and columns that share a parameter.
        rows: which rows.
        columns: of the matrix.
    """
    # The dtype and the device are spelled out: torch's defaults are the user's to change.
    index = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=parameters.device) // block[0]
    found = parameters.index_select(0, index)
    return found if found.shape[1] == 1 else found.repeat_interleave(block[1], 1)[:, :columns]
