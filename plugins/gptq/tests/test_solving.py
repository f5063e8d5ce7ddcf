"""The algorithm: against the paper's, written out column by column, and against rounding to nearest."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from quantdock import CalibrationError
from quantdock_gptq import rounding, solving
from quantdock_gptq.config import GPTQConfig

OUTPUTS, INPUTS = 32, 96


def activations(rows: int = 400, *, seed: int = 0) -> Tensor:
    """Rows whose features are correlated and of different sizes, as those of a model are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator) / INPUTS**0.5 + torch.eye(INPUTS)
    sizes = torch.logspace(-1, 1, INPUTS)[torch.randperm(INPUTS, generator=generator)]
    return torch.randn(rows, INPUTS, generator=generator) @ mixing * sizes


def weights(*, seed: int = 1) -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(seed))


def solved(weight: Tensor, rows: Tensor, config: GPTQConfig) -> solving.Solution:
    settings, search = config.of(""), config.search("")
    assert settings is not None
    hessian = solving.Hessian(weight.shape[1], weight.device)
    for part in rows.split(123):
        hessian.add(part)
    return solving.solve(weight, solving.prepare(hessian.mean(), settings, search), settings, search)


def dequantized(solution: solving.Solution) -> Tensor:
    index = solution.g_idx.long()
    return (solution.scales.float()[index] * (solution.codes.float() - solution.zeros.float()[index])).t()


def rounded(weight: Tensor, config: GPTQConfig) -> Tensor:
    settings = config.of("")
    assert settings is not None
    codes, zeros, scales = rounding._quantize(weight, settings)
    index = torch.arange(weight.shape[1]) // settings.groups(weight.shape[1])[0]
    return scales.float()[:, index] * (codes.float() - zeros.float()[:, index])


