"""Experts that a checkpoint stores one by one in 8-bit floats, and architectures that have them in one parameter."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantdock
from quantdock import ops
from quantdock_fp8.few_rows import CPU_ROWS

pytest.importorskip("quantdock_transformers", reason="the models are transformers', whose architectures it brings")

HIDDEN, INNER, EXPERTS = 256, 128, 4
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu

Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A weight in, codes and the scale of each element out."""


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


# Checkpoints ---------------------------------------------------------------------------------------------------------


def model_of(family: str, *, inner: int = INNER) -> Any:
    """A small mixture of experts in bfloat16."""
    from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
    from transformers.models.auto import AutoModelForCausalLM

    common: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
    }
    if family == "mixtral":
        config: Any = MixtralConfig(**common, num_local_experts=EXPERTS, intermediate_size=inner)
    elif family == "qwen3_moe":
        config = Qwen3MoeConfig(**common, num_experts=EXPERTS, moe_intermediate_size=inner, head_dim=64)
    else:
        ranks = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32}
        config = DeepseekV3Config(
            **common | ranks | {"num_key_value_heads": 4},
            n_routed_experts=EXPERTS,
            moe_intermediate_size=inner,
            intermediate_size=256,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            v_head_dim=32,
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "norm.weight")):
                continue
            parameter.mul_(4)
    return model.eval()


def blocks(down: int, across: int, *, exponent: bool = False) -> tuple[Quantize, dict[str, Any]]:
    """DeepSeek's: the largest magnitude of each block becomes 448."""

    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = weight.shape
        padded = torch.zeros(-(-rows // down) * down, -(-columns // across) * across)
        padded[:rows, :columns] = weight.float()
        tiles = padded.unflatten(1, (-1, across)).unflatten(0, (-1, down))
        scale = tiles.abs().amax((1, 3)).clamp_(min=1e-6) / 448
        if exponent:
            scale = scale.log2().ceil().exp2()
        codes = (tiles / scale[:, None, :, None]).to(E4M3).reshape(padded.shape)[:rows, :columns]
        return codes, scale.to(E8M0) if exponent else scale

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [down, across]}
    return quantize, config | ({"scale_fmt": "ue8m0"} if exponent else {})


def whole(*shape: int) -> Quantize:
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = weight.float().abs().amax() / 448
        return (weight.float() / scale).to(E4M3), scale.reshape(shape)

    return quantize


def rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    return (weight.float() / scale).to(E4M3), scale


def mx(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = blocks(1, 32, exponent=True)[0](weight)
    return codes, scale.view(torch.uint8)


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    """As llm-compressor writes it: a group for linear layers, which its experts are."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy, **more}
    activations = {"num_bits": 8, "type": "float", "dynamic": strategy != "tensor"}
    activations["strategy"] = "tensor" if strategy == "tensor" else "token"
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}
    skipped = ["lm_head", "re:.*mlp[.]gate$"]
    base = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}
    return base | {"config_groups": groups, "ignore": skipped}


def block_of(config: Mapping[str, Any]) -> Any:
    """Rows and columns of a block, if there are blocks."""
    if config["quant_method"] == "compressed-tensors":
        return config["config_groups"]["group_0"]["weights"].get("block_structure") or (0, 0)
    return config.get("weight_block_size") or ((1, 32) if config["quant_method"] == "mxfp8" else (0, 0))


STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
NVIDIA = {"quant_method": "modelopt", "quant_algo": "FP8"}

FORMATS: dict[str, tuple[Quantize, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    # What quantizes, the config, and scales of activations with their shapes.
    "blocks": (*blocks(128, 128), {"weight_scale_inv": ()}),
    "powers of two": (*blocks(64, 32, exponent=True), {"weight_scale_inv": ()}),
    "ragged blocks": (*blocks(96, 100), {"weight_scale_inv": ()}),
    "blocks larger than a piece": (*blocks(256, 256), {"weight_scale_inv": ()}),
    "named as in DeepSeek-V4": (*blocks(64, 64, exponent=True), {"scale": ()}),
    "one": (whole(), {"quant_method": "fp8", "activation_scheme": "dynamic"}, {"weight_scale_inv": ()}),
    "one, static": (whole(1), STATIC, {"weight_scale": (), "input_scale": (1,)}),
    "rows": (rows, {"quant_method": "fbgemm_fp8"}, {"weight_scale": ()}),
    "MX": (mx, {"quant_method": "mxfp8"}, {"weight_scale_inv": ()}),
    "ModelOpt": (whole(), NVIDIA, {"weight_scale": (), "input_scale": ()}),
    "compressed-tensors": (whole(1), compressed("tensor"), {"weight_scale": (), "input_scale": (1,)}),
    "compressed-tensors, rows": (rows, compressed("channel"), {"weight_scale": ()}),
    "compressed-tensors, blocks": (
        blocks(96, 100)[0],
        compressed("block", block_structure=[96, 100]),
        {"weight_scale": ()},
    ),
}


def nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bytes of two codes, scales of 16 elements, the number that these are multiplied with, and the scale of each
    element."""
    groups = weight.float().unflatten(1, (-1, 16))
    largest = groups.abs().amax(2)
    factor = largest.amax() / (448 * 6)
    scale = (largest / 6 / factor).to(E4M3)
    each = (scale.float() * factor)[:, :, None]
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nearest = ((groups / each).abs()[..., None] - values).abs().argmin(-1).to(torch.uint8)
    codes = (nearest | (groups < 0).to(torch.uint8) << 3).flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4, scale, factor, each.expand(groups.shape).flatten(1)


def from_fours(packed: Tensor, each: Tensor) -> Tensor:
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
    return (torch.where(nibbles >= 8, -values[nibbles & 7], values[nibbles & 7]) * each).bfloat16()


FOURS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]]] = {
    # The config, and how codes, scales and their factor are stored.
    "ModelOpt, 4 bits": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        lambda codes, scale, factor: {"weight": codes, "weight_scale": scale, "weight_scale_2": factor},
    ),
    "compressed-tensors, 4 bits": (
        compressed("tensor_group", num_bits=4, group_size=16) | {"format": "nvfp4-pack-quantized"},
        lambda codes, scale, factor: {
            "weight_packed": codes,
            "weight_scale": scale,
            "weight_global_scale": (1 / factor).reshape(1),
            "input_global_scale": torch.ones(1),
        },
    ),
}
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")
CASES = [("qwen3_moe", name) for name in (*FORMATS, *FOURS)] + [(family, "blocks") for family in FAMILIES[1:]]


