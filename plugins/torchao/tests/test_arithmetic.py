"""Property: quantdock's operations stand in for torchao's arithmetic only where they make the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantdock import Parameter, TensorSpec
from quantdock_torchao import TorchAoConfig, tensors, upstream
from quantdock_torchao.arithmetic import arithmetic_of, float8, int8
from quantdock_torchao.presets import FLOAT8, INT8, INT8_DYNAMIC
from quantdock_torchao.quantizer import TorchAoQuantizer, _quantize

ao: Any = upstream.module("torchao.quantization")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUPS = TorchAoConfig(quant_type=ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(8), set_inductor_config=False))
CONFIGS = {"int8": INT8, "int8-dynamic": INT8_DYNAMIC, "int8-groups": GROUPS, "float8": FLOAT8}
QUANTIZERS = {name: TorchAoQuantizer(config) for name, config in CONFIGS.items()}
EDGES = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -3e-45, 6e-8, 3e38, -65504.0, 0.5, 127.5, 448.0]


def parameter(*shape: int, dtype: torch.dtype, role: Any = "linear") -> Parameter:
    kind = nn.Linear if role == "linear" else nn.Module
    return Parameter(name="a.weight", spec=TensorSpec(dtype=dtype, shape=shape), module_type=kind, role=role)


def by_torchao(name: str, matrix: Tensor) -> dict[str, Tensor]:
    config, _ = QUANTIZERS[name]._choice.of(parameter(*matrix.shape, dtype=matrix.dtype))
    return tensors.parts_of("weight", _quantize(config, "weight", matrix, linear=True))


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        assert found[name].dtype == part.dtype
        assert torch.equal(bits(found[name]), bits(part)), name


def bits(tensor: Tensor) -> Tensor:
    """Without those of a scale's NaN: which one it is changes in torchao with the number of rows."""
    if tensor.dtype == torch.float32:
        tensor = tensor.masked_fill(tensor.isnan(), math.nan)
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("name", CONFIGS)
@settings(deadline=None, max_examples=100)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 12),
    groups=st.integers(1, 5),
    exponent=st.integers(-45, 38),
    edges=st.lists(st.tuples(st.sampled_from(EDGES), st.integers(0, 10**6)), max_size=6),
    zeros=st.integers(-1, 11),
    halves=st.booleans(),
    seed=st.integers(0, 99),
    cut=st.integers(0, 12),
)
def test_every_matrix_has_torchaos_bits(
    name: str,
    dtype: torch.dtype,
    rows: int,
    groups: int,
    exponent: int,
    edges: list[tuple[float, int]],
    zeros: int,
    halves: bool,
    seed: int,
    cut: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, 8 * groups, generator=generator, dtype=torch.float64) * 10.0**exponent
    if halves:
        matrix = torch.randint(-255, 256, matrix.shape, generator=generator) / 2
    for value, place in edges:
        matrix.view(-1)[place % matrix.numel()] = value
    if zeros >= 0:
        matrix[zeros % rows] = 0.0
    matrix = matrix.to(dtype)
    quantizer, described = QUANTIZERS[name], parameter(*matrix.shape, dtype=dtype)
    before = matrix.clone()
    parts = quantizer.begin_slices(described, torch.device("cpu"))
    cut = min(cut, rows - 1)
    for start, stop in [(cut, rows), (0, cut)] if cut else [(0, rows)]:
        quantizer.quantize_slice(described, matrix[start:stop], start, parts)
    assert_same(parts, by_torchao(name, matrix))
    assert torch.equal(matrix.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_presets_do_not_need_torchao(name: str, dtype: torch.dtype) -> None:
    """Otherwise they are slow, and nobody would notice."""
    quantizer, described = QUANTIZERS[name], parameter(40, 72, dtype=dtype)
    assert quantizer._arithmetic(described, quantizer._described(described)) in (int8, float8)


@pytest.mark.parametrize("name", ["int8", "float8"])
def test_experts_of_one_parameter_too(name: str) -> None:
    config = ao.FqnToConfig({"a.weight": CONFIGS[name].method()})
    quantizer = TorchAoQuantizer(TorchAoConfig(quant_type=config))
    experts = torch.randn(3, 20, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    described = parameter(3, 20, 48, dtype=torch.bfloat16, role="other")
    parts = quantizer.begin_slices(described, torch.device("cpu"))
    quantizer.quantize_slice(described, experts, 0, parts)
    expected = [by_torchao(name, expert) for expert in experts]
    assert_same(parts, {part: torch.stack([one[part] for one in expected]) for part in parts})


@pytest.mark.parametrize(
    "method",
    [
        lambda: ao.Int8DynamicActivationInt8WeightConfig(reduce_range=True),
        lambda: ao.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
        lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int8),
    ],
)
def test_what_is_computed_in_another_way_is_left_to_torchao(method: Callable[[], Any]) -> None:
    quantizer = TorchAoQuantizer(TorchAoConfig(quant_type=method()))
    described = parameter(40, 72, dtype=torch.bfloat16)
    made = quantizer._described(described)
    assert quantizer._arithmetic(described, made) is None


@pytest.mark.parametrize("change", ["scale", "qdata"])
def test_another_torchao_is_noticed(change: str) -> None:
    """One whose numbers are a bit off."""

    def reference(matrix: Tensor) -> dict[str, Tensor]:
        made = tensors.by_part("weight", by_torchao("int8", matrix))
        made[change] = made[change].clone()
        made[change][7] += 1
        return made

    assert arithmetic_of("Int8Tensor", 64, torch.bfloat16, reference) is None
