"""One float dtype to another."""

from __future__ import annotations

import torch
from torch import Tensor

from quantdock.ops.arguments import FLOATS, expect
from quantdock.ops.choice import compiled


def cast(flat: Tensor, *, out: Tensor) -> None:
    """Each element in another dtype: exact, or to nearest with ties to even. Nobody says which NaN a NaN is.

    Args:
        flat: float32, bfloat16 or float16 ``[count]``, contiguous; not changed.
        out: of another one of these dtypes, ``[count]``, on the same device, written.

    Raises:
        ValueError: an argument isn't as described; nothing has been written.
    """
    expected = {flat.dtype, out.dtype} <= set(FLOATS) and flat.dtype != out.dtype
    if not expected:
        raise ValueError(f"flat is {flat.dtype} and out is {out.dtype}, expected two of {', '.join(map(str, FLOATS))}")
    expect("flat", flat, flat.dtype, flat.numel(), device=flat.device)
    expect("out", out, out.dtype, flat.numel(), device=flat.device)
    kernels = compiled(flat)
    # From and to float32, torch is as fast as memory.
    if kernels is not None and torch.float32 not in (flat.dtype, out.dtype):
        kernels.cast(flat, out=out)
    else:
        out.copy_(flat)
