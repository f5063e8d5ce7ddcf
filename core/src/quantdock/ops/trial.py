"""Values to find out with whether a library computes what an operation does."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 24


def trial_matrix(columns: int, dtype: torch.dtype) -> Tensor:
    """Numbers of all usual sizes, of both signs and of one, halves of integers, and zeros: always the same.

    Another formula, another dtype on the way or another rounding shows in what is made of them. No row is all zeros and
    nothing is infinite or a NaN: what becomes of those, a quantizer has to look out for itself.

    Returns:
        ``[24, columns]`` on CPU
    """
    # Dtypes and devices are spelled out: torch's defaults are the user's to change.
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(_ROWS, columns, generator=generator, dtype=torch.float64, device="cpu")
    exponents = torch.linspace(-10, 10, _ROWS, dtype=torch.float64, device="cpu")
    matrix *= torch.exp2(exponents)[:, None]
    matrix[3] = matrix[3].abs()
    matrix[4] = -matrix[4].abs()
    halves = torch.randint(-255, 256, (4, columns), generator=generator, dtype=torch.int64, device="cpu")
    matrix[5:9] = halves.double() / 2
    matrix[5:9, 0] = 127.5
    matrix[9, 1:] = 0.0
    return matrix.to(dtype)
