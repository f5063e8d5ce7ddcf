"""The bits of quantized weights are those of the libraries whose formats they are."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantdock import Parameter, TensorSpec
from quantdock_fp8.config import FbgemmFp8Config, Fp8Config
from quantdock_fp8.quantizer import FbgemmFp8Quantizer, Fp8Quantizer
from quantdock_fp8.scheme import Rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = st.sampled_from(DTYPES)
rules: st.SearchStrategy[Rule] = st.sampled_from(("reciprocal", "power_of_two", "floored"))


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Values over many orders of magnitude, a few of them zero, and a part with nothing but zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * torch.exp2(
        torch.randint(-14, 6, (rows, columns), generator=generator).float()
    )
    values[: rows // 3, : columns // 2] = 0
    return values.to(dtype)


def quantized(quantizer: Fp8Quantizer | FbgemmFp8Quantizer, tensor: Tensor) -> dict[str, Tensor]:
    spec = TensorSpec.of(tensor)
    parameter = Parameter(name="a.weight", spec=spec, module_type=nn.Linear, role="linear")
    quantizer.parameters = {"a.weight": parameter}
    found = quantizer.quantize_param(parameter, tensor)
    assert found is not None
    return dict(found)


def by_transformers(config: Any, tensor: Tensor) -> Mapping[str, Tensor]:
    pytest.importorskip("transformers", reason="the reference is transformers' code")
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    found: Mapping[str, Tensor] = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"a.weight": tensor})
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )


@settings(deadline=None, max_examples=60)
@given(
    down=st.integers(1, 3),
    across=st.integers(1, 3),
    block=st.sampled_from([None, (128, 128), (1, 32), (16, 8)]),
    scale_fmt=st.sampled_from(["float", "ue8m0"]),
    dtype=dtypes,
    seed=st.integers(0, 2**32),
)
def test_transformers(
    down: int, across: int, block: tuple[int, int] | None, scale_fmt: str, dtype: torch.dtype, seed: int
) -> None:
    rows, columns = block or (24, 40)
    tensor = matrix(down * rows, across * columns, dtype, seed)
    config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    theirs = by_transformers(config, tensor)
    ours = quantized(Fp8Quantizer(Fp8Config(weight_block_size=block, scale_fmt=scale_fmt)), tensor)
    assert same_bits(ours["weight"], theirs["a.weight"])
    expected = theirs["a.weight_scale_inv"]
    assert same_bits(ours["weight_scale_inv"], expected if block else expected.reshape(()))


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_blocks_at_the_edges_are_smaller(rows: int, columns: int, seed: int) -> None:
    """transformers leaves such weights alone; with zeros beyond the edge it gives the bits that they should have."""
    tensor = matrix(rows, columns, torch.bfloat16, seed)
    padded = nn.functional.pad(tensor, (0, -columns % 128, 0, -rows % 128))
    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    theirs = by_transformers(config, padded)
    ours = quantized(Fp8Quantizer(Fp8Config(weight_block_size=(128, 128))), tensor)
    assert same_bits(ours["weight_scale_inv"], theirs["a.weight_scale_inv"])
    assert same_bits(ours["weight"], theirs["a.weight"][:rows, :columns])


def fbgemm(a: Tensor) -> tuple[Tensor, Tensor]:
    """``fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm.quantize_fp8_row`` of FBGEMM 1.2, its path for CPUs."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    row_max = torch.clamp(torch.max(torch.abs(a), dim=-1)[0], min=1e-12)
    scale = largest / row_max.to(torch.float32)
    scale[scale == float("inf")] = 1.0
    result = torch.clamp(a * scale[:, None], -largest, largest).to(torch.float8_e4m3fn)
    return result, (1 / scale).view(-1, 1)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), dtype=dtypes, seed=st.integers(0, 2**32))
def test_fbgemm(rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    tensor = matrix(rows, columns, dtype, seed)
    expected, scale = fbgemm(tensor)
    ours = quantized(FbgemmFp8Quantizer(FbgemmFp8Config()), tensor)
    assert same_bits(ours["weight"], expected)
    assert same_bits(ours["weight_scale"], scale)
