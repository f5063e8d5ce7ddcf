"""What quantdock saves is what transformers reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantdock

pytest.importorskip("quantdock_transformers", reason="the models are transformers', whose architectures it brings")

PRESETS: dict[str, Any] = {
    "fp8": "fp8",
    "fp8-block": "fp8-block",
    "powers of two": {"quant_method": "fp8", "weight_block_size": [64, 32], "scale_fmt": "ue8m0"},
}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def by_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    config = FineGrainedFP8Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu", quantization_config=config)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(torch.arange(12)[None]).logits)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("skip", [[], ["*.layers.0.*", "*.down_proj"]])
def test_transformers_reads_what_is_saved(source: Path, tmp_path: Path, name: str, skip: list[str]) -> None:
    model = quantdock.load(source, quantize=PRESETS[name], skip=skip)
    ours = logits(model)
    quantdock.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "save_pretrained")
    theirs = by_transformers(tmp_path / "saved")
    expected = theirs.state_dict()
    assert {tensor.dtype for tensor in expected.values()} == {torch.bfloat16}
    for folder in ("saved", "save_pretrained"):
        again = quantdock.load(tmp_path / folder)
        assert torch.equal(logits(again), ours)
        found = quantdock.dequantize(again).state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert (logits(theirs) - ours).abs().max() <= 0.02 * ours.abs().max()


def test_blocks_at_the_edges_that_transformers_refuses(source: Path, tmp_path: Path) -> None:
    asked = {"quant_method": "fp8", "weight_block_size": [100, 100]}
    model = quantdock.load(source, quantize=asked)
    ours = logits(model)
    quantdock.save(model, tmp_path / "saved")
    with pytest.raises(RuntimeError):
        by_transformers(tmp_path / "saved")
    assert torch.equal(logits(quantdock.load(tmp_path / "saved")), ours)
