"""One 16-bit float dtype to the other."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from quantdock_kernels._arguments import check, check_floats
from quantdock_kernels._library import function

OTHER = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}


def cast(flat: Tensor, *, out: Tensor, instruction_set: str | None = None) -> None:
    """See ``quantdock.ops.cast``.

    Args:
        flat: bfloat16 or float16 ``[count]``; read.
        out: the other one, ``[count]``; written.
        instruction_set: one of ``instruction_sets()``, instead of ``instruction_set()``.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    dtype = check_floats("flat", flat, 1)
    if flat.dtype not in OTHER:
        raise TypeError(f"flat is {flat.dtype}, expected one of {', '.join(map(str, OTHER))}")
    call = function("cast", instruction_set, c_void_p, c_int, c_int64, c_void_p)
    call(flat.data_ptr(), dtype, flat.numel(), check("out", out, OTHER[flat.dtype], flat.numel()))
