"""Products with floats of 8 bits, for GPUs.

Triton comes with torch's builds for CUDA; without it, nothing imports this module (see ``launching.installed``).

Of a weight, ``[outputs, inputs]``, each program multiplies a tile of ``BN`` outputs with ``BM`` rows of activations,
going along the inputs in chunks of ``BK``. A chunk lies in one group of columns that share scales, so that one vector
of scales is read for it; the last chunk of a group may reach beyond it and is masked. ``split`` says which of the
chunks a program takes: with more than one split, ``out`` has one sum for each, which the caller adds up in order.

On CPU tensors, in Triton's interpreter, the same code runs in float32 (``WIDE``): the interpreter multiplies the bits
of bfloat16, and cuts bits off where it converts to it. Products of two floats of 16 bits or less are exact in float32,
so the sum is the same.
"""

# Triton compiles these from their source: arguments are what a launch makes of them, and constants are in capitals.
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decoded(code, HARDWARE: tl.constexpr):
    """float8_e4m3fn, as bytes -> float32, exactly; NaNs and subnormals, too.

    Without instructions for it, the bits are moved to those of a float16, whose exponents are larger by 8.
    """
    if HARDWARE:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = code.to(tl.uint16)
        magnitude = bits & 0x7F
        half = ((bits & 0x80) << 8) | (magnitude << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value = tl.where(magnitude == 0x7F, float("nan"), value)
    return value


@triton.jit
def rounded(value):
    """The nearest bfloat16, as float32; of two as near, the even one."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)


@triton.jit(do_not_specialize=["rows", "across", "per_group", "chunks", "each"])
def multiply_decoded(
    x,  # [rows, inputs]
    codes,  # uint8 [outputs, inputs]
    scales,  # float32 [blocks down, across]
    out,  # [splits, rows, outputs]
    rows,
    inputs,
    outputs,
    block_rows,
    block_columns,
    across,
    per_group,  # chunks of each group of columns
    chunks,  # of all of them
    each,  # of a split
    HARDWARE: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,  # whether no chunk reaches beyond its group
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``x @ weight.T``, where ``weight`` is codes times scales in float32, rounded once to the dtype of ``x``."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    of_code = codes + n.to(tl.int64)[None, :] * inputs
    of_scale = scales + (n // block_rows) * across
    total = tl.full([BM, BN], 0.0, tl.float32)
    for chunk in range(split * each, min(split * each + each, chunks)):
        group = chunk // per_group
        at = group * block_columns + (chunk % per_group) * BK + k
        scale = tl.load(of_scale + group, mask=n < outputs, other=0.0)
        of_own = x + m[:, None] * inputs + at[None, :]
        if EVEN:
            code = tl.load(of_code + at[:, None], mask=(n < outputs)[None, :], other=0)
            own = tl.load(of_own, mask=(m < rows)[:, None], other=0.0)
            weight = decoded(code, HARDWARE) * scale[None, :]
        else:
            inside = at < min(group * block_columns + block_columns, inputs)
            code = tl.load(of_code + at[:, None], mask=inside[:, None] & (n < outputs)[None, :], other=0)
            own = tl.load(of_own, mask=(m < rows)[:, None] & inside[None, :], other=0.0)
            weight = decoded(code, HARDWARE) * scale[None, :]
            weight = tl.where(inside[:, None], weight, 0.0)  # zeros times a scale that is no number
        if WIDE:
            weight = rounded(weight) if own.dtype == tl.bfloat16 else weight.to(own.dtype).to(tl.float32)
            own = own.to(tl.float32)
        else:
            weight = weight.to(own.dtype)
        total = tl.dot(own, weight, total, input_precision="ieee")
    to = out + (split * rows + m).to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs)[None, :])


@triton.jit(do_not_specialize=["rows", "own_down", "own_across", "across", "per_group", "chunks", "each"])
def multiply_codes(
    x,  # uint8 [rows, inputs]
    own_scales,  # float32, one for each row and group of columns
    codes,  # uint8 [outputs, inputs]
    scales,  # float32 [blocks down, across]
    out,  # [splits, rows, outputs]
    rows,
    inputs,
    outputs,
    own_down,  # the strides of own_scales; 0 where there is but one
    own_across,
    block_rows,
    block_columns,
    across,
    per_group,  # chunks of each group of columns
    chunks,  # of all of them
    each,  # of a split
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``x @ weight.T``, both of them codes times scales. Codes are multiplied and a chunk of products is summed up by
    tensor cores; each such sum is scaled and added to the others in float32."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    of_own = x + m.to(tl.int64)[:, None] * inputs
    of_code = codes + n.to(tl.int64)[None, :] * inputs
    of_scale = scales + (n // block_rows) * across
    of_own_scale = own_scales + m.to(tl.int64) * own_down
    total = tl.full([BM, BN], 0.0, tl.float32)
    for chunk in range(split * each, min(split * each + each, chunks)):
        group = chunk // per_group
        at = group * block_columns + (chunk % per_group) * BK + k
        inside = at < min(group * block_columns + block_columns, inputs)
        scale = tl.load(of_scale + group, mask=n < outputs, other=0.0)
        own_scale = tl.load(of_own_scale + group * own_across, mask=m < rows, other=0.0)
        own = tl.load(of_own + at[None, :], mask=(m < rows)[:, None] & inside[None, :], other=0)
        code = tl.load(of_code + at[:, None], mask=inside[:, None] & (n < outputs)[None, :], other=0)
        if WIDE:
            part = tl.dot(decoded(own, False), decoded(code, False), input_precision="ieee")
        else:
            # Hopper's tensor cores add up few bits of each product; without a limit, they would do so to the end.
            part = tl.dot(
                own.to(tl.float8e4nv, bitcast=True), code.to(tl.float8e4nv, bitcast=True), max_num_imprecise_acc=BK
            )
        total += part * own_scale[:, None] * scale[None, :]
    to = out + (split * rows + m).to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs)[None, :])
