"""Multiplying activations of 8 bits with weights of 8 bits, where that was asked for and the device can do it.

======== ================================================================================================
way      taken when
======== ================================================================================================
tensor   one scale for all activations and one for the weight; columns and rows in multiples of 16
row      a scale for each row of activations, one for the weight or for each of its rows; bfloat16;
         multiples of 16
block    blocks of 128 x 128; multiples of 128; compute capability 9.0, and CUDA 12.9 or newer
triton8  everything else
======== ================================================================================================

The first three are recipes of ``torch.nn.functional.scaled_mm``, and ``path`` calls them by that name.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.library import custom_op

from quantdock import UnsupportedError, linears
from quantdock_fp8 import launching
from quantdock_fp8.activations import Activations
from quantdock_fp8.products import MULTIPLICATIONS, is_right
from quantdock_fp8.tiling import Block, Shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# What can be done where -----------------------------------------------------------------------------------------------


@functools.cache
def why_not(device: torch.device) -> str | None:
    """The reason why nothing on ``device`` multiplies floats of 8 bits with each other; ``None`` if something may."""
    if device.type != "cuda":
        return "this plugin multiplies them on CUDA devices only"
    if torch.version.hip is not None:
        return "for GPUs of AMD it isn't written"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not launching.has_instructions(device):
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} has the compute capability {major}.{minor}, and they came with 8.9"
    return None


def way(device: torch.device, dtype: torch.dtype, shape: Shape, block: Block, static: bool) -> str:
    """How activations of ``dtype`` are multiplied with a weight ``[rows, columns]`` on ``device``.

    Raises:
        UnsupportedError: they can't be.
    """
    reason = why_not(device)
    if reason is None and dtype not in DTYPES:
        reason = f"activations are {dtype}, not bfloat16, float16 or float32"
    if reason is None:
        found = recipe(dtype, shape, block, static)
        for name in (found, "triton8"):
            if name is not None and _works(name, device, dtype):
                return name
        reason = f"of kernels for a weight {list(shape)} with scales for {list(block)}, {_lacking()}"
    raise UnsupportedError(
        f"quantize_activations=True asks for products of 8-bit floats on {device}, which can't be: {reason}. Leave "
        "quantize_activations out: weights are decoded then, which is more precise"
    )


def _lacking() -> str:
    if not launching.installed():
        return "torch has none, and Triton isn't installed (pip install triton)"
    if torch.cuda.is_current_stream_capturing():
        return "none has been tried before a graph was captured (run the model once before that)"
    return "none gave the right result, as warnings say"


def recipe(dtype: torch.dtype, shape: Shape, block: Block, static: bool) -> str | None:
    """That of ``scaled_mm`` which fits, if there is one."""
    rows, columns = shape
    if rows % 16 or columns % 16:
        return None
    if block[1] >= columns:
        if static and block[0] >= rows:
            return "tensor"
        return "row" if dtype == torch.bfloat16 and (block[0] == 1 or block[0] >= rows) else None
    return "block" if not static and block == (128, 128) and not (rows % 128 or columns % 128) else None


def _works(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    if name == "triton8" and not launching.installed():
        return False
    if name == "block" and not _has_blocks(device):
        return False
    kernel = f"8-bit floats times 8-bit floats ({name}, {str(dtype).removeprefix('torch.')})"
    return linears.trusted(kernel, device, lambda there: is_right(name, there, dtype))


def _has_blocks(device: torch.device) -> bool:
    """Whether cuBLAS has the recipe (since 12.9, for Hopper alone), and torch the function."""
    version = tuple(map(int, (torch.version.cuda or "0").split(".")[:2]))
    exact = torch.cuda.get_device_capability(device) == (9, 0)
    return hasattr(nn.functional, "scaled_mm") and exact and version >= (12, 9)


# The product ----------------------------------------------------------------------------------------------------------


def multiply_quantized(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    block: Block,
    bias: Tensor | None,
    *,
    activations: Activations,
    stored: Tensor | None,
) -> Tensor:
    """``nn.functional.linear`` of quantized activations: a ``Product``, with two more arguments.

    Sums are in float32, and rounded to the dtype of ``x`` before the bias is added.

    Args:
        x: ``[..., columns]``.
        weight: float8_e4m3fn ``[rows, columns]``.
        scales: float32 ``[blocks down, blocks across]``.
        block: rows and columns that share a scale.
        bias: ``[rows]``.
        activations: how they are quantized.
        stored: their scale, if it is static; ``None`` otherwise.

    Raises:
        UnsupportedError: the device has no kernel for it.
    """
    bound, floor = activations.bound, activations.floor
    if torch.compiler.is_compiling():  # which would look into trials, and into what recipes need
        found: Tensor = torch.ops.quantdock_fp8.multiply_quantized(x, weight, scales, block, stored, bound, floor)
    else:
        found = _multiply_quantized(x, weight, scales, block, stored, bound, floor)
    return found if bias is None else found + bias


def _multiply_quantized(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    block: Sequence[int],
    stored: Tensor | None,
    bound: float | None,
    floor: float,
) -> Tensor:
    activations, group = Activations(static=stored is not None, bound=bound, floor=floor), (block[0], block[1])
    name = way(x.device, x.dtype, weight.shape, group, activations.static)
    rows = x.reshape(-1, x.shape[-1])
    if not len(rows):
        return _result_of(x, weight)
    own, own_scales = activations.quantize(rows, group, stored)
    result = MULTIPLICATIONS[name](own, own_scales, weight, scales, group, x.dtype)
    return result.view(*x.shape[:-1], len(weight))


def _result_of(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    """Room for a product; with further arguments, what torch.compile asks of its shape and dtype."""
    return x.new_empty((*x.shape[:-1], len(weight)))


_operation = custom_op(
    "quantdock_fp8::multiply_quantized",
    _multiply_quantized,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor scales, int[] block, Tensor? stored, float? bound, float floor) -> Tensor",
)
_operation.register_fake(_result_of)
