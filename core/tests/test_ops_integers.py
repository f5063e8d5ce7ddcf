"""Integers: what the operations are defined to compute, and the libraries whose codes they give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantdock import ops
from quantdock.ops.parameters import Parameters

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(seed: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows of different size, some of one sign, groups of zeros, and values in the middle between two codes."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    matrix *= torch.exp2(torch.randint(-9, 6, (rows, 1), generator=generator))
    matrix[0] = matrix[0].abs() + 0.1
    matrix[1] = -matrix[1].abs()
    matrix[2] = 0.0
    matrix[3] = torch.randint(-15, 16, (columns,), generator=generator) / 2
    return matrix.to(dtype)


def extremes(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    smallest, largest = torch.empty(2, len(matrix), -(-matrix.shape[1] // group), dtype=matrix.dtype)
    ops.group_extremes(matrix, group=group, smallest=smallest, largest=largest)
    return smallest, largest


def quantize(matrix: Tensor, group: int, found: Parameters) -> Tensor:
    codes = torch.empty(matrix.shape, dtype=torch.int8 if found.lowest < 0 else torch.uint8)
    ops.quantize_affine(
        matrix,
        group=group,
        scales=found.scales,
        divide=found.divide,
        lowest=found.lowest,
        highest=found.highest,
        shifts=found.shifts,
        zeros=found.zeros,
        codes=codes,
    )
    return codes


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(width=16), min_size=1, max_size=60),
    columns=st.integers(1, 20),
    group=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_extremes_element_by_element(
    values: list[float], columns: int, group: int, dtype: torch.dtype, transposed: bool
) -> None:
    columns = min(columns, len(values))
    matrix = torch.tensor(values[: len(values) // columns * columns]).view(-1, columns).to(dtype)
    matrix = matrix.t() if transposed else matrix
    smallest, largest = extremes(matrix, group)
    magnitudes = torch.empty_like(smallest)
    ops.group_magnitudes(matrix, group=group, magnitudes=magnitudes)
    for row, line in enumerate(matrix.tolist()):
        for index, start in enumerate(range(0, len(line), group)):
            part = line[start : start + group]
            found = [tensor[row, index].item() for tensor in (smallest, largest, magnitudes)]
            if any(map(math.isnan, part)):
                assert all(map(math.isnan, found))
                continue
            assert found == [min(part), max(part), max(map(abs, part))]
            assert all(math.copysign(1.0, value) == 1.0 for value in found if value == 0.0)


@settings(deadline=None, max_examples=80)
@given(
    values=st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=40),
    group=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 0.5, 0.3, 7.0]),
    divide=st.booleans(),
    zero=st.integers(-128, 127),
    shift=st.sampled_from([0.0, 0.5, -3.0]),
)
def test_affine_element_by_element(
    values: list[float], group: int, dtype: torch.dtype, scale: float, divide: bool, zero: int, shift: float
) -> None:
    matrix = torch.tensor([values, values[::-1]]).to(dtype)
    shape = 2, -(-len(values) // group)
    scales, shifts = torch.full(shape, scale, dtype=dtype), torch.full(shape, shift, dtype=dtype)
    zeros, codes = torch.full(shape, zero, dtype=torch.int8), torch.empty(matrix.shape, dtype=torch.int8)
    ops.quantize_affine(
        matrix,
        group=group,
        scales=scales,
        divide=divide,
        lowest=-100,
        highest=90,
        shifts=shifts,
        zeros=zeros,
        codes=codes,
    )

    def rounded(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float64).to(dtype))

    exact = rounded(scale)
    for value, code in zip(matrix.flatten().tolist(), codes.flatten().tolist(), strict=True):
        sum_ = rounded(value + shift)
        # Division of and by numbers of up to 24 bits: rounding to 53 bits first changes nothing.
        scaled = rounded(sum_ / exact if divide else sum_ * exact)
        assert code == min(max(round(scaled) + zero, -100), 90)


def test_parameters_in_another_dtype_make_float32() -> None:
    matrix = torch.tensor([[1.0, 100.5, 3.0]], dtype=torch.bfloat16)
    scales = torch.tensor([[1 / 3]])
    codes = torch.empty(1, 3, dtype=torch.int8)
    ops.quantize_affine(matrix, group=3, scales=scales, divide=False, lowest=-128, highest=127, codes=codes)
    assert codes.tolist() == [(matrix.float() * scales).round()[0].tolist()]


def test_what_is_no_number() -> None:
    matrix = torch.tensor([[math.nan, math.inf, -math.inf, 0.0]])
    codes = torch.empty(1, 4, dtype=torch.uint8)
    scales = torch.ones(1, 1)
    ops.quantize_affine(matrix, group=4, scales=scales, divide=True, lowest=2, highest=9, codes=codes)
    assert codes.tolist() == [[0, 9, 2, 2]]


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao.quantization.quant_primitives", reason="compares with torchao")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, None])
@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("limits", [(torch.int8, -128, 127), (torch.int8, -8, 7), (torch.uint8, 0, 15)])
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
def test_it_is_what_torchao_does(
    torchao: Any,
    dtype: torch.dtype,
    scale_dtype: torch.dtype | None,
    group: int,
    limits: tuple[torch.dtype, int, int],
    mapping: str,
) -> None:
    target, lowest, highest = limits
    for seed in range(3):
        matrix = weights(seed, 12, 64, dtype)
        eps = torch.finfo(torch.float32).eps
        scale, zero = torchao.choose_qparams_affine(
            matrix,
            torchao.MappingType[mapping],
            [1, group],
            target,
            lowest,
            highest,
            eps=eps,
            scale_dtype=scale_dtype,
            zero_point_dtype=target,
            keepdim=True,
        )
        expected = torchao.quantize_affine(matrix, [1, group], scale, zero, target, lowest, highest)
        function = ops.parameters.symmetric if mapping == "SYMMETRIC" else ops.parameters.asymmetric
        found = function(
            *extremes(matrix, group), lowest=lowest, highest=highest, least=eps, dtype=scale_dtype or dtype
        )
        assert torch.equal(found.stored, scale)
        assert torch.equal(found.zeros, zero)
        assert torch.equal(quantize(matrix, group, found), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_int8_tensors(torchao: Any, dtype: torch.dtype) -> None:
    """As ``Int8WeightOnlyConfig`` makes them of weights."""
    quantization = pytest.importorskip("torchao.quantization", reason="compares with torchao")
    int8 = pytest.importorskip("torchao.quantization.quantize_.workflows.int8.int8_tensor", reason="compares with it")
    matrix = weights(5, 40, 96, dtype)
    expected = int8.Int8Tensor.from_hp(matrix, granularity=quantization.PerRow())
    eps = torch.finfo(torch.float32).eps
    found = ops.parameters.symmetric(*extremes(matrix, 96), lowest=-128, highest=127, least=eps, dtype=torch.float32)
    assert torch.equal(found.stored, expected.scale)
    assert torch.equal(quantize(matrix, 96, found), expected.qdata)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [16, 64])
def test_its_codes_for_4_bit_kernels(torchao: Any, dtype: torch.dtype, group: int) -> None:
    matrix = weights(6, 20, 64, dtype)
    block = (1, group)
    mapping = torchao.MappingType.ASYMMETRIC
    options = {"eps": 1e-6, "scale_dtype": dtype, "zero_point_dtype": dtype}
    scale, zero = torchao._choose_qparams_affine_tinygemm(matrix, mapping, block, torch.int32, 0, 15, **options)
    expected = torchao._quantize_affine_tinygemm(matrix, block, scale, zero, torch.int32, 0, 15)
    found = ops.parameters.midpoint(*extremes(matrix, group), bits=4, least=1e-6, dtype=dtype)
    assert found.middles is not None
    assert torch.equal(found.stored.view(-1), scale.view(-1))
    assert torch.equal(found.middles.view(-1), zero.view(-1))
    assert torch.equal(quantize(matrix, group, found).to(torch.int32), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_quanto_does(dtype: torch.dtype) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="compares with optimum-quanto")
    matrix = weights(7, 20, 64, dtype)
    scale = quanto.AbsmaxOptimizer()(matrix, quanto.qint8, 0)
    expected = torch.ops.quanto.quantize_symmetric(matrix, torch.int8, 0, scale)
    found = ops.parameters.absmax(*extremes(matrix, 64), highest=127)
    assert torch.equal(found.stored, scale)
    assert torch.equal(quantize(matrix, 64, found), expected)
    for kind, bits in ((quanto.qint4, 4), (quanto.qint2, 2)):
        for group in (16, 32):
            scale, shift = quanto.MaxOptimizer()(matrix, kind, 0, group)
            expected = torch.ops.quanto.quantize_affine(matrix, bits, 0, group, scale, shift)
            found = ops.parameters.shifted(*extremes(matrix, group), bits=bits)
            assert found.shifts is not None
            assert torch.equal(found.stored.view(-1, 1), scale)
            assert torch.equal(found.shifts.view(-1, 1), shift)
            assert torch.equal(quantize(matrix, group, found).view(-1, group), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_gptq(dtype: torch.dtype, bits: int, is_symmetric: bool) -> None:
    """Told by ``Quantizer`` of its code."""
    matrix = weights(8, 20, 64, dtype)
    x, maxq, zero = matrix.float().view(-1, 16), 2**bits - 1, torch.zeros(80)
    xmin, xmax = torch.minimum(x.min(1)[0], zero), torch.maximum(x.max(1)[0], zero)
    if is_symmetric:
        xmax = torch.maximum(torch.abs(xmin), xmax)
        negative = xmin < 0
        xmin[negative] = -xmax[negative]
    empty = (xmin == 0) & (xmax == 0)
    xmin[empty], xmax[empty] = -1, +1
    scale = (xmax - xmin) / maxq
    zero = torch.full_like(scale, (maxq + 1) / 2) if is_symmetric else torch.round(-xmin / scale)
    expected = torch.clamp(torch.round(x / scale.unsqueeze(1)) + zero.unsqueeze(1), 0, maxq)
    found = ops.parameters.including_zero(*extremes(matrix, 16), bits=bits, is_symmetric=is_symmetric)
    assert found.zeros is not None
    assert torch.equal(found.stored.view(-1), scale)
    assert torch.equal(found.zeros.view(-1).float(), zero)
    assert torch.equal(quantize(matrix, 16, found).view(-1, 16).float(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_awq(dtype: torch.dtype) -> None:
    """Told by ``pseudo_quantize_tensor`` of its code."""
    matrix = weights(9, 20, 64, dtype)
    w = matrix.reshape(-1, 16)
    max_val, min_val = w.amax(dim=1, keepdim=True), w.amin(dim=1, keepdim=True)
    scales = (max_val - min_val).clamp(min=1e-5) / 15
    zeros = (-torch.round(min_val / scales)).clamp_(0, 15)
    expected = torch.clamp(torch.round(w / scales) + zeros, 0, 15)
    found = ops.parameters.limited(*extremes(matrix, 16), bits=4)
    assert found.zeros is not None
    assert torch.equal(found.stored.view(-1, 1), scales)
    assert torch.equal(found.zeros.view(-1, 1).to(dtype), zeros)
    assert torch.equal(quantize(matrix, 16, found).view(-1, 16).to(dtype), expected)


def test_what_is_wrong_is_refused() -> None:
    matrix, scales, codes = torch.ones(2, 6), torch.ones(2, 2), torch.zeros(2, 6, dtype=torch.uint8)
    right: dict[str, Any] = {"group": 3, "scales": scales, "divide": True, "lowest": 0, "highest": 15, "codes": codes}
    for change, message in (
        ({"group": 0}, "group is 0, expected a positive number"),
        ({"scales": torch.ones(2, 3)}, r"scales is torch.float32 \[2, 3\].*expected torch.float32 \[2, 2\]"),
        ({"highest": 256}, "codes from 0 to 256, expected a range within 0 to 255"),
        ({"lowest": 16}, "codes from 16 to 15"),
        ({"zeros": scales.to(torch.int8)}, "zeros is torch.int8"),
        ({"shifts": scales.half()}, "shifts is torch.float16"),
        ({"codes": codes.int()}, "codes is torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.quantize_affine(matrix, **(right | change))
    assert not codes.any()
