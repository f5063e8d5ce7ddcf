"""Compiled CPU kernels for quantdock: plain C behind ctypes, with one variant per instruction set.

Every function writes into tensors that the caller brings, checks them before anything is written, and releases the GIL
while it runs. What each computes is defined by the operation of ``quantdock.ops`` that it stands behind; the bits are
the same for every instruction set. Products (``WordMatrix``) are defined by themselves, and make their results.
"""

from __future__ import annotations

from quantdock_kernels._library import ABI, function, instruction_set, instruction_sets
from quantdock_kernels.affine import quantize_affine
from quantdock_kernels.blockwise import quantize_4bit, quantize_8bit
from quantdock_kernels.casts import cast
from quantdock_kernels.fp8 import decode_fp8, encode_fp8, multiply_fp8
from quantdock_kernels.groups import group_extremes, group_magnitudes
from quantdock_kernels.products import WordMatrix, has_fast_products, pack_blocks, unpack_blocks
from quantdock_kernels.rows import quantize_rows_int8
from quantdock_kernels.words import pack_words, unpack_words

__version__ = "0.1.0"

__all__ = [
    "ABI",
    "WordMatrix",
    "cast",
    "decode_fp8",
    "encode_fp8",
    "function",
    "group_extremes",
    "group_magnitudes",
    "has_fast_products",
    "instruction_set",
    "instruction_sets",
    "multiply_fp8",
    "pack_blocks",
    "pack_words",
    "quantize_4bit",
    "quantize_8bit",
    "quantize_affine",
    "quantize_rows_int8",
    "unpack_blocks",
    "unpack_words",
]
