"""gpt-oss: experts in MXFP4 are kept packed, and stand for the weights that transformers dequantizes them to."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantdock
from quantdock_fp8.mxfp4 import Mxfp4Config

pytest.importorskip("quantdock_transformers", reason="the models are transformers', whose architectures it brings")

HIDDEN, INNER, EXPERTS = 64, 96, 4
CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
FUSED = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small gpt-oss in bfloat16, with random bytes for its experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    folder = tmp_path_factory.mktemp("gpt-oss")
    GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        groups = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*groups, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(115, 126, groups, generator=generator, dtype=torch.uint8)
    assert tensors[f"{FUSED}gate_up_proj_blocks"].shape == (EXPERTS, 2 * INNER, HIDDEN // 32, 16)
    # Exponents at both ends, where the smallest products are subnormal and the largest infinite.
    tensors["model.layers.0.mlp.experts.down_proj_scales"][0, :4, 0] = torch.tensor([0, 1, 253, 254])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text()) | {"quantization_config": CONFIG}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def tamed(tensors: dict[str, Tensor]) -> None:
    """Without the exponents that make logits infinite."""
    tensors["model.layers.0.mlp.experts.down_proj_scales"].clamp_(115, 125)


def by_transformers(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What transformers loads, which dequantizes on CPU."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    config = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", quantization_config=config)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(torch.arange(24).view(2, 12)).logits).float()


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantizes_to_the_bits_of_transformers(source: Path, dtype: torch.dtype) -> None:
    model = quantdock.load(source, dtype=dtype)
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes
    packed = {entry.parameter for entry in report.ledger.entries if entry.method}
    assert len(packed) == 4
    theirs = by_transformers(source, dtype)
    restored = quantdock.dequantize(model)
    found, expected = restored.state_dict(), theirs.state_dict()
    assert list(found) == list(expected)
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())
    assert {type(module) for module in restored.modules()} == {type(module) for module in theirs.modules()}


def test_computes_with_packed_experts(source: Path, tmp_path: Path) -> None:
    folder = changed(source, tmp_path / "it", tamed)
    model, theirs = quantdock.load(folder), by_transformers(folder)
    stored = load_file(folder / "model.safetensors")
    experts = model.get_submodule("model.layers.1.mlp.experts")
    for name in ("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales"):
        assert same_bits(experts.state_dict()[name], stored[FUSED + name])
    expected = logits(theirs)
    for way in ("grouped_mm", "eager", "batched_mm"):
        model.set_experts_implementation(way)
        theirs.set_experts_implementation(way)
        assert (logits(model) - logits(theirs)).abs().max() <= 0.02 * expected.abs().max(), way
    assert all(same_bits(experts.state_dict()[name], stored[FUSED + name]) for name in experts.state_dict())


def test_experts_look_like_tensors(source: Path) -> None:
    experts: Any = quantdock.load(source).get_submodule("model.layers.1.mlp.experts")
    expected = by_transformers(source).get_submodule("model.layers.1.mlp.experts").gate_up_proj
    weight = experts.gate_up_proj
    assert isinstance(weight, torch.nn.Parameter)
    assert (weight.shape, weight.dtype) == ((EXPERTS, HIDDEN, 2 * INNER), torch.bfloat16)
    assert torch.equal(weight[2].float(), expected[2].float())
    assert torch.equal(weight.transpose(1, 2)[1] * 1, expected.transpose(1, 2)[1])
    with pytest.raises(quantdock.UnsupportedError, match="dequantize"):
        weight.zero_()


def copied(module: Any) -> Any:
    return copy.deepcopy(module)


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def converted(module: Any) -> Any:
    return module.to(torch.float32).to(torch.bfloat16)


@pytest.mark.parametrize("action", [copied, pickled, converted])
def test_what_is_done_to_the_module_changes_nothing(source: Path, tmp_path: Path, action: Callable[[Any], Any]) -> None:
    model = quantdock.load(changed(source, tmp_path / "it", tamed))
    expected, before = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = model.get_submodule("model.layers.1.mlp.experts")
    other = action(experts)
    assert type(other) is type(experts)
    model.set_submodule("model.layers.1.mlp.experts", other)
    assert torch.equal(logits(model), expected)
    assert all(same_bits(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_is_saved_as_it_was_and_transformers_reads_it(source: Path, tmp_path: Path) -> None:
    model = quantdock.load(source)
    quantdock.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "save_pretrained")
    before = load_file(source / "model.safetensors")
    for folder in ("saved", "save_pretrained"):
        after = load_file(tmp_path / folder / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(same_bits(before[name], after[name]) for name in before)
        assert json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"] == CONFIG
    again, theirs = quantdock.load(tmp_path / "saved"), by_transformers(tmp_path / "saved")
    assert all(same_bits(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    found = quantdock.dequantize(again).state_dict()
    assert all(same_bits(found[name], tensor) for name, tensor in theirs.state_dict().items())


def test_a_scale_that_is_no_number(source: Path, tmp_path: Path) -> None:
    """255 is NaN in OCP Microscaling Formats; transformers takes it for 2 to the power of 128."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{FUSED}down_proj_scales"][2, 5, 1] = 255

    model = quantdock.dequantize(quantdock.load(changed(source, tmp_path / "it", change)))
    expected = torch.zeros(EXPERTS, INNER, HIDDEN, dtype=torch.bool)
    expected[2, 32:64, 5] = True
    assert torch.equal(model.get_parameter(f"{FUSED}down_proj").isnan(), expected)