def is_quantized(name: str) -> bool:
    return name.endswith(".weight") and ("experts." in name or "self_attn." in name) and "norm" not in name


def write(
    folder: Path, model: Any, form: str, change: Callable[[dict[str, Tensor]], object] = len
) -> dict[str, Tensor]:
    """Store a model with weights in 8-bit floats, and return what they stand for."""
    config = FOURS[form][0] if form in FOURS else FORMATS[form][1]
    model.save_pretrained(folder)
    stored: dict[str, Tensor] = {}
    plain = load_file(folder / "model.safetensors")
    assert any("experts.3." in name for name in plain)
    for number, (name, tensor) in enumerate(plain.items()):
        if name.endswith("e_score_correction_bias"):  # which the architecture wants in float32
            plain[name] = tensor.float()
        stored[name] = plain[name]
        if not is_quantized(name):
            continue
        base = name.removesuffix("weight")
        if form in FOURS:
            packed, scale, factor, each = nvfp4(stored.pop(name))
            parts = FOURS[form][1](packed, scale, factor)
            stored |= {base + part: value for part, value in parts.items()}
            if "weight_global_scale" in parts:  # what is divided by
                each = (scale.float() / parts["weight_global_scale"]).repeat_interleave(16, 1)
            plain[name] = from_fours(packed, each)
            continue
        quantize, _, names = FORMATS[form]
        stored[name], scale = quantize(tensor)
        scale_name, *others = names
        stored[base + scale_name] = scale
        stored |= {base + other: torch.full(names[other], 0.5 + number) for other in others}
        plain[name] = dequantized(stored[name], scale, config)
    change(stored)
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    written = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(written))
    return plain


