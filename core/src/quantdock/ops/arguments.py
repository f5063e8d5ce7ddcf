"""Checks of what an operation is given; the same whichever implementation runs."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What compiled code reads."""


def expect(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """
    Raises:
        ValueError: the tensor isn't a contiguous one of this dtype and shape in CPU memory.
    """
    found = (tensor.dtype, tuple(tensor.shape), tensor.device.type, tensor.is_contiguous())
    if found != (dtype, shape, "cpu", True):
        kind = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, {kind}; "
            f"expected {dtype} {list(shape)} on cpu, contiguous"
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
