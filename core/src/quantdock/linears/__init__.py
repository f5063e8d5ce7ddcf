"""Linear layers over grouped integers, for plugins: ``from quantdock import linears``.

A weight is stored as small integers (codes), with a scale and a zero point for each output and group of inputs:
``weight[out, in] = scale[group of in, out] * (code[in, out] - zero[group of in, out])``. How codes, scales and zero
points are packed is the format's business: a format subclasses ``GroupedLinear`` and says how to read its buffers. How
to multiply with them fast is the same for all formats, and is what this package does.

In evaluation on CPU, a layer takes one of four paths, the first that its weight fits, decided once;
``GroupedLinear.path`` says which, and so does the report.

======== ============================================================ ==============================================
path     taken when                                                   what it does
======== ============================================================ ==============================================
words    quantdock-kernels is installed, on a CPU with AVX2 or        few rows of activations go through its kernel
         AVX512; all groups of the same size; groups and inputs that  for 2, 4 and 8 bits; more go as in ``columns``,
         fill words of 32 bits (multiples of 8, for 4 bits)           from the kernel's form of the codes
int4pack activations in bfloat16 or float16; codes of up to 4 bits;   the same with torch's kernel for 4 bits
         all groups of the same size, a multiple of 32 inputs; a
         multiple of 16 outputs; AVX2 or AVX512
int8pack activations in bfloat16 or float16; codes of 8 bits; one     the same with torch's kernel for 8 bits
         group; zero points of 128; a multiple of 16 inputs; AVX2
         or AVX512
columns  everything else, training and other devices                  dequantizes some outputs at a time, multiplies
======== ============================================================ ==============================================

How many rows are few depends on what else the CPU has (``crossover.ROWS``).

========================== ================= ==================== ====================
CPU                        rows on ``words`` rows on ``int4pack`` rows on ``int8pack``
========================== ================= ==================== ====================
AMX                        up to 32          up to 24             up to 16
AVX512 with bfloat16       any               up to 256            up to 128
AVX512 without it, AVX2    any               any                  any
========================== ================= ==================== ====================

``dequantize`` defines what a weight is. ``words`` multiplies with exactly that: no scale and no activation is rounded,
products are summed as integers, and the result is rounded to the activations' dtype once, the same on any CPU. In
float32, ``columns`` has the exact weight, too; in 16 bits it rounds it, like any dequantized model.
Torch's two kernels compute in bfloat16: they round scales to it, and activations in float16, which gptqmodel does on
CPU, too. With ``compute_dtype=torch.float16``, a layer that they would take takes ``columns``. Activations in 8 bits,
for which torch has faster kernels, would be another quantization than the stored one.

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
