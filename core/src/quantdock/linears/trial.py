"""A small weight, for kernels to prove themselves with."""

from __future__ import annotations

import torch
from torch import Tensor

_SIZE = 64


class Trial:
    """A weight of 4 bits in groups of 64 inputs, the same each time, whose scales are exact in 16 bits of any kind.

    Args:
        device: where it is.
        inputs: a multiple of 64.
        outputs: any number.
        symmetric: whether all zero points are 8.
    """

    bits = 4

    def __init__(self, device: torch.device, *, inputs: int, outputs: int, symmetric: bool = False) -> None:
        self.inputs, self.outputs = inputs, outputs
        generator, groups = torch.Generator().manual_seed(0), inputs // _SIZE
        zeros = torch.randint(16, (groups, outputs), generator=generator, dtype=torch.uint8)
        self._zeros = (torch.full_like(zeros, 8) if symmetric else zeros).to(device)
        self._codes = torch.randint(16, (inputs, outputs), generator=generator, dtype=torch.uint8).to(device)
        # Of seven bits each, as bfloat16 and float16 have.
        scales = torch.randint(64, 128, (groups, outputs), generator=generator) / 1024
        self._scales = scales.to(device, torch.float16)

    def codes(self, part: slice) -> Tensor:
        return self._codes[:, part]

    def scales(self, part: slice) -> Tensor:
        return self._scales[:, part]

    def zeros(self, part: slice) -> Tensor:
        return self._zeros[:, part]

    def grouping(self) -> int:
        return _SIZE
