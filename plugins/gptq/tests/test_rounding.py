"""Rounding to nearest: the formula, in words of its own, and what can't be rounded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantdock
from quantdock.testing import SmallModel, write_checkpoint
from quantdock_gptq import rounding, words
from quantdock_gptq.config import GPTQConfig
from quantdock_gptq.modules import GPTQLinear


def by_the_formula(group: list[float], bits: int, sym: bool) -> tuple[list[int], int, float]:
    """Codes, zero point and scale of one group."""
    top = 2**bits - 1
    low, high = min(0.0, *group), max(0.0, *group)
    span = 2 * max(-low, high) if sym else high - low
    # In float32 up to the rounding to float16, as it is computed.
    scale = torch.tensor(2 / top if sym else 1.0).mul(span / 2 if sym else span)
    scale = (scale if sym else scale / top).half().item() or 1.0
    zero = 2 ** (bits - 1) if sym else min(top, max(0, round((torch.tensor(-low) / scale).item())))
    codes = [min(top, max(0, round((torch.tensor(value) / scale).item()) + zero)) for value in group]
    return codes, zero, scale


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    size=st.sampled_from([32, 64, -1]),
    spread=st.sampled_from([1e-9, 1e-3, 1.0, 100.0]),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
    seed=st.integers(0, 2**32),
)
def test_the_formula(bits: int, sym: bool, size: int, spread: float, shift: float, seed: int) -> None:
    matrix = spread * (torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) + shift)
    matrix[3] = 0
    parts, codes, zeros, scales = quantized(matrix, GPTQConfig(bits=bits, sym=sym, group_size=size))
    length = 64 if size == -1 else size
    for row in range(0, 32, 3):
        for group in range(64 // length):
            inputs = slice(group * length, (group + 1) * length)
            expected = by_the_formula(matrix[row, inputs].tolist(), bits, sym)
            assert (codes[inputs, row].tolist(), zeros[group, row], scales[group, row]) == expected
    assert parts["qweight"].shape == (2 * bits, 32)


def quantized(matrix: Tensor, config: GPTQConfig) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    found = config.of("")
    assert found is not None
    _, groups = found.groups(matrix.shape[1])
    outputs, inputs = matrix.shape
    parts = {
        "qweight": torch.empty(inputs * config.bits // 32, outputs, dtype=torch.int32),
        "qzeros": torch.empty(groups, outputs * config.bits // 32, dtype=torch.int32),
        "scales": torch.empty(groups, outputs, dtype=torch.float16),
    }
    assert rounding.quantize_into(matrix, found, parts, 0, less_one=True)
    zeros = words.decode_zeros(parts["qzeros"], config.bits, less_one=True)
    return parts, words.unpack(parts["qweight"], config.bits), zeros, parts["scales"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
@pytest.mark.parametrize("sym", [True, False])
def test_what_has_no_scale_is_refused(value: float, sym: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, features=128, dtype=torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["blocks.1.up.weight"][5, 7] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(quantdock.LoadError, match=r"blocks\.1\.up\.weight has weights that are infinite"):
        quantdock.load(tmp_path, model=SmallModel, quantize=GPTQConfig(bits=4, sym=sym))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"group_size": 48}, r"blocks\.0\.up\.weight: groups of 48 don't divide its 64 inputs; choose a group_size"),
        ({"bits": 5}, "GPTQ in 5 bits can't be read; expected 2, 3, 4, 8"),
        ({"bits": 4, "dynamic": {".*up": {"bits": 7}}}, "GPTQ in 7 bits can't be read; expected 2, 3, 4, 8"),
    ],
)
def test_what_has_no_form_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(quantdock.QuantdockError, match=message):
        quantdock.plan(tmp_path, quantize=GPTQConfig(**config), model=SmallModel)


def test_act_order_needs_data(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, features=128)
    with pytest.raises(quantdock.LedgerError, match="desc_act orders inputs by their activations"):
        quantdock.plan(tmp_path, model=SmallModel, quantize=GPTQConfig(desc_act=True))


def test_what_is_left_alone_is_said(tmp_path: Path) -> None:
    """By ``dynamic``, which gptqmodel and vLLM read: they would look for quantized tensors otherwise."""
    write_checkpoint(tmp_path / "model", features=128)
    config = GPTQConfig(dynamic={"-:.*0.down": {}, "+:.*1.down": {"bits": 8}})
    model = quantdock.load(tmp_path / "model", model=SmallModel, quantize=config, skip=["blocks.0.up"])
    found = {name: module.bits for name, module in model.named_modules() if isinstance(module, GPTQLinear)}
    assert found == {"blocks.1.up": 4, "blocks.1.down": 8}
    quantdock.save(model, tmp_path / "saved")
    stored = quantdock.read_json_object(tmp_path / "saved" / "config.json", "a config")["quantization_config"]
    assert stored["dynamic"] == {
        r"-:^blocks\.0\.up$": {},
        r"-:^head$": {},
        "-:.*0.down": {},
        "+:.*1.down": {"bits": 8},
    }
    again = quantdock.load(tmp_path / "saved", model=SmallModel)
    assert {name: m.bits for name, m in again.named_modules() if isinstance(m, GPTQLinear)} == found
