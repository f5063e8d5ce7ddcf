"""Experts that a checkpoint stores one by one in AWQ's forms, and architectures that have them in one parameter."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantdock

sys.path.insert(0, str(Path(__file__).parent))
import awq_files

pytest.importorskip("quantdock_transformers", reason="the models are transformers', whose architectures it brings")

HIDDEN, INNER, EXPERTS, SIZE = 128, 64, 4, 32


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small mixture of experts."""
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.auto import AutoModelForCausalLM

    common: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "head_dim": 32,
    }
    if family == "mixtral":
        config: Any = MixtralConfig(**common, num_local_experts=EXPERTS, intermediate_size=INNER)
    else:
        config = Qwen3MoeConfig(**common, num_experts=EXPERTS, moe_intermediate_size=INNER)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def write(
    folder: Path, model: Any, version: str, change: Callable[[dict[str, Tensor]], object] = lambda tensors: None
) -> dict[str, Tensor]:
    """Store a model whose layers are in one of AWQ's forms, and return what they stand for, in the model's dtype."""
    model.save_pretrained(folder)
    tensors, plain = {}, {}
    for number, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        if name.endswith(".weight") and ("experts." in name or "self_attn." in name) and "norm" not in name:
            made = awq_files.make(*tensor.shape, SIZE, seed=number)
            plain[name] = made.values(tensor.dtype)
            parts = awq_files.FORMS[version](made)
            tensors |= {name.removesuffix("weight") + part: stored for part, stored in parts.items()}
        else:
            tensors[name] = plain[name] = tensor
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "awq", "bits": 4, "group_size": SIZE, "zero_point": True, "version": version}
    awq_files.say(folder, lambda config: config.update(quantization_config=quantization))
    return plain


def reference(folder: Path, model: Any, plain: Mapping[str, Tensor]) -> Any:
    """transformers' model with weights in full precision."""
    from transformers.models.auto import AutoModelForCausalLM

    model.save_pretrained(folder)
    save_file(dict(plain), folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(torch.arange(24).view(2, 12)).logits).float()


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )


def same_files(one: Path, other: Path) -> bool:
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    return before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)


CASES = [("qwen3_moe", version) for version in awq_files.FORMS] + [("mixtral", "gemm")]


@pytest.mark.parametrize(("family", "version"), CASES)
def test_loads_computes_saves_and_dequantizes(tmp_path: Path, family: str, version: str) -> None:
    original = model_of(family)
    plain = write(tmp_path / "it", original, version)
    theirs = reference(tmp_path / "plain", original, plain)

    model = quantdock.load(tmp_path / "it")
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes
    files = load_file(tmp_path / "it" / "model.safetensors")
    assert {source for entry in report.ledger.entries for source in entry.sources} == files.keys()
    fused = {entry.parameter for entry in report.ledger.entries if entry.method and ".experts." in entry.parameter}
    assert fused == {f"model.layers.{i}.mlp.experts.{kind}_proj" for i in (0, 1) for kind in ("gate_up", "down")}

    expected = logits(theirs)
    for way in ("grouped_mm", "eager", "batched_mm"):
        model.set_experts_implementation(way)
        assert (logits(model) - expected).abs().max() <= 1e-4 * expected.abs().max(), way

    quantdock.save(model, tmp_path / "saved")
    assert same_files(tmp_path / "it", tmp_path / "saved")
    assert torch.equal(logits(quantdock.load(tmp_path / "saved")), logits(quantdock.load(tmp_path / "it")))

    restored = quantdock.dequantize(model)
    found, wanted = restored.state_dict(), theirs.state_dict()
    assert list(found) == list(wanted)
    assert [name for name, tensor in wanted.items() if not same_bits(found[name], tensor)] == []
    quantdock.save(restored, tmp_path / "restored")
    assert same_files(tmp_path / "plain", tmp_path / "restored")


