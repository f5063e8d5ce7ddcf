"""Property: quantdock's operations stand in for quanto's arithmetic only where they make the same bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimum import quanto
from torch import Tensor, nn

from quantdock import Parameter, TensorSpec
from quantdock_quanto.arithmetic import arithmetic_of, float8, int8
from quantdock_quanto.config import QuantoConfig
from quantdock_quanto.quantizer import QuantoQuantizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TYPES = {"int8": quanto.qint8, "float8": quanto.qfloat8}
QUANTIZERS = {weights: QuantoQuantizer(QuantoConfig(weights=weights)) for weights in TYPES}
EDGES = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -3e-45, 6e-8, 3e38, -65504.0, 0.5, 127.5, 448.0]


def parameter(matrix: Tensor) -> Parameter:
    return Parameter(name="a.weight", spec=TensorSpec.of(matrix), module_type=nn.Linear, role="linear")


def by_quanto(weights: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As ``quantize`` and ``freeze`` make it of a model."""
    model = nn.Sequential(nn.Linear(*reversed(matrix.shape), bias=False, dtype=matrix.dtype))
    model[0].weight = nn.Parameter(matrix)
    quanto.quantize(model, weights=TYPES[weights])
    quanto.freeze(model)
    made: Any = model[0].weight
    return made._data, made._scale.reshape(len(matrix), 1)


@pytest.mark.parametrize("weights", TYPES)
@settings(deadline=None, max_examples=120)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(2, 12),
    columns=st.integers(1, 70),
    exponent=st.integers(-45, 38),
    edges=st.lists(st.tuples(st.sampled_from(EDGES), st.integers(0, 10**6)), max_size=6),
    zeros=st.integers(-1, 11),
    halves=st.booleans(),
    seed=st.integers(0, 99),
    cut=st.integers(0, 12),
)
def test_every_matrix_has_quantos_bits(
    weights: str,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    exponent: int,
    edges: list[tuple[float, int]],
    zeros: int,
    halves: bool,
    seed: int,
    cut: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 10.0**exponent
    if halves:
        matrix = torch.randint(-255, 256, matrix.shape, generator=generator) / 2
    for value, place in edges:
        matrix.view(-1)[place % matrix.numel()] = value
    if zeros >= 0:
        matrix[zeros % rows] = 0.0
    matrix = matrix.to(dtype)
    quantizer, described, before = QUANTIZERS[weights], parameter(matrix), matrix.clone()
    parts = quantizer.begin_slices(described, torch.device("cpu"))
    cut = min(cut, rows - 1)
    for start, stop in [(cut, rows), (0, cut)] if cut else [(0, rows)]:
        quantizer.quantize_slice(described, matrix[start:stop], start, parts)
    codes, scale = by_quanto(weights, matrix)
    assert torch.equal(bits(parts["weight._data"]), bits(codes))
    assert torch.equal(bits(parts["weight._scale"]), bits(scale))
    assert torch.equal(matrix.view(torch.uint8), before.view(torch.uint8))


def bits(tensor: Tensor) -> Tensor:
    """Without those of a NaN: which one it is changes in torch with the number of rows."""
    if tensor.dtype == torch.float8_e4m3fn:
        codes = tensor.view(torch.uint8)
        return codes.masked_fill(codes == 0xFF, 0x7F)
    if tensor.is_floating_point():
        tensor = tensor.masked_fill(tensor.isnan(), math.nan)
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", TYPES)
def test_weights_do_not_need_quanto(weights: str, dtype: torch.dtype) -> None:
    """Otherwise they are quantized slowly, and nobody would notice."""
    assert QUANTIZERS[weights]._arithmetic(dtype) is {"int8": int8, "float8": float8}[weights]


@pytest.mark.parametrize("change", [0, 1])
@pytest.mark.parametrize("weights", TYPES)
def test_another_quanto_is_noticed(weights: str, change: int) -> None:
    """One whose numbers are a bit off."""

    def reference(matrix: Tensor) -> tuple[Tensor, Tensor]:
        made = by_quanto(weights, matrix)
        made[change].view(torch.uint8)[7] ^= 1
        return made

    assert arithmetic_of(TYPES[weights].dtype, torch.bfloat16, reference) is None