def _cut(tensors: dict[str, Tensor], name: str) -> None:
    tensors[FUSED + name] = tensors[FUSED + name][..., :-1].contiguous()


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scales": (
        lambda tensors: tensors.pop(f"{FUSED}down_proj_scales"),
        f"{FUSED}down_proj: component 'down_proj_scales' is missing: the codes mean nothing without their scale",
    ),
    "no codes": (
        lambda tensors: tensors.pop(f"{FUSED}down_proj_blocks"),
        rf"{FUSED}down_proj: component 'down_proj_blocks' is missing, expected uint8\[4, 64, 3, 16\]",
    ),
    "fewer scales": (
        lambda tensors: _cut(tensors, "down_proj_scales"),
        r"'down_proj_scales' is uint8\[4, 64, 2\], expected the shape \[4, 64, 3\] .*for blocks of \[1, 32\]",
    ),
    "smaller blocks": (
        lambda tensors: _cut(tensors, "gate_up_proj_blocks"),
        r"'gate_up_proj_blocks' is uint8\[4, 192, 2, 15\], expected uint8\[4, 192, 2, 16\]",
    ),
    "scales that aren't bytes": (
        lambda tensors: tensors.update({f"{FUSED}down_proj_scales": torch.ones(4, 64, 3)}),
        r"'down_proj_scales' is float32\[4, 64, 3\], expected uint8",
    ),
    "the weight in full precision, too": (
        lambda tensors: tensors.update({f"{FUSED}down_proj": torch.zeros(4, 96, 64)}),
        "component 'down_proj' is not part of the format, whose codes are 'down_proj_blocks'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error(source: Path, tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    with pytest.raises(quantdock.LedgerError, match=message):
        quantdock.plan(changed(source, tmp_path / "it", change))


def test_the_config_is_that_of_transformers() -> None:
    from transformers import Mxfp4Config as Theirs

    ours = Mxfp4Config.from_dict(CONFIG)
    assert ours.to_dict() == CONFIG == json.loads(json.dumps(Theirs.from_dict(CONFIG).to_dict()))
    with pytest.raises(quantdock.ConfigError, match="dequantize is 1, expected true or false"):
        Mxfp4Config.from_dict(CONFIG | {"dequantize": 1})
    with pytest.raises(quantdock.ConfigError, match=r"Mxfp4Config.dequantize is True: .*quantdock.dequantize\(model\)"):
        ours.overridden_by(Mxfp4Config(dequantize=True))


def test_what_transformers_would_dequantize_is_not_kept_without_a_word(source: Path) -> None:
    """Its config object leaves ``dequantize`` out of ``to_dict``."""
    from transformers import Mxfp4Config as Theirs

    with pytest.raises(quantdock.ConfigError, match=r"call quantdock.dequantize\(model\)"):
        quantdock.load(source, quantize=Theirs(dequantize=True))
