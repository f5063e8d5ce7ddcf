"""Compiled CPU kernels for quantdock: plain C behind ctypes, with one variant per instruction set.

Every function writes into tensors that the caller brings, checks them before anything is written, and releases the GIL
while it runs. What each computes is defined by the operation of ``quantdock.ops`` that it stands behind; the bits are
the same for every instruction set.
"""

from __future__ import annotations

from quantdock_kernels._library import ABI, function, instruction_set, instruction_sets
from quantdock_kernels.blockwise import quantize_4bit, quantize_8bit
from quantdock_kernels.rows import quantize_rows_int8

__version__ = "0.1.0"

__all__ = [
    "ABI",
    "function",
    "instruction_set",
    "instruction_sets",
    "quantize_4bit",
    "quantize_8bit",
    "quantize_rows_int8",
]
