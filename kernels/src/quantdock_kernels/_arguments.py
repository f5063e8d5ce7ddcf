"""Checks that stand between a tensor and a pointer: after them, no kernel reads or writes outside of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes of weights, and their numbers in ``csrc/kernels.h``."""


def check(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """The address of a contiguous tensor of exactly this dtype and shape.

    Raises:
        TypeError: it isn't a tensor of that dtype in CPU memory.
        ValueError: it has another shape, or isn't contiguous.
    """
    _check_memory(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected it contiguous")
    return tensor.data_ptr()


def check_floats(name: str, tensor: Tensor, dimensions: int) -> int:
    """The number of a weight's dtype; its elements have to lie side by side along the last dimension.

    Raises:
        TypeError: it isn't a tensor of 16- or 32-bit floats in CPU memory.
        ValueError: it has another number of dimensions, or gaps between the elements of a row.
    """
    _check_memory(name, tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")
    if tensor.dim() != dimensions:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {dimensions} dimensions")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}, expected 1 as the last one")
    return FLOATS[tensor.dtype]


def check_rows(name: str, tensor: Tensor, dtype: torch.dtype) -> int:
    """The address of a matrix of this dtype, with the elements of a row side by side and any distance between rows.

    Raises:
        TypeError: it isn't a tensor of that dtype in CPU memory.
        ValueError: it isn't a matrix, or has gaps between the elements of a row.
    """
    _check_memory(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, expected 2 dimensions and 1 as the "
            "last stride"
        )
    return tensor.data_ptr()


def check_positive(name: str, *values: int) -> None:
    """
    Raises:
        ValueError: one of them isn't positive.
    """
    if min(values) < 1:
        raise ValueError(f"{name} is {', '.join(map(str, values))}, expected a positive number")


def check_blocksize(blocksize: int) -> None:
    """
    Raises:
        ValueError: it isn't a positive even number.
    """
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize is {blocksize}, expected a positive even number")


def _check_memory(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}, expected a tensor")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise TypeError(f"{name} is {tensor.layout} on {tensor.device}, expected {torch.strided} on cpu")
    if tensor.is_neg():
        raise TypeError(f"{name} is a negated view of other memory; pass tensor.resolve_neg()")