def dequantized(codes: Tensor, scale: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Codes times scales, spelled out."""
    single = (scale.view(E8M0) if scale.dtype == torch.uint8 else scale).float()
    down, across = block_of(config)
    if down:
        single = single.repeat_interleave(down, 0).repeat_interleave(across, 1)[: len(codes), : codes.shape[1]]
    return (codes.float() * single).bfloat16()


def reference(folder: Path, model: Any, plain: Mapping[str, Tensor]) -> Any:
    """The model of the dequantized weights, loaded by transformers."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    save_file(dict(plain), folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(folder)
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


# Loading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "form"), CASES)
def test_loads_computes_saves_and_dequantizes(tmp_path: Path, family: str, form: str) -> None:
    original = model_of(family)
    plain = write(tmp_path / "it", original, form)
    theirs = reference(tmp_path / "plain", original, plain)

    plan = quantdock.plan(tmp_path / "it")
    assert plan.largest_unit_nbytes < 1 << 20
    model = plan.execute()
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes
    stored = load_file(tmp_path / "it" / "model.safetensors")
    assert {source for entry in report.ledger.entries for source in entry.sources} == stored.keys()
    fused = {entry.parameter for entry in report.ledger.entries if entry.method and ".experts." in entry.parameter}
    layers = 1 if family == "deepseek_v3" else 2
    expected_entries = {f"{kind}_proj" for kind in ("gate_up", "down")}
    assert {name.rpartition(".")[2] for name in fused if "shared" not in name} == expected_entries
    assert sum(name.endswith("experts.down_proj") for name in fused) == layers

    # Where weights are rounded as transformers' are: otherwise, a token could get to another expert.
    model.train(), theirs.train()
    expected = logits(theirs)
    for way in ("grouped_mm", "eager", "batched_mm"):
        model.set_experts_implementation(way)
        theirs.set_experts_implementation(way)
        assert (logits(model) - logits(theirs)).abs().max() <= 0.02 * expected.abs().max(), way
    model.eval()

    quantdock.save(model, tmp_path / "saved")
    assert same_files(tmp_path / "it", tmp_path / "saved")
    again = quantdock.load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(quantdock.load(tmp_path / "it")))

    restored = quantdock.dequantize(model)
    found, wanted = restored.state_dict(), theirs.state_dict()
    assert list(found) == list(wanted)
    assert all(same_bits(found[name], tensor) for name, tensor in wanted.items())
    assert {type(module) for module in restored.modules()} == {type(module) for module in theirs.modules()}
    quantdock.save(restored, tmp_path / "restored")
    assert same_files(tmp_path / "plain", tmp_path / "restored")


@pytest.mark.parametrize("form", [*FORMATS, *FOURS])
def test_few_rows_take_the_path_of_linear_layers(tmp_path: Path, form: str) -> None:
    """The weight isn't rounded there; it is in training."""
    write(tmp_path / "it", model_of("qwen3_moe"), form)
    model: Any = quantdock.load(tmp_path / "it")
    paths = quantdock.report(model).paths
    compiled = form not in FOURS and ops.has_fast_products()
    assert paths["model.layers.1.mlp.experts"] == paths["model.layers.1.self_attn.q_proj"]
    assert paths["model.layers.1.mlp.experts"].startswith("compiled in" if compiled else "decode in")
    experts = model.model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    for leaf in ("gate_up_proj", "down_proj"):
        weight = getattr(experts.eval(), leaf)[2]
        exact, rounded = (weight.stored.decode(dtype) for dtype in (torch.float32, torch.bfloat16))
        x = torch.randn(CPU_ROWS + 1, weight.shape[1], generator=generator).bfloat16()
        bound = (torch.finfo(torch.bfloat16).eps + 2**-20) * (x.float().abs() @ exact.abs().t())
        one = nn.functional.linear(x[:1], weight)
        for rows, expected in ((1, exact), (CPU_ROWS, exact), (CPU_ROWS + 1, rounded)):
            sums = x[:rows].float() @ (expected if compiled else rounded).float().t()
            found = nn.functional.linear(x[:rows], weight)
            assert found.dtype == torch.bfloat16
            assert ((found - sums).abs() <= bound[:rows]).all(), rows
        of_training = nn.functional.linear(x[:1], getattr(experts.train(), leaf)[2])
        assert same_bits(of_training, nn.functional.linear(x[:1].requires_grad_(), weight).detach())
        if not compiled or not torch.equal(exact, rounded.float()):  # or rounding changes nothing
            assert same_bits(of_training, one) != compiled


