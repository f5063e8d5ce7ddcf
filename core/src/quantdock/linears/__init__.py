"""Linear layers over grouped integers, for plugins: ``from quantdock import linears``.

A weight is stored as small integers (codes), with a scale and a zero point for each output and group of inputs:
``weight[out, in] = scale[group of in, out] * (code[in, out] - zero[group of in, out])``. How codes, scales and zero
points are packed is the format's business: a format subclasses ``GroupedLinear`` and says how to read its buffers. How
to multiply with them fast is the same for all formats, and is what this package does.

In evaluation on CPU, a layer takes one of three paths; ``GroupedLinear.path`` says which.

======== ============================================================ ==============================================
path     taken when                                                   what it does
======== ============================================================ ==============================================
int4pack bfloat16; codes of up to 4 bits; all groups of the same      up to 32 rows of activations go through torch's
         size, a multiple of 32 inputs; a multiple of 16 outputs;     kernel for 4 bits; more go as in ``columns``,
         AVX2 or AVX512                                               from the kernel's form of the codes
int8pack bfloat16; codes of 8 bits; one group; zero points of 128;    the same with torch's kernel for 8 bits
         AVX2 or AVX512
columns  everything else, training and other devices                  dequantizes some outputs at a time, multiplies
======== ============================================================ ==============================================

``dequantize`` defines what a weight is. In float16 (with scales of that dtype) and in float32, ``columns`` multiplies
with exactly that; in bfloat16, all paths round the scales to bfloat16 first. The kernel's form takes the place of the
codes in memory at the first forward, and never leaves the process: whatever looks at a layer from outside (its state
dict, a copy, a pickle) finds the stored tensors, bit for bit.
"""

from __future__ import annotations

from quantdock.linears.affine import Grouping, dequantize_columns, pieces
from quantdock.linears.layer import GroupedLinear
from quantdock.linears.weights import Weight, dequantize

__all__ = ["GroupedLinear", "Grouping", "Weight", "dequantize", "dequantize_columns", "pieces"]