GATE, UP, DOWN = (f"model.layers.1.mlp.experts.2.{kind}_proj" for kind in ("gate", "up", "down"))
WRONG: Mapping[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scales": (
        lambda tensors: tensors.pop(f"{UP}.scales"),
        rf"{UP}: component 'scales' is missing, expected float16\[4, 64\]",
    ),
    "no zero points": (lambda tensors: tensors.pop(f"{UP}.qzeros"), rf"{UP}: component 'qzeros' is missing"),
    "no codes": (lambda tensors: tensors.pop(f"{DOWN}.qweight"), DOWN),
    "no expert": (
        lambda tensors: [tensors.pop(f"{DOWN}.{part}") for part in ("qweight", "qzeros", "scales")],
        "down_proj",
    ),
    "scales of another shape": (
        lambda tensors: tensors.update({f"{UP}.scales": torch.ones(2, INNER).half()}),
        rf"{UP}: component 'scales' is float16\[2, 64\], expected float16\[4, 64\], for version='gemm' and group_size",
    ),
    "scales of another dtype": (
        lambda tensors: tensors.update({f"{UP}.scales": torch.ones(4, INNER).bfloat16()}),
        f"{UP}.weight' is stored as .*have to be alike",
    ),
    "a form of another version": (
        lambda tensors: tensors.update(awq_files_of(GATE, "gemv")),
        f"{GATE}: component 'q.* look like version 'gemv'",
    ),
}


def awq_files_of(layer: str, version: str) -> dict[str, Tensor]:
    made = awq_files.make(INNER, HIDDEN, SIZE)
    return {f"{layer}.{part}": tensor for part, tensor in awq_files.FORMS[version](made).items()}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    write(tmp_path / "it", model_of("qwen3_moe"), "gemm", change)
    with pytest.raises(quantdock.QuantdockError, match=message):
        quantdock.load(tmp_path / "it")


def test_groups_that_do_not_divide(tmp_path: Path) -> None:
    write(tmp_path / "it", model_of("qwen3_moe"), "gemm")
    awq_files.say(tmp_path / "it", lambda config: config["quantization_config"].update(group_size=48))
    with pytest.raises(quantdock.LedgerError, match=r"experts\.down_proj: groups of 48 don't divide its 64 inputs"):
        quantdock.plan(tmp_path / "it")


def test_products_of_one_expert_that_are_damaged(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.qzeros"] = tensors[f"{UP}.qzeros"] * 1.05

    write(tmp_path / "it", model_of("qwen3_moe"), "gemv_fast", change)
    with pytest.raises(quantdock.LoadError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: qzeros holds what isn't"):
        quantdock.load(tmp_path / "it")


def test_experts_can_be_copied_pickled_and_converted(tmp_path: Path) -> None:
    write(tmp_path / "it", model_of("qwen3_moe", torch.bfloat16), "gemm")
    model = quantdock.load(tmp_path / "it")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    expected, state = logits(model), copy.deepcopy(experts.state_dict())
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        model.set_submodule("model.layers.0.mlp.experts", other)
        assert torch.equal(logits(model), expected)
    before = (experts.gate_up_proj * 1).float()
    torch.nn.Module.to(model, torch.float32)
    converted = model.get_submodule("model.layers.0.mlp.experts")
    assert all(same_bits(converted.state_dict()[name], tensor) for name, tensor in state.items())
    assert converted.gate_up_proj.dtype == torch.float32
    assert (converted.gate_up_proj * 1 - before).norm() < 0.01 * before.norm()  # scales and products aren't rounded now
    assert bool(logits(model).isfinite().all())


def test_experts_that_quantizing_leaves_alone_are_listed(tmp_path: Path) -> None:
    """Calibration is for linear layers, so experts stay as they are, and readers have to know it."""
    model_of("qwen3_moe").save_pretrained(tmp_path / "it")
    samples = [torch.randint(0, 64, (32,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
    config = {"quant_method": "awq", "bits": 4, "group_size": SIZE, "dataset": samples}
    model = quantdock.load(tmp_path / "it", quantize=config)
    reasons = {entry.parameter: entry.note for entry in quantdock.report(model).ledger.entries}
    assert "calibration looks at the inputs of linear layers" in reasons["model.layers.0.mlp.experts.down_proj"]
    quantdock.save(model, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.experts" in saved["modules_to_not_convert"]
    again = quantdock.load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