def _cut(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1]


GATE, UP, DOWN = (f"model.layers.1.mlp.experts.2.{kind}_proj." for kind in ("gate", "up", "down"))
WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scale": (
        lambda stored: stored.pop(f"{UP}weight_scale_inv"),
        rf"{UP}weight: component 'weight_scale_inv' is mi",
    ),
    "no codes": (lambda stored: stored.pop(f"{DOWN}weight"), rf"{DOWN}weight"),
    "no expert": (lambda stored: [stored.pop(f"{DOWN}{name}") for name in ("weight", "weight_scale_inv")], "down_proj"),
    "one more scale": (
        lambda stored: stored.update({f"{UP}weight_scale": torch.ones(())}),
        f"{UP}weight: it has both 'weight_scale_inv' and 'weight_scale'",
    ),
    "a scale of an expert that isn't there": (
        lambda stored: stored.update({"model.layers.1.mlp.experts.9.up_proj.weight_scale_inv": torch.ones(1, 2)}),
        "model.layers.1.mlp.experts.9",
    ),
    "an expert in full precision": (
        lambda stored: stored.update(
            {f"{GATE}weight": torch.zeros(INNER, HIDDEN), f"{GATE}weight_scale_inv": torch.ones(1, 2)}
        ),
        rf"{GATE}weight: component 'weight' is float32\[128, 256\], expected float8_e4m3fn",
    ),
    "scales of other blocks": (
        lambda stored: _cut(stored, f"{UP}weight_scale_inv"),
        rf"{UP}weight: component 'weight_sc",
    ),
    "scales of another dtype": (
        lambda stored: stored.update({f"{UP}weight_scale_inv": torch.ones(1, 2).bfloat16()}),
        f"{UP}weight' is stored as .*bfloat16.* have to be alike",
    ),
    "an expert of another shape": (lambda stored: _cut(stored, f"{UP}weight"), UP),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    write(tmp_path / "it", model_of("qwen3_moe"), "blocks", change)
    with pytest.raises(quantdock.LedgerError, match=message):
        quantdock.plan(tmp_path / "it")


def test_parts_of_one_parameter_belong_to_one_group(tmp_path: Path) -> None:
    write(tmp_path / "it", model_of("qwen3_moe"), "compressed-tensors")
    written = json.loads((tmp_path / "it" / "config.json").read_text())
    groups = written["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"] | {"targets": ["re:.*experts.*up_proj"]}
    (tmp_path / "it" / "config.json").write_text(json.dumps(written))
    message = "gate_proj.weight' belongs to the group 'group_0', but another part of .* to the group 'group_1'"
    with pytest.raises(quantdock.LedgerError, match=message):
        quantdock.plan(tmp_path / "it")


# Quantizing ----------------------------------------------------------------------------------------------------------

PRESETS: dict[str, Any] = {
    "fp8": "fp8",
    "fp8-block": "fp8-block",
    "powers of two": {"quant_method": "fp8", "weight_block_size": [64, 32], "scale_fmt": "ue8m0"},
}


