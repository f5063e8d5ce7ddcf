"""Codes, scales and zero points of each form, against loops over single words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdock_awq.packing import GEMM, GEMV, GEMV_FAST, Packing

sys.path.insert(0, str(Path(__file__).parent))
import awq_files

FORMS = {"gemm": GEMM, "gemv": GEMV, "gemv_fast": GEMV_FAST, "llm-awq": GEMV_FAST}
SIZES = st.sampled_from([16, 32, 64, 128, -1])


@pytest.mark.parametrize("form", list(FORMS))
@settings(deadline=None, max_examples=15)
@given(
    outputs=st.integers(1, 9).map(lambda count: 8 * count),
    inputs=st.integers(1, 3).map(lambda count: 128 * count),
    size=SIZES,
    start=st.integers(0, 40),
    stop=st.integers(1, 72),
    seed=st.integers(0, 2**32),
)
def test_forms(form: str, outputs: int, inputs: int, size: int, start: int, stop: int, seed: int) -> None:
    """All outputs, and any of them; and codes put in pieces make the same words again."""
    packing, made = FORMS[form], awq_files.make(outputs, inputs, size, seed=seed)
    stored = awq_files.FORMS[form](made)
    zeros = stored["scaled_zeros" if form == "llm-awq" else "qzeros"]
    groups = inputs // made.size
    specs = packing.components(outputs, inputs, made.size, torch.float16)
    assert {tuple(tensor.shape) for tensor in stored.values()} == {spec.shape for spec in specs.values()}
    assert packing.misfit(outputs, inputs, made.size) is None
    start = min(start, outputs - 1)
    for part in (slice(0, outputs), slice(start, min(outputs, start + stop))):
        assert torch.equal(packing.codes(stored["qweight"], part).t(), made.codes[part])
        assert torch.equal(packing.scales(stored["scales"], groups, part).t(), made.scales[part])
        assert torch.equal(packing.zeros(zeros, stored["scales"], groups, part).t(), made.zeros[part])
    assert packing.damage(stored, groups) is None
    again = torch.empty_like(stored["qweight"])
    for first in range(0, outputs, 16):
        part = slice(first, min(outputs, first + 16))
        packing.put_codes(made.codes[part].to(torch.uint8).t(), again, part)
    assert torch.equal(again, stored["qweight"])


@pytest.mark.parametrize(
    ("packing", "shape", "reason"),
    [
        (GEMM, (100, 64, 64), "100 outputs, no multiple of 8"),
        (GEMV, (64, 100, 100), "100 inputs, no multiple of 8"),
        (GEMV, (64, 192, 96), "groups of 96 inputs"),
        (GEMV_FAST, (66, 64, 64), "66 outputs and 64 inputs"),
        (GEMV_FAST, (64, 96, 32), "64 outputs and 96 inputs"),
    ],
)
def test_what_has_no_form(packing: Packing, shape: tuple[int, int, int], reason: str) -> None:
    found = packing.misfit(*shape)
    assert found is not None
    assert reason in found
