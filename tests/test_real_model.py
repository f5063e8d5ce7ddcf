"""A real model, SmolLM2-135M-Instruct, out of its GGUF file through a quantizer and back."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference import assert_same_tensor

import quantdock


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The file of ``QUANTDOCK_SMOLLM2``, or the demo's, fetched (93 MB) if it isn't there yet."""
    named = os.environ.get("QUANTDOCK_SMOLLM2")
    if named:
        return Path(named)
    script = Path(__file__).parents[1] / "demo" / "fetch_model.py"
    spec = importlib.util.spec_from_file_location("fetch_model", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return Path(module.fetch())
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the model can't be fetched: {error}")


def next_word(model: Any, tokenizer: Any, prompt: str) -> tuple[str, torch.Tensor]:
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    return tokenizer.decode(logits.argmax()), logits


@pytest.mark.slow
def test_quantized_saved_and_read_by_transformers(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import quantdock_gguf

    tokenizer = quantdock_gguf.tokenizer(smollm2)
    model = quantdock.load(smollm2, quantize="bnb-nf4", dtype="bfloat16", memory_budget="64MiB")
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes
    assert report.in_flight_peak_nbytes <= report.memory_budget
    assert 0.6 < report.ledger.coverage["bnb-nf4"] / report.ledger.stored_nbytes < 0.8
    word, logits = next_word(model, tokenizer, "The capital of France is")
    assert word == " Paris"

    quantdock.save(model, tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto", device_map="cpu")
    state = model.state_dict()  # once: after a forward, making it undoes the CPU's repacking layer by layer
    for name, tensor in theirs.state_dict().items():
        assert_same_tensor(state[name], tensor, name)
    again = quantdock.load(tmp_path / "saved")
    assert_same_tensor(next_word(again, tokenizer, "The capital of France is")[1], logits, "logits")
