"""Checks of what an operation is given; the same whichever implementation runs."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What compiled code reads."""


CPU = torch.device("cpu")


def expect(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int, device: torch.device = CPU) -> None:
    """
    Raises:
        ValueError: the tensor isn't a contiguous one of this dtype and shape on this device.
    """
    found = (tensor.dtype, tuple(tensor.shape), tensor.device, tensor.is_contiguous())
    if found != (dtype, shape, device, True):
        kind = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, {kind}; "
            f"expected {dtype} {list(shape)} on {device}, contiguous"
        )


def expect_blocks(flat: Tensor, blocksize: int) -> int:
    """How many blocks the elements of ``flat`` make.

    Raises:
        ValueError: it isn't a contiguous vector of floats in CPU memory, or the block size isn't positive and even.
    """
    if not flat.is_floating_point() or flat.dim() != 1 or flat.device.type != "cpu" or not flat.is_contiguous():
        raise ValueError(
            f"flat is {flat.dtype} {list(flat.shape)} on {flat.device}, expected a contiguous vector of floats on cpu"
        )
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize is {blocksize}, expected a positive even number")
    return -(-flat.numel() // blocksize)


def expect_matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """
    Raises:
        ValueError: the tensor isn't a matrix of one of these dtypes; its strides and its device may be any.
    """
    if tensor.dtype not in dtypes or tensor.dim() != 2:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, expected a matrix of {' or '.join(map(str, dtypes))}"
        )


def expect_positive(name: str, *values: int) -> None:
    """
    Raises:
        ValueError: one of them isn't positive.
    """
    if min(values) < 1:
        raise ValueError(f"{name} is {', '.join(map(str, values))}, expected a positive number")


def has_whole_rows(matrix: Tensor) -> bool:
    """Whether the elements of a row lie side by side, as compiled code needs them."""
    return matrix.stride(1) == 1 or matrix.shape[1] == 1
