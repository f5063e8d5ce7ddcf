"""GPTQ's algorithm on experts in one parameter: as on linear layers, each by the tokens that it is fed."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantdock

sys.path.insert(0, str(Path(__file__).parent))
from moe_files import EXPERTS, FAMILIES, HIDDEN, INNER, logits, model_of

pytest.importorskip("quantdock_transformers", reason="the models are transformers', whose architectures it brings")

PARTS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def samples(count: int = 8, tokens: int = 48) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (tokens,), generator=generator).tolist() for _ in range(count)]


def config(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "dataset": samples(), **fields}


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)))


class Experts(nn.ModuleList):
    """Experts as linear layers, under the names that checkpoints have."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            place, token = torch.where((chosen == number).t())
            if len(token):
                result.index_add_(0, token, expert(hidden[token]) * weights[token, place, None])
        return result


def one_by_one(data: Mapping[str, Any]) -> nn.Module:
    """The model with its experts as linear layers."""
    from transformers import Qwen3MoeConfig
    from transformers.models.auto import AutoModelForCausalLM

    known = {name: value for name, value in data.items() if name not in ("quantization_config", "dtype")}
    model: Any = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**known), dtype=torch.float32)
    model.config.use_cache = False
    for layer in model.model.layers:
        layer.mlp.experts = Experts(Expert() for _ in range(EXPERTS))
    return torch.nn.Module.eval(model)


WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "act order": {"desc_act": True, "sym": False},
    "all at once": {"true_sequential": False, "act_group_aware": False, "checkpoint_format": "gptq_v2"},
}


@pytest.mark.parametrize("way", WAYS)
def test_experts_are_calibrated_as_linear_layers_are(tmp_path: Path, way: str) -> None:
    original = model_of("qwen3_moe", dtype=torch.float32)
    original.save_pretrained(tmp_path / "it")
    model = quantdock.load(tmp_path / "it", quantize=config(**WAYS[way]))
    quantdock.save(model, tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    apart = quantdock.load(tmp_path / "it", quantize=config(**WAYS[way]), model=one_by_one, skip=["lm_head.weight"])
    expected = {name: tensor for name, tensor in apart.state_dict().items() if ".experts." in name}
    assert len(expected) == 2 * EXPERTS * 3 * 4
    rounded = quantdock.load(tmp_path / "it", quantize=config(dataset=None))
    quantdock.save(rounded, tmp_path / "rounded")
    nearest = load_file(tmp_path / "rounded" / "model.safetensors")
    same, total, as_rounded = 0, 0, 0
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        if "layers.0" in name and not name.startswith("model.layers.0.mlp.experts.down"):
            same += int((found[name] == tensor).sum())
            total += tensor.numel()
            as_rounded += int((found[name] == nearest[name]).sum())
    assert same >= 0.99 * total  # sums in another order round some activations another way
    assert as_rounded < 0.7 * total


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_better_than_rounding_and_loads_again(tmp_path: Path, family: str) -> None:
    original = model_of(family, dtype=torch.float32)
    original.save_pretrained(tmp_path / "it")
    plan = quantdock.plan(tmp_path / "it", quantize=config(dataset=samples(32), bits=3))
    model = plan.execute()
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes
    quantdock.save(model, tmp_path / "saved")
    again = quantdock.load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    rounded = quantdock.load(tmp_path / "it", quantize=config(dataset=None, bits=3))
    ids = torch.tensor(samples(32)[:4])
    with torch.no_grad():
        expected, ours, nearest = (one(ids).logits for one in (original, model, rounded))
    assert (ours - expected).norm() < 0.85 * (nearest - expected).norm()


def test_an_expert_that_no_token_reaches_is_rounded_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = model_of("qwen3_moe", dtype=torch.float32)
    with torch.no_grad():
        original.get_parameter("model.layers.1.mlp.gate.weight").zero_()  # all tokens go to the same two
    original.save_pretrained(tmp_path / "it")
    with caplog.at_level(logging.WARNING, logger="quantdock"):
        model = quantdock.load(tmp_path / "it", quantize=config())
    quantdock.save(model, tmp_path / "saved")
    notes = {entry.parameter: entry.note for entry in quantdock.report(model).ledger.entries}
    leaves = ("gate_up_proj", "down_proj")
    said = [notes[f"model.layers.1.mlp.experts.{leaf}"] for leaf in leaves]
    left = re.fullmatch(r"experts (\d), (\d): no activations on the calibration data: rounded to nearest", said[0])
    assert left is not None, said
    assert said[1] == said[0]
    assert said[0] in caplog.text
    rounded = quantdock.load(tmp_path / "it", quantize=config(dataset=None))
    quantdock.save(rounded, tmp_path / "rounded")
    found, nearest = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "rounded"))
    for expert in range(EXPERTS):
        for part in PARTS:
            name = f"model.layers.1.mlp.experts.{expert}.{part}.qweight"
            assert torch.equal(found[name], nearest[name]) == (str(expert) in left.groups()), name


def test_dynamic_leaves_experts_out(tmp_path: Path) -> None:
    model_of("qwen3_moe", dtype=torch.float32).save_pretrained(tmp_path / "it")
    model = quantdock.load(tmp_path / "it", quantize=config(dynamic={r"-:.*layers\.0\.mlp\.experts\.": {}}))
    quantdock.save(model, tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.1.up_proj.weight" in names
    assert "model.layers.1.mlp.experts.1.up_proj.qweight" in names
    assert torch.equal(logits(quantdock.load(tmp_path / "saved")), logits(model))


def test_modules_that_use_all_experts_at_once(tmp_path: Path) -> None:
    model_of("qwen3_moe", dtype=torch.float32).save_pretrained(tmp_path / "it")
    data = json.loads((tmp_path / "it" / "config.json").read_text())
    (tmp_path / "it" / "config.json").write_text(json.dumps(data | {"experts_implementation": "batched_mm"}))
    with pytest.raises(quantdock.CalibrationError, match=r"gate_up_proj: its module does something else.*'eager'"):
        quantdock.load(tmp_path / "it", quantize=config())
