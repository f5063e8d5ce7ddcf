"""Whole models: what precedes which layers, scales that cancel out, and less lost than by rounding to nearest."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantdock
from quantdock.testing import SmallModel, write_checkpoint
from quantdock_awq import calibrating, rounding
from quantdock_awq.config import AwqConfig
from quantdock_awq.modules import AwqLinear

transformers = pytest.importorskip("transformers", reason="the models are transformers'")
pytest.importorskip("quantdock_transformers", reason="it brings the architectures")

VOCABULARY = 96
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 64}


def llama(**options: Any) -> Any:
    return transformers.LlamaConfig(
        **SIZES | HEADS | {"num_key_value_heads": 2, "tie_word_embeddings": False} | options
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama with biases": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=4),
    "gemma": lambda: transformers.GemmaConfig(**SIZES | HEADS | {"num_key_value_heads": 1}),
    "phi": lambda: transformers.PhiConfig(**SIZES | {"num_attention_heads": 4, "max_position_embeddings": 64}),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64),
}


def write(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose norms make a few channels stand out, as language models do; returned as it was written."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                parameter.copy_(torch.randn(parameter.shape) / math.sqrt(min(parameter.shape)))
            elif parameter.dim() == 1 and "weight" in name:
                parameter.mul_(0.5).add_(0.2 * torch.rand(parameter.shape))
                parameter[::13] = 6.0
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.copy_(torch.randn(parameter.shape))
    model.to(dtype).eval().save_pretrained(folder)
    return model


def tokens(seed: int, count: int, length: int = 24) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count, length), generator=generator).tolist()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(torch.tensor(tokens(7, 4))).logits).float()


def layers(model: nn.Module) -> dict[str, AwqLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AwqLinear)}


def config(**options: Any) -> AwqConfig:
    return AwqConfig(**{"group_size": 32, "dataset": tokens(1, 24)} | options)


def rounded(model: Any, config: AwqConfig) -> Any:
    """The model with its blocks' layers rounded to nearest."""
    for name, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D"
        if (isinstance(module, nn.Linear) and name != "lm_head") or transposed:
            weight = module.weight.detach().t() if transposed else module.weight.detach()
            found = rounding.round_to_nearest(weight, config.group_size, zero_point=config.zero_point).dequantized()
            module.weight = nn.Parameter((found.t() if transposed else found).contiguous())
    return model


ALL = {"self_attn.v_proj", "mlp.up_proj"}
NORMS = {"input_layernorm", "post_attention_layernorm"}
CHANGED: dict[str, tuple[set[str], set[str], set[str]]] = {
    # norms that take the inverse of scales; layers that do; layers for which nobody can
    "llama": (NORMS, ALL, set()),
    "llama with biases": (NORMS, ALL, set()),
    "gemma": (NORMS, ALL, set()),
    # Attention and MLP are side by side behind one norm; what is between the layers of the MLP can't be scaled through.
    "phi": ({"input_layernorm"}, {"self_attn.v_proj"}, {"mlp.fc2"}),
    # One layer makes queries, keys and values, which can't be scaled apart.
    "gpt2": ({"ln_1", "ln_2"}, set(), {"attn.c_proj", "mlp.c_proj"}),
}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_scales_cancel_out_and_help(kind: str, tmp_path: Path) -> None:
    """What a table would name takes the inverse of scales; and less is lost than by rounding to nearest."""
    original = write(tmp_path / "model", kind)
    expected = logits(original)
    model = quantdock.load(tmp_path / "model", quantize=config())
    lost = (logits(model) - expected).norm()
    quantdock.save(model, tmp_path / "saved")
    assert torch.equal(logits(quantdock.load(tmp_path / "saved")), logits(model))
    notes = {entry.parameter: entry.note for entry in quantdock.report(model).ledger.entries}
    alone = {in_block(name.removesuffix(".weight")) for name, note in notes.items() if "nothing before it" in note}
    plain = quantdock.dequantize(model)
    norms, scaled = set(), set()
    for name, module in original.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or "head" in name or in_block(name) == name:
            continue
        other = plain.get_parameter(f"{name}.weight")
        if weight.dim() == 1 and not torch.equal(other, weight):
            norms.add(in_block(name))
        elif isinstance(module, nn.Linear) and are_rows_scaled(weight.detach(), other.detach()):
            scaled.add(in_block(name))
    assert (norms, scaled, alone) == CHANGED[kind]
    assert lost < 0.9 * (logits(rounded(original, config())) - expected).norm()


def are_rows_scaled(weight: Tensor, other: Tensor) -> bool:
    """Whether rows have factors that differ, beside those of columns, as far as large weights tell."""
    ratio = (other / weight).abs().log()
    ratio[weight.abs() < weight.abs().median()] = math.nan
    rows = (ratio - ratio.nanmedian(dim=0).values).nanmedian(dim=1).values
    return bool(rows.std() > 0.1)


def in_block(name: str) -> str:
    """A module's name from its block on; the name itself outside of blocks."""
    return re.sub(r"^.*\.(layers|h)\.\d+\.", "", name)


