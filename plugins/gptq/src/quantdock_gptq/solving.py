"""The GPTQ algorithm: codes one input at a time, the error of each made up for by the inputs that are still to come.

After Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022); group-aware order after Gafni, Karnieli and Hanani, "Dual Precision Quantization" (2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantdock import CalibrationError
from quantdock_gptq import rounding
from quantdock_gptq.config import Search, Settings

_MOST = 128  # inputs whose errors are passed on one by one; to all that follow, they are passed on together
_INCREMENT = 0.01  # of damping, until the Hessian can be inverted


class Hessian:
    """Sums up ``x x^T`` over the rows of activations, in float32.

    Args:
        inputs: features of a row.
        device: where activations are.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.rows = 0
        self._scaled = False
        self._sum = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)

    def add(self, activations: Tensor) -> None:
        """``[rows, inputs]``, any floating dtype; before anybody has asked for the mean."""
        assert not self._scaled
        values = activations.float()
        self._sum.addmm_(values.t(), values)
        self.rows += len(values)

    def mean(self) -> Tensor:
        """``2 / rows * sum``, ``[inputs, inputs]``; of at least one row. No copy: nothing else is as large.

        Raises:
            CalibrationError: activations were infinite or not numbers.
        """
        if self._scaled:
            return self._sum
        if not bool(torch.isfinite(self._sum).all()):
            raise CalibrationError(
                "activations on the calibration data are infinite or not numbers; load in another dtype (bfloat16 or "
                "float32), or look for what is wrong with the data or the checkpoint"
            )
        self._scaled = True
        return self._sum.mul_(2 / self.rows)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A Hessian, ready for any number of weights that are fed the same activations."""

    order: Tensor
    """int64 ``[inputs]``: in which order inputs are quantized."""
    dead: Tensor
    """bool ``[inputs]``: those that are always zero."""
    factor: Tensor
    """float32 ``[inputs, inputs]``: the upper Cholesky factor of the inverse, in that order."""
    damping: float
    """What it took."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A quantized weight."""

    codes: Tensor
    """uint8 ``[inputs, outputs]``."""
    zeros: Tensor
    """uint8 ``[groups, outputs]``."""
    scales: Tensor
    """``[groups, outputs]``, as they are stored."""
    g_idx: Tensor
    """int32 ``[inputs]``."""


def prepare(hessian: Tensor, settings: Settings, search: Search) -> Prepared:
    """Order, damp and invert a Hessian.

    Args:
        hessian: float32 ``[inputs, inputs]``; not changed.
        settings: group size, and whether inputs are ordered by their activations.
        search: damping, and how they are ordered otherwise.

    Raises:
        CalibrationError: it can't be inverted, however much it is damped.
    """
    dead = hessian.diagonal() == 0
    diagonal = hessian.diagonal().masked_fill(dead, 1)
    order = _order(diagonal, settings, search)
    factor, damping = inverse_factor(hessian, diagonal, order, search.damp_percent)
    return Prepared(order=order, dead=dead, factor=factor, damping=damping)


