"""The searches, against AWQ's formulas written with samples, in double precision and without shortcuts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantdock_awq import rounding, search


def rounded_value(values: list[float], low: float, high: float, zero_point: bool) -> tuple[list[int], int, float]:
    """Codes, zero point and scale of one group, whose values are counted from ``low`` to ``high``."""
    low, high = torch.tensor(low), torch.tensor(high)
    if zero_point:
        low, high = low.clamp(max=0), high.clamp(min=0)
        exact = (high - low).clamp(min=1e-5) / 15
        zero = min(15, max(0, -round((low / exact).item())))
    else:
        exact, zero = torch.maximum(-low, high).clamp(min=1e-5) / 7, 8
    scale = exact.half().float()
    codes = [min(15, max(0, round((torch.tensor(value) / scale).item()) + zero)) for value in values]
    return codes, zero, scale.item()


@settings(deadline=None, max_examples=30)
@given(
    zero_point=st.booleans(),
    size=st.sampled_from([8, 16, 32]),
    spread=st.sampled_from([1e-8, 1e-3, 1.0, 100.0]),
    shift=st.sampled_from([0.0, 5.0, -5.0]),
    limit=st.sampled_from([None, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_rounding(zero_point: bool, size: int, spread: float, shift: float, limit: float | None, seed: int) -> None:
    weight = spread * (torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) + shift)
    weight[1] = 0
    if limit is None:
        found = rounding.round_to_nearest(weight, size, zero_point=zero_point)
    else:
        limits = torch.full((3, 32 // size), limit * spread)
        found = rounding.round_within(weight, size, limits, zero_point=zero_point)
    for row in range(3):
        for group in range(32 // size):
            values = weight[row, group * size : (group + 1) * size].tolist()
            low, high = min(values), max(values)
            if limit is not None:
                edge = torch.tensor(limit * spread).item()
                low, high = max(low, -edge), min(high, edge)
            codes, zero, scale = rounded_value(values, low, high, zero_point)
            assert found.codes[row, group * size : (group + 1) * size].tolist() == codes
            assert (found.zeros[row, group], found.scales[row, group].item()) == (zero, scale)
            expected = [(code - zero) * scale for code in codes]
            back = found.dequantized()[row, group * size : (group + 1) * size]
            assert torch.allclose(back, torch.tensor(expected), rtol=1e-6, atol=0)


def data(seed: int, inputs: int, rows: int = 200) -> Tensor:
    """Activations with a few channels that stand out, as those of language models have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator)
    x[:, torch.randperm(inputs, generator=generator)[:3]] *= 20
    return x


def observed(x: Tensor) -> search.Inputs:
    inputs = search.Inputs(x.shape[1], x.device)
    for part in x.split(64):
        inputs.add(part)
    return inputs


def candidates(weights: list[Tensor], x: Tensor, size: int) -> list[Tensor]:
    """AWQ's scales for each ratio, and none."""
    magnitude = x.double().abs().mean(0)
    relative = []
    for weight in weights:
        for row in weight.double().abs():
            relative.append(torch.cat([group / (group.max() + 1e-6) for group in row.split(size)]))
    mean = torch.stack(relative).mean(0)
    found = [torch.ones(len(magnitude), dtype=torch.float64)]
    for step in range(20):
        ratio = step / 20
        scales = (magnitude**ratio / (mean ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        found.append(scales / math.sqrt(scales.max().item() * scales.min().item()))
    return found


def output_error(weights: list[Tensor], x: Tensor, scales: Tensor, size: int) -> float:
    total = 0.0
    for weight in weights:
        rounded = rounding.round_to_nearest((weight * scales).float(), size, zero_point=True).dequantized() / scales
        total += (x.double() @ (rounded - weight.double()).t()).square().sum().item()
    return total


@pytest.mark.parametrize("seed", range(4))
def test_the_best_scales_are_found(seed: int) -> None:
    x = data(seed, 64)
    weights = [torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed + rows)) for rows in (16, 24)]
    found = search.search_scales(weights, observed(x), 32, zero_point=True)
    errors = [output_error(weights, x, scales, 32) for scales in candidates(weights, x, 32)]
    assert output_error(weights, x, found.double(), 32) == pytest.approx(min(errors), rel=1e-3)
    assert min(errors) < 0.6 * errors[0]  # rounding to nearest loses so much more where channels stand out


def test_channels_that_are_shared_get_one_scale() -> None:
    """As the values of grouped attention, each of which several inputs of the projection behind it read."""
    x, weight = data(0, 64), torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    channels = torch.arange(64).view(2, 2, 16)[:, :1].expand(2, 2, 16).reshape(-1) % 16 + 16 * (torch.arange(64) // 32)
    found = search.search_scales([weight], observed(x), 32, zero_point=True, channels=channels)
    for channel in range(32):
        assert len(set(found[channels == channel].tolist())) == 1
    assert len(set(found.tolist())) > 8


def test_the_best_limits_are_found() -> None:
    """For each group of each output on its own, by what it adds to the output."""
    x = data(3, 64)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)) ** 3  # long tails
    moments = search.within_groups(observed(x).moments, torch.ones(64), 16)
    found = search.search_limits(weight, moments, 16, zero_point=True)
    for row in range(8):
        for group in range(4):
            part, inputs = weight[row, 16 * group :][:16], x[:, 16 * group :][:, :16].double()
            errors = {}
            for step in range(10):
                limit = part.abs().max() * (1 - step / 20)
                cut = rounding.round_within(part[None], 16, limit.view(1, 1), zero_point=True).dequantized()
                errors[limit.item()] = (inputs @ (cut[0] - part).double()).square().sum().item()
            assert errors[found[row, group].item()] == pytest.approx(min(errors.values()), rel=1e-3)
    assert (found < weight.view(8, 4, 16).abs().amax(2)).any()


def test_moments_of_scaled_inputs() -> None:
    x, scales = data(1, 32), torch.rand(32) + 0.5
    found = search.within_groups(observed(x).moments, scales, 8)
    for group in range(4):
        part = (x / scales)[:, 8 * group :][:, :8].double()
        assert torch.allclose(found[group].double(), part.t() @ part, rtol=1e-4)


def test_what_is_not_finite_is_noticed() -> None:
    x = data(0, 32)
    assert observed(x).is_finite()
    x[3, 4] = math.inf
    assert not observed(x).is_finite()