def by_the_paper(weight: Tensor, rows: Tensor, config: GPTQConfig) -> tuple[Tensor, Tensor]:
    """Codes ``[out, in]`` and the group of each input: one column after another, each error passed on at once, in
    double precision."""
    work, rows = weight.double().clone(), rows.double()
    outputs, inputs = work.shape
    size = inputs if config.group_size == -1 else config.group_size
    top = 2**config.bits - 1
    hessian = 2 * rows.t() @ rows / len(rows)
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    work[:, dead] = 0
    diagonal = hessian.diagonal().tolist()
    order = list(range(inputs))
    if config.desc_act:
        order.sort(key=lambda column: -diagonal[column])
    elif config.search("").act_group_aware:
        order.sort(
            key=lambda column: (-max(diagonal[column // size * size :][:size]), column // size, -diagonal[column])
        )
    hessian = hessian[order][:, order]
    hessian += config.search("").damp_percent * hessian.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)

    def found(columns: list[int]) -> tuple[Tensor, Tensor]:
        values = work[:, columns]
        if config.sym:
            scale = 2 * values.abs().amax(1) / top
        else:
            scale = (values.amax(1).clamp(min=0) - values.amin(1).clamp(max=0)) / top
        scale = scale.half().double()
        scale[scale == 0] = 1
        zero = (
            (-values.amin(1).clamp(max=0) / scale).round() if not config.sym else torch.full_like(scale, (top + 1) / 2)
        )
        return scale, zero

    static = [found(list(range(start, start + size))) for start in range(0, inputs, size)]
    codes = torch.empty(outputs, inputs, dtype=torch.uint8)
    group_of = torch.empty(inputs, dtype=torch.int32)
    scale = zero = torch.empty(0)
    for place, column in enumerate(order):
        if config.static_groups:
            scale, zero = static[column // size]
        elif place % size == 0:
            scale, zero = found(order[place : place + size])
        group_of[column] = place // size if config.desc_act and not config.static_groups else column // size
        code = ((work[:, column] / scale).round() + zero).clamp(0, top)
        codes[:, column] = code.to(torch.uint8)
        error = (work[:, column] - scale * (code - zero)) / factor[place, place]
        for later in range(place + 1, inputs):
            work[:, order[later]] -= error * factor[place, later]
    return codes, group_of


CONFIGS: list[dict[str, Any]] = [
    {"sym": True, "act_group_aware": False},
    {"sym": False, "act_group_aware": False},
    {"sym": True, "desc_act": True},
    {"sym": False, "desc_act": True},
    {"sym": True, "desc_act": True, "static_groups": True},
    {"sym": False, "static_groups": True},
    {"sym": True, "act_group_aware": True},
    {"sym": True, "group_size": -1, "act_group_aware": False},
    {"sym": False, "group_size": -1, "desc_act": True},
    {"sym": True, "group_size": -1},
    {"sym": True, "group_size": 8, "desc_act": True},
    {"bits": 2, "sym": False, "desc_act": True},
    {"bits": 3, "sym": True},
    {"bits": 8, "sym": True, "desc_act": True},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=lambda fields: "-".join(f"{k}={v}" for k, v in fields.items()))
def test_the_papers_algorithm(fields: dict[str, Any]) -> None:
    config = GPTQConfig(**{"group_size": 32} | fields)
    rows, weight = activations(), weights()
    rows[:, 17] = 0
    solution = solved(weight, rows, config)
    codes, group_of = by_the_paper(weight, rows, config)
    assert torch.equal(solution.g_idx, group_of)
    # Single precision may fall on the other side of a half, or of a half of a scale's last bit.
    assert (solution.codes.t() != codes).float().mean() < 0.01


@pytest.mark.parametrize("fields", CONFIGS, ids=lambda fields: "-".join(f"{k}={v}" for k, v in fields.items()))
def test_outputs_change_less_than_by_rounding(fields: dict[str, Any]) -> None:
    config = GPTQConfig(**{"group_size": 32} | fields)
    weight = weights()
    rows, unseen = activations(800)[:400], activations(800)[400:]
    found, nearest = dequantized(solved(weight, rows, config)), rounded(weight, config)
    for inputs, factor in ((rows, 0.8), (unseen, 0.95)):
        errors = [float((inputs @ (other - weight).t()).square().mean()) for other in (found, nearest)]
        assert errors[0] < factor * errors[1]


def test_inputs_without_activation_get_the_code_of_zero() -> None:
    rows = activations()
    rows[:, :40] = 0
    solution = solved(weights(), rows, GPTQConfig(group_size=32))
    assert bool((solution.codes[:40] == 8).all())
    assert bool((solution.scales[0] == 1).all())  # nothing but zeros: any scale will do


def test_a_wider_layer_than_one_piece() -> None:
    """Errors reach the inputs behind the piece of 128 and the group that they are in."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(900, 320, generator=generator) @ torch.randn(320, 320, generator=generator)
    weight = torch.randn(32, 320, generator=generator)
    for size in (64, 160, 320):
        config = GPTQConfig(group_size=size, desc_act=True)
        codes, group_of = by_the_paper(weight, rows, config)
        solution = solved(weight, rows, config)
        assert torch.equal(solution.g_idx, group_of)
        assert (solution.codes.t() != codes).float().mean() < 0.03


def test_damping_grows_until_it_is_enough() -> None:
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 1.04  # no Hessian, but next to one; not positive definite below a damping of 0.04
    before, order = hessian.clone(), torch.tensor([2, 0, 3, 1])
    factor, damping = solving.inverse_factor(hessian, hessian.diagonal(), order, 0.01)
    assert damping == pytest.approx(0.05)
    assert torch.equal(hessian, before)
    damped = hessian[order][:, order] + damping * torch.eye(4)
    assert torch.allclose(factor.t() @ factor @ damped, torch.eye(4), atol=1e-4)


def test_a_hessian_that_no_damping_helps() -> None:
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 3.0
    with pytest.raises(
        CalibrationError, match=r"can't be inverted, damped by 0\.05 up to 1 of its mean diagonal \(1\)"
    ):
        solving.inverse_factor(hessian, hessian.diagonal(), torch.arange(4), 0.05)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_activations_that_are_no_numbers(value: float) -> None:
    hessian = solving.Hessian(4, torch.device("cpu"))
    hessian.add(torch.tensor([[1.0, value, 0.0, 0.0]]))
    with pytest.raises(CalibrationError, match="infinite or not numbers"):
        hessian.mean()


def test_fewer_rows_than_inputs_are_enough_with_damping() -> None:
    solution = solved(weights(), activations(8), GPTQConfig(group_size=32, desc_act=True))
    assert bool(torch.isfinite(dequantized(solution)).all())


def test_a_module_of_its_own_settings() -> None:
    config = GPTQConfig(damp_percent=0.01, dynamic={"special": {"damp_percent": 0.3, "desc_act": True}})
    assert config.search("special").damp_percent == 0.3
    assert not config.search("special").act_group_aware  # its inputs are ordered otherwise
    assert dataclasses.asdict(config.search("other")) == {
        "damp_percent": 0.01,
        "static_groups": False,
        "act_group_aware": True,
    }