def inverse_factor(hessian: Tensor, diagonal: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the damped inverse, and the damping that it took.

    Args:
        hessian: ``[inputs, inputs]``, symmetric; not changed. At most two matrices as large are there beside it.
        diagonal: ``[inputs]``, which takes the place of the Hessian's.
        order: int64 ``[inputs]``: of the rows and columns of what is inverted.
        damping: share of the mean diagonal that is added to it, at the least.

    Raises:
        CalibrationError: no damping below 1 is enough.
    """
    mean, tried = diagonal.mean(), damping
    while tried < 1:
        matrix = hessian.index_select(0, order)
        matrix = matrix.index_select(1, order)
        matrix.diagonal().copy_((diagonal + tried * mean)[order])
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            del matrix
            matrix = torch.cholesky_inverse(factor)
            del factor
            factor, failed = torch.linalg.cholesky_ex(matrix, upper=True)
            if not failed and bool(torch.isfinite(factor).all()):
                return factor, tried
        del matrix, factor
        tried += _INCREMENT
    raise CalibrationError(
        f"the Hessian of the activations can't be inverted, damped by {damping:g} up to 1 of its mean diagonal "
        f"({float(mean):g}); take more or other calibration data, or leave this layer out"
    )


def solve(weight: Tensor, prepared: Prepared, settings: Settings, search: Search) -> Solution:
    """Quantize a weight so that what it makes of the activations changes little.

    Args:
        weight: ``[outputs, inputs]``, floating, any strides; not changed.
        prepared: the activations' Hessian.
        settings: bits, groups, symmetry.
        search: as ``prepare`` had it.
    """
    outputs, inputs = weight.shape
    size, groups = settings.groups(inputs)
    rows = weight.t().to(torch.float32, copy=True).masked_fill_(prepared.dead[:, None], 0)
    own = torch.arange(inputs, dtype=torch.int64, device=weight.device) // size
    fixed = search.static_groups
    scales = torch.empty(groups, outputs, dtype=rounding.SCALE_DTYPE, device=weight.device)
    zeros = torch.empty(groups, outputs, dtype=torch.float32, device=weight.device)
    if fixed:
        scales[:], zeros[:] = _of_groups(rows, groups, settings)
    # By activations alone, groups are made in that order; otherwise inputs stay in the groups that they are in.
    group_of = own if settings.desc_act and not fixed else own[prepared.order]
    rows = rows[prepared.order]
    codes = torch.empty(inputs, outputs, dtype=torch.uint8, device=weight.device)
    for start, stop in _pieces(inputs, _MOST if fixed else size):
        if not fixed and start % size == 0:
            group = int(group_of[start])
            scales[group], zeros[group] = rounding.scales_and_zeros(rows[start : start + size].t(), settings)
        within = prepared.factor[start:stop, start:stop]
        chosen = group_of[start:stop]
        errors = _quantize(rows[start:stop], within, scales[chosen].float(), zeros[chosen], settings, codes[start:stop])
        rows[stop:].addmm_(prepared.factor[start:stop, stop:].t(), errors, alpha=-1)
    g_idx = torch.empty_like(own)
    g_idx[prepared.order] = group_of
    in_place = torch.empty_like(codes)
    in_place[prepared.order] = codes
    return Solution(codes=in_place, zeros=zeros.to(torch.uint8), scales=scales, g_idx=g_idx.to(torch.int32))


def _quantize(rows: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, settings: Settings, codes: Tensor) -> Tensor:
    """Codes of a few inputs, each of which passes its error on to the next ones; returns the errors.

    Args:
        rows: float32 ``[n, outputs]``; overwritten.
        factor: float32 ``[n, n]``.
        scales, zeros: float32 ``[n, outputs]``.
        settings: bits.
        codes: uint8 ``[n, outputs]``; written.
    """
    top = 2**settings.bits - 1
    errors = torch.empty_like(rows)
    diagonal = factor.diagonal().tolist()
    for index, row in enumerate(rows):
        code = torch.div(row, scales[index]).round_().add_(zeros[index]).clamp_(0, top)
        codes[index] = code
        torch.sub(row, code.sub_(zeros[index]).mul_(scales[index]), out=errors[index])
        errors[index].div_(diagonal[index])
        rows[index + 1 :].addr_(factor[index, index + 1 :], errors[index], alpha=-1)
    return errors


def _order(diagonal: Tensor, settings: Settings, search: Search) -> Tensor:
    inputs = len(diagonal)
    if settings.desc_act:
        return diagonal.argsort(descending=True, stable=True)
    if not search.act_group_aware:
        return torch.arange(inputs, device=diagonal.device)
    size, groups = settings.groups(inputs)
    by_group = diagonal.view(groups, size)
    within = by_group.argsort(dim=1, descending=True, stable=True)
    first = by_group.amax(1).argsort(descending=True, stable=True)
    return (within + torch.arange(groups, device=diagonal.device)[:, None] * size)[first].flatten()


def _of_groups(rows: Tensor, groups: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """Scales and zero points ``[groups, outputs]`` of ``[inputs, outputs]``, inputs in their own order."""
    return rounding.scales_and_zeros(rows.view(groups, -1, rows.shape[1]).transpose(1, 2), settings)


def _pieces(inputs: int, size: int) -> list[tuple[int, int]]:
    """Up to ``_MOST`` inputs at a time, none of them across the border of a group."""
    step = min(size, _MOST)
    return [
        (start, min(start + step, group + size, inputs))
        for group in range(0, inputs, size)
        for start in range(group, min(group + size, inputs), step)
    ]
