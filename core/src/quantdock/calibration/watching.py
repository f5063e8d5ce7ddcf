"""Experts in one parameter that tell what they are fed: a tensor in its place, which sees every multiplication."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from quantdock.errors import CalibrationError
from quantdock.linears.stack import Stack


def watched(weight: Tensor, see: Callable[[int, Tensor], None], name: str) -> Stack:
    """What a module computes the same with as with its parameter.

    Args:
        weight: ``[experts, outputs, inputs]``.
        see: called with the number of an expert and ``[rows, inputs]``.
        name: of the parameter, for messages.

    Raises:
        CalibrationError: later, if something else is done with it than multiplying with one expert at a time.
    """
    return Stack(_Watched(weight=weight, see=see, name=name), weight.dtype, weight.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class _WatchedMatrix:
    weight: Tensor
    see: Callable[[Tensor], None]
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.weight.shape
        return outputs, inputs

    def decode(self, dtype: torch.dtype) -> Tensor:
        raise CalibrationError(
            f"{self.name}: its module does something else than multiply with one expert at a time, so what experts are "
            "fed isn't known; let it do so (transformers' experts_implementation 'eager' or 'grouped_mm'), or leave "
            "this parameter out"
        )

    def multiply(self, x: Tensor, *, plainly: bool = False) -> Tensor:
        self.see(x.reshape(-1, x.shape[-1]))
        return nn.functional.linear(x, self.weight)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Watched:
    weight: Tensor
    see: Callable[[int, Tensor], None]
    name: str

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, outputs, inputs = self.weight.shape
        return experts, outputs, inputs

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def matrix(self, index: int) -> _WatchedMatrix:
        return _WatchedMatrix(weight=self.weight[index], see=partial(self.see, index), name=self.name)
