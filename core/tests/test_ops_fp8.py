"""8-bit floats: what the operations are defined to compute, and the libraries whose bits they give."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantdock import ops
from quantdock.ops.fp8 import _values
from quantdock.ops.fp8_scales import Rule

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMBERS = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
"""What the codes from 0 on stand for."""


def weights(seed: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Some blocks of zeros, large and tiny numbers, and rows of different size."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    matrix *= torch.exp2(torch.randint(-12, 8, (rows, 1), generator=generator))
    matrix[: rows // 3, : columns // 2] = 0.0
    if seed % 3 == 0:
        matrix[rows // 2] *= 1e-20 if dtype != torch.float16 else 1e-4
    return matrix.to(dtype)


def encode(matrix: Tensor, block: tuple[int, int], rule: Rule) -> tuple[Tensor, Tensor]:
    found = ops.fp8_scales(ops.block_magnitudes(matrix, block=block), rule=rule)
    codes = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    ops.encode_fp8(matrix, scales=found.scales, block=block, divide=found.divide, codes=codes)
    return codes, found.stored


def same_codes(found: Tensor, expected: Tensor) -> bool:
    """But for the signs of NaNs, which depend on the processor."""
    is_nan = expected.float().isnan()
    numbers = ~is_nan
    return bool((found.view(torch.uint8)[is_nan] == 0x7F).all()) and torch.equal(
        found.view(torch.uint8)[numbers], expected.view(torch.uint8)[numbers]
    )


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(width=16), min_size=1, max_size=60),
    scale=st.sampled_from([1.0, 0.25, 100.0, 2.0**-12]),
    dtype=st.sampled_from(DTYPES),
)
def test_encode_element_by_element(values: list[float], scale: float, dtype: torch.dtype) -> None:
    matrix = torch.tensor([values]).to(dtype)
    codes = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    scales = torch.full((1, 1), scale)
    ops.encode_fp8(matrix, scales=scales, block=(1, len(values)), divide=False, codes=codes)
    for value, code in zip((matrix.float() * scale)[0].tolist(), codes.view(torch.uint8)[0].tolist(), strict=True):
        if math.isnan(value):
            assert code == 0x7F
            continue
        assert (code >= 0x80) == (math.copysign(1.0, value) < 0)
        magnitude = min(abs(value), NUMBERS[-1])
        distances = [abs(magnitude - number) for number in NUMBERS]
        nearest = [index for index, distance in enumerate(distances) if distance == min(distances)]
        assert code & 0x7F == (nearest[0] if len(nearest) == 1 else next(index for index in nearest if index % 2 == 0))


@pytest.mark.parametrize("format", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_value_of_every_code(format: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(format).view(16, 16)
    found, expected = _values(codes).view(-1), codes.to(torch.float32).view(-1)
    assert torch.equal(found.isnan(), expected.isnan())
    numbers = ~found.isnan()
    assert torch.equal(found[numbers].view(torch.int32), expected[numbers].view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("block", [(300, 200), (1, 200), (128, 128), (1, 32)])
def test_decode_is_a_product_rounded_once(dtype: torch.dtype, format: torch.dtype, block: tuple[int, int]) -> None:
    """With ragged edges, every code, and scales in every dtype that files have."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (300, 200), generator=generator, dtype=torch.uint8).view(format)
    shape = -(-300 // block[0]), -(-200 // block[1])
    kinds = [torch.float32, torch.bfloat16, *([torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else [])]
    for kind in kinds:
        scales = torch.exp2(torch.randn(shape, generator=generator) * 4).to(kind)
        if kind.itemsize == 1:  # every power of two that there is, and the NaN
            scales = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).view(kind)
        single = scales.to(torch.float32)
        for matrix in (codes, codes.t().contiguous().t()):
            result = torch.empty(300, 200, dtype=dtype)
            ops.decode_fp8(matrix, scales=scales, block=block, out=result)
            spread = single.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:300, :200]
            expected = (codes.to(torch.float32) * spread).to(dtype)
            assert torch.equal(result.isnan(), expected.isnan())
            numbers = ~expected.isnan()
            assert torch.equal(result[numbers].view(torch.uint8), expected[numbers].view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 200), (128, 128), (1, 32), (3, 7), (1000, 1000)])