def by_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    config = FineGrainedFP8Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu", quantization_config=config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_quantizes_experts_as_if_they_were_linear_layers(tmp_path: Path, family: str, preset: str) -> None:
    """Codes and scales of each expert are those of a linear layer with its weight, and transformers reads them."""
    model_of(family).save_pretrained(tmp_path / "it")
    model = quantdock.load(tmp_path / "it", quantize=PRESETS[preset])
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes
    ours = logits(model)
    quantdock.save(model, tmp_path / "saved")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("it", "saved"))
    experts = [name for name in before if ".experts." in name]
    assert len(experts) >= 3 * EXPERTS
    for name in experts:
        alone = quantdock.load(
            _one_layer(tmp_path / "alone" / name, before[name]), quantize=PRESETS[preset], model=_Layer
        )
        for part in ("weight", "weight_scale_inv"):
            found = after[name.removesuffix("weight") + part]
            assert same_bits(found, alone.get_submodule("layer").state_dict()[part]), (name, part)

    again = quantdock.load(tmp_path / "saved")
    assert torch.equal(logits(again), ours)
    expected = by_transformers(tmp_path / "saved").state_dict()
    found = quantdock.dequantize(again).state_dict()
    assert list(found) == list(expected)
    assert all(same_bits(found[key], tensor) for key, tensor in expected.items())


class _Layer(torch.nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(config["in"], config["out"], bias=False, dtype=torch.bfloat16)


def _one_layer(folder: Path, weight: Tensor) -> Path:
    folder.mkdir(parents=True)
    save_file({"layer.weight": weight}, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"in": weight.shape[1], "out": weight.shape[0], "dtype": "bfloat16"})
    )
    return folder


