"""What torchao computes of weights whose groups lie within rows, by quantdock's operations: the same bits, sooner.

Nothing is taken for granted about the torchao that is installed: ``arithmetic_of`` gives these functions for a config
only after a trial, in which torchao and they make the same of all kinds of values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantdock import ops

Arithmetic = Callable[[Tensor, int, Mapping[str, Tensor]], bool]
"""``(matrix, group, parts)``: matrix ``[rows, columns]`` on CPU, elements of a row that share a scale, and the parts to
write, by torchao's names. Returns whether they are torchao's; where it is False, torchao has to make them."""

Reference = Callable[[Tensor], Mapping[str, Tensor]]
"""torchao itself: from a matrix to its parts."""

WORKING_PER_SCALE = 48
"""Bytes that each scale takes on the way: the extremes of its group, and what becomes of them; measured."""

_LARGEST_GROUP = 1 << 16
"""No larger group is tried out, as that would take longer than it saves."""


def int8(matrix: Tensor, group: int, parts: Mapping[str, Tensor]) -> bool:
    """``Int8Tensor.from_hp``, symmetric.

    Infinite scales are left to torchao: codes come from NaNs there, which processors convert in their own ways.
    """
    smallest, largest = torch.empty(2, *parts["scale"].shape, dtype=matrix.dtype, device=matrix.device)
    ops.group_extremes(matrix, group=group, smallest=smallest, largest=largest)
    found = ops.parameters.symmetric(
        smallest,
        largest,
        lowest=-128,
        highest=127,
        least=torch.finfo(torch.float32).eps,  # whatever the dtype, torchao says
        dtype=torch.float32,
    )
    assert found.zeros is not None
    if not found.stored.isfinite().all():
        return False
    ops.quantize_affine(
        matrix,
        group=group,
        scales=found.scales,
        divide=found.divide,
        lowest=found.lowest,
        highest=found.highest,
        codes=parts["qdata"],
    )
    parts["scale"].copy_(found.stored)
    parts["zero_point"].copy_(found.zeros)
    return True


def float8(matrix: Tensor, group: int, parts: Mapping[str, Tensor]) -> bool:
    """``Float8Tensor.from_hp`` without bounds for its values.

    Groups of zeros become NaNs in torchao, whose signs processors choose; they are left to it, and infinite ones.
    """
    found = ops.fp8_scales(ops.block_magnitudes(matrix, block=(1, group)), rule="quotient")
    if not (found.scales.isfinite() & (found.scales > 0)).all():
        return False
    ops.encode_fp8(matrix, scales=found.scales, block=(1, group), divide=found.divide, codes=parts["qdata"])
    parts["scale"].copy_(found.stored)
    return True


_KNOWN: Mapping[str, tuple[Arithmetic, Mapping[str, torch.dtype]]] = {
    "Int8Tensor": (int8, {"qdata": torch.int8, "scale": torch.float32, "zero_point": torch.int8}),
    "Float8Tensor": (float8, {"qdata": torch.float8_e4m3fn, "scale": torch.float32}),
}


def arithmetic_of(kind: str, group: int, dtype: torch.dtype, reference: Reference) -> Arithmetic | None:
    """The function that gives torchao's bits, if there is one.

    Args:
        kind: name of torchao's class.
        group: elements of a row that share a scale.
        dtype: of weights.
        reference: torchao, with the config in question.
    """
    function, dtypes = _KNOWN.get(kind, (None, {}))
    if function is None or dtype not in (torch.float32, torch.bfloat16, torch.float16) or group > _LARGEST_GROUP:
        return None
    matrix = ops.trial_matrix(group, dtype)
    expected = reference(matrix)
    if {name: part.dtype for name, part in expected.items()} != dtypes:
        return None
    found = {
        name: torch.empty(matrix.shape if name == "qdata" else (len(matrix), 1), dtype=dtypes[name], device="cpu")
        for name in dtypes
    }
    same = function(matrix, group, found) and all(
        torch.equal(found[name].view(torch.uint8), part.view(torch.uint8)) for name, part in expected.items()
    )
    return function if same else None