def test_block_magnitudes(dtype: torch.dtype, block: tuple[int, int]) -> None:
    matrix = weights(1, 300, 200, dtype)
    matrix[7, 9], matrix[299, 199] = math.nan, -math.inf
    found = ops.block_magnitudes(matrix, block=block)
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            part = matrix[row * block[0] :, column * block[1] :][: block[0], : block[1]]
            expected = part.abs().max()
            assert found[row, column] == expected or (found[row, column].isnan() and expected.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_it_is_what_transformers_does(dtype: torch.dtype, seed: int, scale_fmt: str) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="compares with transformers")
    for block, size in (((128, 128), (256, 384)), (None, (100, 60)), ((32, 64), (64, 192))):
        matrix = weights(seed, *size, dtype)
        config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
        quantize = fp8.Fp8Quantize(SimpleNamespace(quantization_config=config))
        expected = quantize.convert({"a.weight": matrix})
        rule: Rule = "reciprocal" if scale_fmt == "float" else "power_of_two"
        codes, stored = encode(matrix, block or size, rule)
        assert same_codes(codes, expected["a.weight"])
        assert torch.equal(stored, expected["a.weight_scale_inv"].float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_torchao_does(dtype: torch.dtype, seed: int) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives", reason="compares with torchao")
    for block, size in (((128, 128), (256, 384)), ((100, 60), (100, 60)), ((1, 60), (100, 60))):
        matrix = weights(seed, *size, dtype)
        scale = primitives._choose_scale_float8(matrix, list(block))
        expected = primitives._quantize_affine_float8(matrix, scale)
        codes, stored = encode(matrix, block, "quotient")
        assert torch.equal(stored.nan_to_num(-1), scale.nan_to_num(-1))
        assert same_codes(codes, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_quanto_does(dtype: torch.dtype, seed: int) -> None:
    """Whose quotients are in the dtype of the weights."""
    quanto = pytest.importorskip("optimum.quanto", reason="compares with optimum-quanto")
    matrix = weights(seed, 100, 60, dtype)
    scale = quanto.AbsmaxOptimizer()(matrix, quanto.qfloat8, 0)
    expected = torch.ops.quanto.quantize_symmetric(matrix, torch.float8_e4m3fn, 0, scale)
    found = ops.fp8_scales(ops.block_magnitudes(matrix, block=(1, 60)), rule="quotient")
    assert torch.equal(found.stored.to(dtype), scale)
    codes = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    ops.encode_fp8(matrix, scales=found.scales, block=(1, 60), divide=found.divide, codes=codes, narrow=True)
    assert same_codes(codes, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_fbgemm_does(dtype: torch.dtype, seed: int) -> None:
    """Told by its code for CPUs, ``quantize_fp8_row``: FBGEMM can't be installed everywhere."""
    matrix = weights(seed, 100, 60, dtype)
    row_max = matrix.abs().max(dim=1)[0].clamp(min=1e-12)
    a_scale = 448.0 / row_max.to(torch.float32)
    a_scale[a_scale == float("inf")] = 1.0
    expected = (matrix * a_scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    codes, stored = encode(matrix, (1, 60), "floored")
    assert torch.equal(stored[:, 0], 1 / a_scale)
    assert same_codes(codes, expected)


@pytest.mark.parametrize("format", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 300), (16, 40), (128, 128), (1, 7), (1000, 1000)])
def test_products_round_nothing_but_the_result(block: tuple[int, int], dtype: torch.dtype, format: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(70, 300, generator=generator).to(format)
    scales = torch.rand(-(-70 // block[0]), -(-300 // block[1]), generator=generator) + 0.5
    weight = torch.empty(70, 300)
    ops.decode_fp8(codes, scales=scales, block=block, out=weight)
    for rows in (0, 1, 2, 5, 9):
        x = torch.randn(rows, 600, generator=generator).to(dtype)[:, ::2]
        exact, sizes = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
        found = ops.multiply_fp8(x, codes=codes, scales=scales, block=block)
        assert (found.dtype, found.shape) == (dtype, (rows, 70))
        assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6 * sizes).all()


def test_products_of_what_is_no_number() -> None:
    codes = torch.ones(9, 200).to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[3, 5], codes.view(torch.uint8)[4, 199] = 0x7F, 0xFF
    scales = torch.ones(9, 2)
    scales[6, 1], scales[7, 0] = float("inf"), float("nan")
    found = ops.multiply_fp8(torch.ones(2, 200), codes=codes, scales=scales, block=(1, 190))
    assert found.isnan().nonzero()[:, 1].tolist() == 2 * [3, 4, 7]
    assert found.isinf().nonzero()[:, 1].tolist() == 2 * [6]  # ten columns have that scale, and fill no register
    x = torch.ones(1, 200)
    x[0, 7] = float("-inf")
    assert (ops.multiply_fp8(x, codes=codes[:3], scales=scales[:3], block=(1, 190)) == float("-inf")).all()


def test_what_is_wrong_is_refused() -> None:
    matrix, codes = torch.ones(4, 6), torch.empty(4, 6, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scales is .* \[4, 1\].*expected torch.float32 \[2, 1\]"):
        ops.encode_fp8(matrix, scales=torch.ones(4, 1), block=(2, 6), divide=False, codes=codes)
    with pytest.raises(ValueError, match="block is 0, 6, expected a positive number"):
        ops.encode_fp8(matrix, scales=torch.ones(4, 1), block=(0, 6), divide=False, codes=codes)
    with pytest.raises(ValueError, match=r"matrix is torch.float64 \[4, 6\], expected a matrix of"):
        ops.encode_fp8(matrix.double(), scales=torch.ones(4, 1), block=(1, 6), divide=False, codes=codes)
    with pytest.raises(ValueError, match=r"codes is torch.int8"):
        ops.decode_fp8(codes.view(torch.int8), scales=torch.ones(4, 1), block=(1, 6), out=matrix)
    with pytest.raises(ValueError, match=r"scales is torch.uint8"):
        ops.decode_fp8(codes, scales=torch.ones(4, 1).byte(), block=(1, 6), out=matrix)
    with pytest.raises(ValueError, match=r"x is torch.float32 \[4, 5\] .* expected torch.float32 \[4, 6\]"):
        ops.multiply_fp8(matrix[:, :5], codes=codes, scales=torch.ones(4, 1), block=(1, 6))
    with pytest.raises(ValueError, match=r"the result is torch.float64 \[4, 4\], expected a matrix of"):
        ops.multiply_fp8(matrix, codes=codes, scales=torch.ones(4, 1), block=(1, 6), dtype=torch.float64)
    with pytest.raises(ValueError, match="rule is 'best', expected one of"):
        ops.fp8_scales(matrix, rule="best")  # type: ignore[arg-type]
