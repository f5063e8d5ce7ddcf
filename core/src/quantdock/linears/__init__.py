"""Linear layers over grouped integers, for plugins: ``from quantdock import linears``.

A weight is stored as small integers (codes), with a scale and a zero point for each output and group of inputs:
``weight[out, in] = scale[group of in, out] * (code[in, out] - zero[group of in, out])``. How codes, scales and zero
points are packed is the format's business: a format subclasses ``GroupedLinear`` and says how to read its buffers. How
to multiply with them fast is the same for all formats, and is what this package does.

In evaluation on CPU, a layer takes one of three paths, decided once; ``GroupedLinear.path`` says which, and so does the
report.

======== ============================================================ ==============================================
path     taken when                                                   what it does
======== ============================================================ ==============================================
int4pack activations in bfloat16 or float16; codes of up to 4 bits;   few rows of activations go through torch's
         all groups of the same size, a multiple of 32 inputs; a      kernel for 4 bits; more go as in ``columns``,
         multiple of 16 outputs; AVX2 or AVX512                       from the kernel's form of the codes
int8pack activations in bfloat16 or float16; codes of 8 bits; one     the same with torch's kernel for 8 bits
         group; zero points of 128; a multiple of 16 inputs; AVX2
         or AVX512
columns  everything else, training and other devices                  dequantizes some outputs at a time, multiplies
======== ============================================================ ==============================================

How many rows are few depends on what else the CPU has (``crossover.ROWS``).

================================= ============================= =============================
CPU                               rows on ``int4pack``          rows on ``int8pack``
================================= ============================= =============================
AMX                               up to 24                      up to 16
AVX512 with bfloat16              up to 256                     up to 128
AVX512 without bfloat16, AVX2     any                           any
================================= ============================= =============================

``dequantize`` defines what a weight is. In float32, ``columns`` multiplies with exactly that; in bfloat16, all paths
round the scales to bfloat16 first. The two kernels' paths compute in bfloat16, and round activations in float16 to it,
which gptqmodel does on CPU, too; with ``compute_dtype=torch.float16``, such a layer takes ``columns``, where (with
scales of that dtype) nothing is rounded but the product. Of ten million weights, 4 bits take 0.7 ms for a row through
the kernel, and 8 ms to dequantize. Activations in 8 bits, for which torch has faster kernels, would be another
quantization than the stored one.

The kernel's form takes the place of the codes in memory at the first forward, and never leaves the process: whatever
looks at a layer from outside (its state dict, a copy, a pickle) finds the stored tensors, bit for bit.

Experts that an architecture has in one parameter, ``[experts, outputs, inputs]``, are the weights of linear layers
where checkpoints store them one by one. ``Experts`` says which piece is whose, ``hold`` lets a module keep them as they
are stored, and what the module's code then finds under the parameter's name is a ``Stack``, which decodes one expert
when it is indexed or multiplied with. A format says what its tensors mean: a ``Reading`` that makes ``Matrices``,
``JointMatrices`` for grouped integers. For modules of a format's own, there is ``Bits``.
"""

from __future__ import annotations

from quantdock.linears.affine import Grouping, dequantize_columns, pieces
from quantdock.linears.experts import Experts, disassemble
from quantdock.linears.holding import Bits, Reading, hold, let_go
from quantdock.linears.joint import JointMatrices, JointMatrix
from quantdock.linears.layer import GroupedLinear
from quantdock.linears.stack import Matrices, Matrix, Stack, dequantize_all
from quantdock.linears.weights import Weight, dequantize

__all__ = [
    "Bits",
    "Experts",
    "GroupedLinear",
    "Grouping",
    "JointMatrices",
    "JointMatrix",
    "Matrices",
    "Matrix",
    "Reading",
    "Stack",
    "Weight",
    "dequantize",
    "dequantize_all",
    "dequantize_columns",
    "disassemble",
    "hold",
    "let_go",
    "pieces",
]