@pytest.mark.parametrize("kind", ["llama", "gemma", "llama with biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_alone_changes_nothing(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With codes of which each is the weight itself: norms and biases are divided by what weights are multiplied with,
    though the norms' dtype rounds."""
    original = write(tmp_path, kind, dtype)
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    exact: dict[str, Tensor] = {}

    def keep(parameter: Any, weight: Tensor, group: Any, size: int, zero_point: bool) -> Any:
        exact[parameter.name] = weight
        return rounding.round_to_nearest(weight, size, zero_point=zero_point)

    monkeypatch.setattr(calibrating, "_round", keep)
    model = quantdock.dequantize(quantdock.load(tmp_path, quantize=config()))
    changed = [
        name for name, tensor in model.state_dict().items() if name not in exact and not tensor.equal(before[name])
    ]
    assert any("input_layernorm" in name for name in changed)
    assert all("layernorm" in name or name.endswith("bias") for name in changed)
    for name, weight in exact.items():
        model.get_parameter(name).data = weight
    reference = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    assert (logits(model.float()) - reference).norm() < (1e-4 if dtype == torch.float32 else 2e-2) * reference.norm()


def test_layers_that_others_share_an_input_with_are_not_scaled(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The small model's experts read the same norm as ``up``, and would be fed something else."""
    reference = write_checkpoint(tmp_path, features=64)
    data = [{"ids": torch.randint(0, 32, (1, 12), generator=torch.Generator().manual_seed(i))} for i in range(16)]
    with caplog.at_level(logging.WARNING, "quantdock"):
        model = quantdock.load(tmp_path, model=SmallModel, quantize=AwqConfig(group_size=32, dataset=data))
    assert torch.equal(model.get_parameter("blocks.0.norm.weight"), reference.get_parameter("blocks.0.norm.weight"))
    assert "blocks.0.up.weight: nothing before it can take the inverse of scales" in caplog.text
    notes = {entry.parameter: entry.note for entry in quantdock.report(model).ledger.entries}
    assert "nothing before it" in notes["blocks.0.up.weight"]


def test_what_is_skipped_keeps_its_weights(tmp_path: Path) -> None:
    """An unquantized ``up`` is divided by the scales of ``down``, since it precedes it; nothing else is changed."""
    original = write(tmp_path, "llama")
    model = quantdock.load(tmp_path, quantize=config(), skip=["*.up_proj", "*.q_proj"])
    assert "model.layers.0.mlp.up_proj" not in layers(model)
    name = "model.layers.0.mlp.up_proj.weight"
    ratio = original.get_parameter(name) / model.get_parameter(name)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4)
    name = "model.layers.0.self_attn.q_proj.weight"  # so its norm can't be changed, either
    assert torch.equal(original.get_parameter(name), model.get_parameter(name))


def test_what_is_saved_is_what_others_read(tmp_path: Path) -> None:
    write(tmp_path / "model", "llama", torch.float16)
    quantdock.save(quantdock.load(tmp_path / "model", quantize=config()), tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    shapes = {part: (stored[f"{name}.{part}"].dtype, list(stored[f"{name}.{part}"].shape)) for part in PARTS}
    assert shapes == {
        "qweight": (torch.int32, [64, 4]),
        "qzeros": (torch.int32, [2, 4]),
        "scales": (torch.float16, [2, 32]),
    }
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    read = transformers.AwqConfig.from_dict(dict(written))
    assert (read.bits, read.group_size, read.zero_point, read.format) == (4, 32, True, "gemm")
    assert read.modules_to_not_convert == ["lm_head"]
    assert written.get("dataset") is None


PARTS = ("qweight", "qzeros", "scales")


def test_transformers_own_config_object(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    theirs = transformers.AwqConfig(group_size=32, dataset=tokens(1, 8))
    model = quantdock.load(tmp_path, quantize=theirs)
    assert len(layers(model)) == 14


def test_symmetric(tmp_path: Path) -> None:
    original = write(tmp_path, "llama")
    expected = logits(original)
    asked = config(zero_point=False)
    model = quantdock.load(tmp_path, quantize=asked)
    assert {int(word) & 0xFFFFFFFF for word in layers(model)["model.layers.0.mlp.up_proj"].qzeros.flatten()} == {
        0x88888888
    }
    assert (logits(model) - expected).norm() < 0.8 * (logits(rounded(original, asked)) - expected).norm()


def test_activations_that_are_infinite(tmp_path: Path) -> None:
    model = write(tmp_path, "llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.post_attention_layernorm.weight")[3] = math.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(quantdock.CalibrationError, match="activations are infinite or not numbers") as error:
        quantdock.load(tmp_path, quantize=config())
    assert error.value.block == "model.layers.0"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_device(tmp_path: Path) -> None:
    """Calibrated there; sums differ in their last bits, and so may a code."""
    expected = logits(write(tmp_path, "llama"))
    with torch.no_grad():
        model = quantdock.load(tmp_path, quantize=config(), device_map="cuda")
        found = model(torch.tensor(tokens(7, 4)).cuda()).logits.float().cpu()
        here = logits(quantdock.load(tmp_path, quantize=config(), device_map="cpu"))
    assert (found - here).norm() < 0.5 * (here - expected).norm()
