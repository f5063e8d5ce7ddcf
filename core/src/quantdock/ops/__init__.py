"""Operations on the bits of weights, for plugins: ``from quantdock import ops``.

Each operation writes into tensors that the caller brings, so that a result can be filled slice by slice. What it
computes is defined by its implementation in torch. Where the package ``quantdock-kernels`` is installed,
compiled code gives the same bits faster; ``implementation()`` says which of the two is at work. The environment
variable ``QUANTDOCK_KERNELS``, read at the first use, chooses: ``off`` for torch, or an instruction set for compiled
code. Blockwise codes and rows of int8, which the libraries that define them make on GPUs by kernels of their own, are
for tensors in CPU memory; everything else takes tensors on any device, and computes in torch there.
"""

from __future__ import annotations

from quantdock.ops import parameters
from quantdock.ops.affine import quantize_affine
from quantdock.ops.blocks import working_bytes
from quantdock.ops.blockwise_4bit import WORKING_BYTES_4BIT, quantize_blockwise_4bit
from quantdock.ops.blockwise_8bit import WORKING_BYTES_8BIT, quantize_blockwise_8bit
from quantdock.ops.casts import cast
from quantdock.ops.choice import implementation
from quantdock.ops.fp8 import decode_fp8, encode_fp8, has_fast_products, multiply_fp8
from quantdock.ops.fp8_scales import Fp8Scales, fp8_scales
from quantdock.ops.groups import block_magnitudes, group_extremes, group_magnitudes
from quantdock.ops.rows import quantize_rows_int8, rows_int8_working_bytes
from quantdock.ops.trial import trial_matrix
from quantdock.ops.words import pack_words, unpack_words

__all__ = [
    "WORKING_BYTES_4BIT",
    "WORKING_BYTES_8BIT",
    "Fp8Scales",
    "block_magnitudes",
    "cast",
    "decode_fp8",
    "encode_fp8",
    "fp8_scales",
    "group_extremes",
    "group_magnitudes",
    "has_fast_products",
    "implementation",
    "multiply_fp8",
    "pack_words",
    "parameters",
    "quantize_affine",
    "quantize_blockwise_4bit",
    "quantize_blockwise_8bit",
    "quantize_rows_int8",
    "rows_int8_working_bytes",
    "trial_matrix",
    "unpack_words",
    "working_bytes",
]