@pytest.mark.parametrize(("preset", "inner"), [("fp8-row", INNER), ("fp8-block", 136), ("fp8", 136)])
def test_saves_what_it_quantized(tmp_path: Path, preset: str, inner: int) -> None:
    """Rows, and blocks that are smaller at the edges of each expert, which transformers refuses."""
    original = model_of("qwen3_moe", inner=inner)
    original.save_pretrained(tmp_path / "it")
    model = quantdock.load(tmp_path / "it", quantize=preset)
    quantized = quantdock.report(model).ledger.coverage
    assert len(quantized) == 2
    quantdock.save(model, tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert not any("gate_up_proj" in name for name in names)
    again = quantdock.load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - logits(original)).abs().max() < 0.2 * logits(original).abs().max()
    found = quantdock.dequantize(again).state_dict()
    for name, tensor in original.state_dict().items():
        error = (found[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert error < 0.04, name


def test_save_pretrained_writes_experts_one_by_one(tmp_path: Path) -> None:
    model_of("qwen3_moe").save_pretrained(tmp_path / "it")
    model = quantdock.load(tmp_path / "it", quantize="fp8-block")
    quantdock.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "save_pretrained")
    assert same_files(tmp_path / "saved", tmp_path / "save_pretrained")


def test_experts_that_were_left_alone_are_listed(tmp_path: Path) -> None:
    model_of("qwen3_moe").save_pretrained(tmp_path / "it")
    model = quantdock.load(tmp_path / "it", quantize="fp8-block", skip=["*.layers.0.mlp.experts.*"])
    quantdock.save(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "model.layers.0.mlp.experts" in config["quantization_config"]["modules_to_not_convert"]
    expected = by_transformers(tmp_path / "saved").state_dict()
    found = quantdock.dequantize(quantdock.load(tmp_path / "saved")).state_dict()
    assert all(same_bits(found[key], tensor) for key, tensor in expected.items())


class _Experts(torch.nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16))


class _Fused(torch.nn.Module):
    """Experts that are stored in one tensor."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.experts = _Experts(config["experts"], config["rows"], config["columns"])


@pytest.mark.parametrize("preset", ["fp8", "fp8-row", "fp8-block"])
def test_large_experts_pass_through_in_slices(tmp_path: Path, preset: str) -> None:
    shape = (24, 1024, 1030)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"experts.gate_up_proj": weight}, tmp_path / "model.safetensors")
    data = {"experts": shape[0], "rows": shape[1], "columns": shape[2], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(data))
    plan = quantdock.plan(tmp_path, quantize=preset, model=_Fused)
    assert plan.largest_unit_nbytes < weight.nbytes
    model = plan.execute()
    quantizer = next(iter(plan.selection)).quantizer
    (parameter,) = quantizer.parameters.values()
    whole_ = quantizer.quantize_param(parameter, weight)
    assert whole_ is not None
    sliced = quantizer.components(model, parameter)
    assert all(same_bits(sliced[name], tensor) for name, tensor in whole_.items())
    quantdock.save(model, tmp_path / "saved")
    again = quantdock.load(tmp_path / "saved", model=_Fused)
    assert all(same_bits(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    restored = quantizer.dequantize(sliced, parameter)
    assert (restored - weight).float().norm() < 0.04 * weight.float().norm()


# What the modules are ------------------------------------------------------------------------------------------------


def test_experts_can_be_copied_pickled_and_converted(tmp_path: Path) -> None:
    write(tmp_path / "it", model_of("qwen3_moe"), "powers of two")
    model = quantdock.load(tmp_path / "it")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    expected = logits(model)
    state = copy.deepcopy(experts.state_dict())
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert type(other) is type(experts)
        model.set_submodule("model.layers.0.mlp.experts", other)
        assert torch.equal(logits(model), expected)
    model.to(torch.float32)
    assert model.get_submodule("model.layers.0.mlp.experts").gate_up_proj.dtype == torch.float32
    found = model.get_submodule("model.layers.0.mlp.experts").state_dict()
    assert all(same_bits(found[name], tensor) for name, tensor in state.items())
    assert (logits(model) - expected).abs().max() < 0.05 * expected.abs().max()


def test_experts_look_like_tensors_and_are_not_changed(tmp_path: Path) -> None:
    plain = write(tmp_path / "it", model_of("qwen3_moe"), "ragged blocks")
    experts: Any = quantdock.load(tmp_path / "it").get_submodule("model.layers.0.mlp.experts")
    name = "model.layers.0.mlp.experts.2.{}_proj.weight"
    expected = torch.cat([plain[name.format("gate")], plain[name.format("up")]])
    weight = experts.gate_up_proj
    assert isinstance(weight, torch.nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device.type) == ((EXPERTS, 2 * INNER, HIDDEN), torch.bfloat16, "cpu")
    assert torch.equal(weight[2].float(), expected.float())
    assert torch.equal(weight[-2][7:9, 3].float(), expected[7:9, 3].float())
    assert torch.equal(weight[1:3][1] * 2, expected * 2)
    assert torch.equal(torch.einsum("eoi->oei", weight)[:, 2], expected)
    assert torch.equal(weight.transpose(1, 2)[2].float(), expected.t().float())
    x = torch.randn(EXPERTS, 5, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    for found in (
        torch.bmm(x, weight.transpose(1, 2))[2],
        x[2] @ weight[2].t(),
        torch.nn.functional.linear(x[2], weight[2]),
    ):
        assert (found - x[2] @ expected.t()).abs().max() <= 0.01 * found.abs().max()
    for change in (
        lambda: weight.add_(1),
        lambda: weight.data.mul_(2),
        weight[0].zero_,
        lambda: weight.__setitem__(0, 0.0),
        lambda: torch.nn.init.normal_(weight),
        lambda: weight.copy_(torch.zeros_like(weight)),
    ):
        with pytest.raises(quantdock.UnsupportedError, match="dequantize"):
            change()
    assert torch.equal(experts.gate_up_proj[2].float(), expected.float())


def test_gradients_reach_what_is_below(tmp_path: Path) -> None:
    original = model_of("qwen3_moe")
    plain = write(tmp_path / "it", original, "blocks")
    theirs = reference(tmp_path / "plain", original, plain)
    model = quantdock.load(tmp_path / "it")
    found = []
    for one in (model, theirs):
        embedded = one.get_input_embeddings()(torch.arange(12)[None]).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.float().square().sum().backward()
        found.append(embedded.grad)
    ours, expected = found
    assert ours is not None
    assert expected is not None
    assert (ours - expected).float().norm() < 0.03 * expected.float().norm()
