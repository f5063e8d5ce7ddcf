"""Whole tensors quantized with the functions that fill results piece by piece."""

from __future__ import annotations

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from quantdock_bnb import fourbit, int8


def four_bits(
    tensor: Tensor, *, quant_type: str, blocksize: int, nested: bool, quant_storage: torch.dtype
) -> tuple[Tensor, QuantState]:
    """What ``bitsandbytes.functional.quantize_4bit`` returns for the same arguments."""
    packed = torch.empty((tensor.numel() + 1) // 2, dtype=torch.uint8, device=tensor.device)
    absmax = torch.empty(-(-tensor.numel() // blocksize), dtype=torch.float32, device=tensor.device)
    fourbit.quantize_into(tensor.reshape(-1), packed, absmax, quant_type=quant_type, blocksize=blocksize)
    state = fourbit.state_of(
        absmax, shape=tensor.shape, dtype=tensor.dtype, blocksize=blocksize, quant_type=quant_type, nested=nested
    )
    return packed.view(quant_storage).unsqueeze(1), state


def eight_bits(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix."""
    codes = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    scales = torch.empty(matrix.shape[0], dtype=torch.float32, device=matrix.device)
    int8.quantize_rows_into(matrix, codes, scales)
    return codes, scales
