"""bitsandbytes through quantdock is bitsandbytes through transformers, bit for bit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TinyFactory
from tests.reference import assert_same_tensor
from tests.tiny_models import logits_of

import quantdock

METHODS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4-dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}
# Dense, experts that are merged and stay in full precision, Conv1D weights stored transposed, tied embeddings,
# an encoder-decoder's decoder, and one that is fp32 in the file.
ARCHITECTURES = ["llama", "mixtral", "gpt2", "gemma2", "bart", "gpt_neox"]


@pytest.fixture(autouse=True)
def _quiet_bitsandbytes() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a warning at every int8 forward


def reference(source: Path, method: str | None) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Not even None may be passed for a saved checkpoint: transformers would take it for the checkpoint's own config.
    quantize = {} if method is None else {"quantization_config": BitsAndBytesConfig(**METHODS[method])}
    return AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map="cpu", **quantize)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, ordered: bool = True) -> None:
    assert (list(ours) == list(theirs)) if ordered else (ours.keys() == theirs.keys())
    for name, tensor in theirs.items():
        assert_same_tensor(ours[name], tensor, name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_quantize_save_and_reload(model_type: str, method: str, tiny: TinyFactory, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    theirs = reference(tiny(model_type), method)
    expected = state_of(theirs)
    expected_logits = logits_of(theirs)
    reference(tiny(model_type), method).save_pretrained(tmp_path / "theirs")

    ours = quantdock.load(tiny(model_type), quantize=BitsAndBytesConfig(**METHODS[method]))
    assert_same(state_of(ours), expected)
    for (name, module), (other_name, other) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        assert name == other_name
        assert isinstance(module, type(other))
    assert_same_tensor(logits_of(ours), expected_logits, "logits")
    report = quantdock.report(ours)
    assert report.predicted_nbytes == report.measured_nbytes

    # After a forward, which repacks weights on some machines, everything is saved as it was.
    quantdock.save(ours, tmp_path / "ours")
    ours.save_pretrained(tmp_path / "by_save_pretrained")
    for folder in ("ours", "by_save_pretrained"):
        assert_same(state_of(reference(tmp_path / folder, None)), expected)
    for folder in ("ours", "by_save_pretrained", "theirs"):
        again = quantdock.load(tmp_path / folder)
        assert_same(state_of(again), expected)
        assert_same_tensor(logits_of(again), expected_logits, f"logits from {folder}")
        report = quantdock.report(again)
        assert report.predicted_nbytes == report.measured_nbytes


def test_recognised_where_transformers_and_peft_look(tiny: TinyFactory) -> None:
    import bitsandbytes as bnb

    model = quantdock.load(tiny("llama"), quantize="bnb-nf4")
    theirs = reference(tiny("llama"), "nf4")
    for flag in ("is_quantized", "is_loaded_in_4bit", "quantization_method"):
        assert getattr(model, flag) == getattr(theirs, flag)
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_serializable()
    assert type(model.config.quantization_config) is type(theirs.config.quantization_config)
    assert model.config._is_quantized
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, bnb.nn.Params4bit)
    assert model.get_memory_footprint() == theirs.get_memory_footprint()
    with pytest.raises(ValueError, match="not supported for quantized"):
        model.half()


def test_presets_and_patterns_mix(tiny: TinyFactory, tmp_path: Path) -> None:
    quantize = {"lm_head": None, "*.mlp.*": "bnb-nf4", "*.self_attn.*": "bnb-int8"}
    model = quantdock.load(tiny("llama"), quantize=quantize)
    state = state_of(model)
    assert state["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert state["model.layers.0.self_attn.q_proj.weight"].dtype == torch.int8
    assert state["lm_head.weight"].is_floating_point()
    coverage = quantdock.report(model).ledger.coverage
    assert coverage.keys() == {"", "bnb-nf4", "bnb-int8"}
    quantdock.save(model, tmp_path / "mixed")
    again = quantdock.load(tmp_path / "mixed")
    assert_same(state_of(again), state)
    assert_same_tensor(logits_of(again), logits_of(model), "logits")


def test_the_users_skips_add_to_the_architectures(tiny: TinyFactory, tmp_path: Path) -> None:
    model = quantdock.load(tiny("llama"), quantize="bnb-nf4", skip=["*.layers.0.*", "*.down_proj"])
    state = state_of(model)
    assert state["lm_head.weight"].is_floating_point()
    assert state["model.layers.0.mlp.up_proj.weight"].is_floating_point()
    assert state["model.layers.1.mlp.down_proj.weight"].is_floating_point()
    assert state["model.layers.1.mlp.up_proj.weight"].dtype == torch.uint8
    quantdock.save(model, tmp_path / "skipped")
    # transformers has to be told which linear layers weren't quantized, or it would expect them to be.
    assert_same(state_of(reference(tmp_path / "skipped", None)), state)
    assert_same(state_of(quantdock.load(tmp_path / "skipped")), state)


def test_a_name_spelled_out_overrules_the_architecture(tiny: TinyFactory) -> None:
    model = quantdock.load(tiny("llama"), quantize={"lm_head": "bnb-nf4", "*": None})
    assert model.state_dict()["lm_head.weight"].dtype == torch.uint8


def test_runtime_attributes_can_be_overridden_and_storage_cannot(tiny: TinyFactory, tmp_path: Path) -> None:
    quantdock.save(quantdock.load(tiny("llama"), quantize="bnb-nf4"), tmp_path / "saved")
    override = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
    model = quantdock.load(tmp_path / "saved", quantize=override)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    with pytest.raises(quantdock.ConfigError, match="bnb_4bit_use_double_quant"):
        quantdock.load(tmp_path / "saved", quantize=override | {"bnb_4bit_use_double_quant": True})
    with pytest.raises(quantdock.ConfigError, match="load_in_8bit"):
        quantdock.load(tmp_path / "saved", quantize="bnb-int8")


def test_a_missing_component_is_named(tiny: TinyFactory, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = quantdock.save(quantdock.load(tiny("llama"), quantize="bnb-nf4"), tmp_path / "saved")
    tensors = load_file(folder / "model.safetensors")
    absmax = "model.layers.0.mlp.up_proj.weight.absmax"
    save_file({k: v for k, v in tensors.items() if k != absmax}, folder / "model.safetensors")
    with pytest.raises(quantdock.LedgerError, match=r"layers\.0\.mlp\.up_proj\.weight.*absmax"):
        quantdock.load(folder)
    extra = "model.layers.0.mlp.up_proj.weight.nested_absmax"
    save_file(tensors | {extra: torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(quantdock.LedgerError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        quantdock.load(folder)


def test_weights_without_their_config_are_refused(tiny: TinyFactory, tmp_path: Path) -> None:
    """Someone stripped the quantization_config: packed bytes must not be cast to weights."""
    folder = quantdock.save(quantdock.load(tiny("llama"), quantize="bnb-int8"), tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(quantdock.LedgerError, match="SCB"):
        quantdock.load(folder)


@pytest.mark.parametrize("method", METHODS)
def test_dequantize(method: str, tiny: TinyFactory) -> None:
    from transformers import BitsAndBytesConfig

    theirs = reference(tiny("gpt2" if method == "int8" else "llama"), method).dequantize()
    ours = quantdock.load(tiny("gpt2" if method == "int8" else "llama"), quantize=BitsAndBytesConfig(**METHODS[method]))
    ours = quantdock.dequantize(ours)
    assert not ours.is_quantized
    assert not hasattr(ours.config, "quantization_config")
    expected = state_of(theirs)
    for name, tensor in ours.state_dict().items():
        # We give back what was there before, transposed weights and all; transformers gives back nn.Linear.
        module = ours.get_submodule(name.rpartition(".")[0])
        transposed = type(module).__name__ == "Conv1D" and name.endswith(".weight")
        wanted = expected[name].T if transposed else expected[name]
        assert_same_tensor(tensor, wanted.to(tensor.dtype), name)
    assert logits_of(ours).isfinite().all()
