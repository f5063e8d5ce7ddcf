"""AWQ's two searches, as functions of weights and of what their inputs are like.

The algorithm and its constants are those of AutoAWQ 0.2.9 (``AwqQuantizer``; Lin et al., 2023). That measures a
candidate by what samples give; here it is the same squared error of each layer's output, from the second moments of all
inputs, ``|x (W' - W)^T|^2 = tr((W' - W) X^T X (W' - W)^T)``, so that no sample has to be kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quantdock_awq import rounding

GRID = 20
"""Steps from scales of one kind to the other, and from a whole range to none."""
MOST_SHRUNK = 0.5

_STEP = 1 << 20  # weights at a time, so that the temporaries stay small
WORKING_BYTES = 48 * _STEP
"""What the functions here allocate at the most, beside what they return and take: a dozen temporaries in float32."""


class Inputs:
    """What the inputs of layers are like: sums over all rows that were seen.

    Args:
        features: how many inputs a row has.
        device: of the rows.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.rows = 0
        self.magnitudes = torch.zeros(features, dtype=torch.float32, device=device)
        """Sums of ``|x|``, ``[in]``."""
        self.moments = torch.zeros(features, features, dtype=torch.float32, device=device)
        """Sums of ``x x^T``, ``[in, in]``."""

    def add(self, x: Tensor) -> None:
        """Count rows in, ``[rows, in]``."""
        rows = x.detach().float()
        self.rows += len(rows)
        self.magnitudes += rows.abs().sum(0)
        self.moments.addmm_(rows.t(), rows)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.magnitudes).all() and torch.isfinite(self.moments).all())


def search_scales(
    weights: Sequence[Tensor], inputs: Inputs, size: int, *, zero_point: bool, channels: Tensor | None = None
) -> Tensor:
    """The scales of inputs with which a group of layers that share them loses least by rounding.

    Candidates are ``mean|x|^r / (mean|w|^(1 - r) + 1e-4)`` for 20 ratios ``r``, where ``w`` is relative to the largest
    of its group, brought to a geometric middle of 1; and none at all.

    Args:
        weights: ``[out, in]`` each, floating.
        inputs: of all of them.
        size: inputs per group.
        zero_point: whether groups have zero points.
        channels: int64 ``[in]``; inputs with the same number have the same scale. Each its own if not given.

    Returns:
        float32 ``[in]``: what to multiply the weights with, and to divide their inputs by.
    """
    x, w = inputs.magnitudes / max(1, inputs.rows), _relative(weights, size)
    if channels is not None:
        channels = channels.to(x.device)
        x, w = _shared(x, channels), _shared(w, channels)
    best = torch.ones_like(x)
    least = sum(scaled_loss(weight, best, inputs.moments, size, zero_point=zero_point) for weight in weights)
    for step in range(GRID):
        ratio = step / GRID
        scales = (x.pow(ratio) / (w.pow(1 - ratio) + 1e-4)).clamp_(min=1e-4)
        scales /= (scales.max() * scales.min()).sqrt()
        scales[~torch.isfinite(scales)] = 1
        loss = sum(scaled_loss(weight, scales, inputs.moments, size, zero_point=zero_point) for weight in weights)
        if loss < least:
            best, least = scales, loss
    return best


def scaled_loss(weight: Tensor, scales: Tensor, moments: Tensor, size: int, *, zero_point: bool) -> float:
    """Squared error of a layer's output, summed, when its weight is rounded between multiplying and dividing.

    Args:
        weight: ``[out, in]``, floating.
        scales: float32 ``[in]``.
        moments: of the inputs, float32 ``[in, in]``.
        size: inputs per group.
        zero_point: whether groups have zero points.
    """
    total = 0.0
    for part in _pieces(weight):
        rows = _rows(weight, part)
        rounded = rounding.round_to_nearest(rows * scales, size, zero_point=zero_point)
        error = rounded.dequantized().div_(scales).sub_(rows)
        total += (error @ moments).mul_(error).sum().item()
    return total if math.isfinite(total) else math.inf


def search_limits(weight: Tensor, moments: Tensor, size: int, *, zero_point: bool) -> Tensor:
    """Where to cut off the groups of a weight, so that their part of the output loses least by rounding.

    Candidates are ``max|w| * (1 - i / 20)`` for ``i`` from 0 to 9.

    Args:
        weight: float32 ``[out, in]``.
        moments: of the inputs within groups, float32 ``[groups, size, size]``.
        size: inputs per group.
        zero_point: whether groups have zero points.

    Returns:
        float32 ``[out, groups]``, for ``rounding.round_within``.
    """
    largest = weight.view(len(weight), -1, size).abs().amax(2)
    best, least = largest.clone(), torch.full_like(largest, math.inf)
    for step in range(int(MOST_SHRUNK * GRID)):
        limit = largest * (1 - step / GRID)
        error = rounding.round_within(weight, size, limit, zero_point=zero_point).dequantized() - weight
        grouped = error.view(len(weight), -1, size).transpose(0, 1)
        loss = torch.bmm(grouped, moments).mul_(grouped).sum(2).t()
        better = loss < least
        least, best = torch.where(better, loss, least), torch.where(better, limit, best)
    return best


def round_clipped(weight: Tensor, moments: Tensor, size: int, *, zero_point: bool) -> rounding.Rounded:
    """A weight, rounded within the limits that ``search_limits`` finds; the arguments are the same."""
    parts = []
    for part in _pieces(weight):
        rows = _rows(weight, part)
        limits = search_limits(rows, moments, size, zero_point=zero_point)
        parts.append(rounding.round_within(rows, size, limits, zero_point=zero_point))
    return rounding.Rounded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def within_groups(moments: Tensor, scales: Tensor, size: int) -> Tensor:
    """The moments of inputs that are divided by ``scales``, within groups: ``[groups, size, size]``."""
    groups = len(scales) // size
    blocks = moments.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    divisors = scales.view(groups, size)
    return (blocks / divisors[:, :, None] / divisors[:, None]).contiguous()


def _relative(weights: Sequence[Tensor], size: int) -> Tensor:
    """Mean over all outputs of ``|w|`` relative to the largest in its group, ``[in]``."""
    total, rows = weights[0].new_zeros(weights[0].shape[1], dtype=torch.float32), 0
    for weight in weights:
        for part in _pieces(weight):
            grouped = _rows(weight, part).abs()
            grouped = grouped.view(len(grouped), -1, size)
            total += (grouped / (grouped.amax(2, keepdim=True) + 1e-6)).sum(0).view(-1)
            rows += len(grouped)
    return total / rows


def _shared(values: Tensor, channels: Tensor) -> Tensor:
    """The mean over the inputs that are the same channel, for each input."""
    sums = values.new_zeros(int(channels.max()) + 1).index_add_(0, channels, values)
    return (sums / torch.bincount(channels))[channels]


def _rows(weight: Tensor, part: slice) -> Tensor:
    return weight[part].float().contiguous()


def _pieces(weight: Tensor) -> Iterator[slice]:
    step = max(1, _STEP // weight.shape[1])
    for start in range(0, len(weight), step):
        yield slice(start, min(start + step, len(weight)))
