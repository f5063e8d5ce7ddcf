"""The Triton kernel: few rows of activations times codes in words, which it reads once.

Imported when a layer on a device first needs it, since Triton comes with torch's builds for devices only.

In Triton's interpreter (``TRITON_INTERPRET=1``), it runs on tensors in CPU memory.
"""

# Triton compiles this from its source: arguments are what a launch makes of them, and constants are in capitals. One of
# them decides both whether a name is set and whether it is used.
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, disable-error-code="possibly-undefined"
# ruff: noqa: N803, N806

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "steps", "each"])  # or it is compiled again for other numbers
def product(
    x,
    words,
    scales,
    zeros,
    index,
    out,
    rows,
    inputs,
    outputs,
    size,
    steps,
    each,
    BITS: tl.constexpr,
    RUNS: tl.constexpr,
    SHARING: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """``out[split] = x @ scale * (code - zero)`` over the inputs of some steps.

    Differences of codes are exact in any dtype, and are what tensor cores multiply with; a group's sum is scaled, in
    float32. So nothing of the weight is rounded, unless neighbours are of different groups: then each element is
    scaled before, and rounded to the dtype of activations.

    Args:
        x: ``[rows, inputs]``, contiguous.
        words: int32 ``[chunks, words of a chunk, outputs]``, see ``triton_form``.
        scales, zeros: ``[groups, outputs]``, contiguous.
        index: int32 ``[inputs]``, the group of each input; only read if ``SHARING`` is 0.
        out: float32 ``[splits, rows, outputs]``.
        size: inputs per group, a multiple of ``16 * SHARING``.
        steps: of ``16 * RUNS`` inputs, that there are.
        each: of them, in a split.
        BITS: of a code: 2, 3, 4 or 8.
        RUNS: of 16 inputs in a step, a divisor of those in a word; they are unrolled.
        SHARING: neighbouring runs that surely share a group, a divisor of ``RUNS``; 0 if not even a run's inputs do.
        WIDE: multiply in float32, since the interpreter doesn't know products of bfloat16.
        PRECISION: of products of float32, see ``tl.dot``.
    """
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    PER_WORD: tl.constexpr = 32 // LOW // RUNS  # steps
    TOGETHER: tl.constexpr = 1 if SHARING == 0 else SHARING

    n = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i = tl.arange(0, 16)
    there, some = n < outputs, m < rows
    total = tl.full([BLOCK_ROWS, BLOCK_OUTPUTS], 0.0, tl.float32)
    for step in range(split * each, min(split * each + each, steps)):
        place = step % PER_WORD * RUNS  # of the step's first run in its words
        word = step // PER_WORD
        if BITS == 3:  # the words of a chunk are those of two halves, and those of the highest bits
            chunk = word // 2 * 48
            above = tl.load(words + (chunk + 32 + i)[:, None] * outputs + n[None, :], mask=there[None, :], other=0)
            high = above >> (word % 2 * 16 + place)
            row = chunk + word % 2 * 16
        else:
            high = 0
            row = word * 16
        low = tl.load(words + (row + i)[:, None] * outputs + n[None, :], mask=there[None, :], other=0) >> place * LOW
        for first in tl.static_range(0, RUNS, TOGETHER):
            start = (step * RUNS + first) * 16
            if SHARING > 0:
                group = start // size * outputs + n
                inside = there & (start < inputs)
                scale = tl.load(scales + group, mask=inside, other=0).to(tl.float32)
                zero = tl.load(zeros + group, mask=inside, other=0).to(tl.int32)
            sums = tl.full([BLOCK_ROWS, BLOCK_OUTPUTS], 0.0, tl.float32)
            for run in tl.static_range(TOGETHER):
                k = start + run * 16 + i
                own = tl.load(x + m[:, None] * inputs + k[None, :], mask=some[:, None] & (k < inputs)[None, :], other=0)
                codes = (low >> (first + run) * LOW) & ((1 << LOW) - 1)
                if BITS == 3:
                    codes |= ((high >> (first + run)) & 1) << 2
                if SHARING > 0:
                    weight = (codes - zero[None, :]).to(tl.float32).to(own.dtype)
                else:
                    of = tl.load(index + k, mask=k < inputs, other=0)[:, None] * outputs + n[None, :]
                    shift = tl.load(zeros + of, mask=there[None, :], other=0).to(tl.int32)
                    factor = tl.load(scales + of, mask=there[None, :], other=0).to(tl.float32)
                    weight = ((codes - shift).to(tl.float32) * factor).to(own.dtype)
                if WIDE:
                    sums = tl.dot(own.to(tl.float32), weight.to(tl.float32), sums, input_precision=PRECISION)
                else:
                    sums = tl.dot(own, weight, sums, input_precision=PRECISION)
            total += sums * scale[None, :] if SHARING > 0 else sums
    to = (split * rows + m)[:, None] * outputs + n[None, :]
    tl.store(out + to, total, mask=some[:, None] & there[None, :])
