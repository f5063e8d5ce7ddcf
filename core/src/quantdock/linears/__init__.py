"""Linear layers over grouped integers, for plugins: ``from quantdock import linears``.

A weight is stored as small integers (codes), with a scale and a zero point for each output and group of inputs:
``weight[out, in] = scale[group of in, out] * (code[in, out] - zero[group of in, out])``. How codes, scales and zero
points are packed is the format's business: a format subclasses ``GroupedLinear`` and says how to read its buffers. How
to multiply with them fast is the same for all formats, and is what this package does.

In evaluation, a layer takes the first of these paths that is for its device and fits its weight and the dtype of its
activations, decided once; ``GroupedLinear.path`` says which, and so does the report.

======== ============================================================ ==============================================
path     taken when                                                   what it does
======== ============================================================ ==============================================
words    on CPU: quantdock-kernels is installed; AVX2 or AVX512; all  few rows of activations go through its kernel
         groups of the same size; groups and inputs that fill words   for 2, 4 and 8 bits; more go as in ``columns``,
         of 32 bits (multiples of 8, for 4 bits)                      from the kernel's form of the codes
int4pack on CPU: activations in bfloat16 or float16; codes of up to   the same with torch's kernel for 4 bits
         4 bits; all groups of the same size, a multiple of 32
         inputs; a multiple of 16 outputs; AVX2 or AVX512
int8pack on CPU: activations in bfloat16 or float16; codes of 8       the same with torch's kernel for 8 bits
         bits; one group; zero points of 128; a multiple of 16
         inputs; AVX2 or AVX512
int4pack on CUDA: activations in bfloat16; codes of 4 bits; groups    the same with torch's kernel for 4 bits
         as on CPU; a multiple of 8 outputs; compute capability 8.0
triton   on CUDA: Triton is installed; compute capability 8.0         the same with a kernel for 2, 3, 4 and 8 bits
columns  everything else, training and other devices                  dequantizes some outputs at a time, multiplies
======== ============================================================ ==============================================

How many rows are few depends on what else the CPU has (``crossover.ROWS``); on CUDA, up to 128 are for ``int4pack`` and
256 for ``triton``.

========================== ================= ==================== ====================
CPU                        rows on ``words`` rows on ``int4pack`` rows on ``int8pack``
========================== ================= ==================== ====================
AMX                        up to 32          up to 24             up to 16
AVX512 with bfloat16       any               up to 256            up to 128
AVX512 without it, AVX2    any               any                  any
========================== ================= ==================== ====================

``dequantize`` defines what a weight is. ``words`` multiplies with exactly that: no scale and no activation is rounded,
products are summed as integers, and the result is rounded to the activations' dtype once, the same on any CPU. So does
``triton``, with sums in float32, unless 16 neighbouring inputs are of several groups: then it rounds the weight, as
``columns`` does in 16 bits, like any dequantized model. In float32, ``columns`` has the exact weight.
Torch's kernels compute in bfloat16: they round scales to it, and what they add for zero points; on CPU, activations in
float16, too, which gptqmodel does there. With ``compute_dtype=torch.float16``, a layer that they would take takes
another path. Activations in 8 bits, for which torch has faster kernels, would be another quantization than the stored
one.

On a device, a kernel is taken only after it has multiplied a small weight rightly there (``trusted``); if it doesn't, a
warning says why, and layers take the next path. CUDA graphs may capture a layer once it has been used outside of one.

The kernel's form takes the place of the codes in memory at the first forward, and never leaves the process: whatever
looks at a layer from outside (its state dict, a copy, a pickle) finds the stored tensors, bit for bit.

Experts that an architecture has in one parameter, ``[experts, outputs, inputs]``, are the weights of linear layers
where checkpoints store them one by one. ``Experts`` says which piece is whose, ``hold`` lets a module keep them as they
are stored, and what the module's code then finds under the parameter's name is a ``Stack``, which decodes one expert
when it is indexed or multiplied with. A format says what its tensors mean, and how it multiplies with them: a
``Reading`` that makes ``KeptMatrices``, a ``JointReading`` for grouped integers. For modules of a format's own, there
is ``Bits``.
"""

from __future__ import annotations

from quantdock.linears.affine import Grouping, dequantize_columns, pieces
from quantdock.linears.experts import Experts, disassemble
from quantdock.linears.holding import Bits, KeptMatrices, Reading, hold, let_go, paths_of
from quantdock.linears.joint import JointMatrices, JointMatrix, JointReading
from quantdock.linears.layer import GroupedLinear
from quantdock.linears.paths import HasPaths
from quantdock.linears.stack import Matrices, Matrix, Stack, dequantize_all
from quantdock.linears.trusting import trusted
from quantdock.linears.weights import Weight, dequantize

__all__ = [
    "Bits",
    "Experts",
    "GroupedLinear",
    "Grouping",
    "HasPaths",
    "JointMatrices",
    "JointMatrix",
    "JointReading",
    "KeptMatrices",
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
    "paths_of",
    "pieces",
    "trusted",
]
