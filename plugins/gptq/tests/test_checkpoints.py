"""Checkpoints that gptqmodel wrote: the weights and logits that it makes of them, bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantdock
from quantdock_gptq.modules import GPTQLinear

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
V2 = "b4_gptq_v2_asym_g128_desc"
PLAIN = "b4_gptq_sym_gall"

pytest.importorskip("quantdock_transformers", reason="the checkpoints are Llamas, whose architecture it brings")


def layers(model: nn.Module) -> dict[str, GPTQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, GPTQLinear)}


def digests(model: nn.Module) -> dict[str, str]:
    weights = {name: layer.dequantized(torch.float16) for name, layer in layers(model).items()}
    return {name: hashlib.sha256(weight.numpy().tobytes()).hexdigest() for name, weight in weights.items()}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(ids).logits)


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_logits_are_gptqmodels(name: str) -> None:
    model = quantdock.load(FIXTURES / name, dtype=torch.float16)
    model.train()  # or else kernels multiply, which sum in another order
    assert digests(model) == json.loads((FIXTURES / name / "weights.json").read_text())
    reference = load_file(FIXTURES / name / "reference.safetensors")
    assert torch.equal(logits(model, reference["ids"]), reference["logits"])
    plain = quantdock.dequantize(model)
    assert not layers(plain)
    assert torch.equal(logits(plain, reference["ids"]), reference["logits"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-2), (torch.float32, 1e-3)])
def test_logits_by_the_path_that_is_chosen(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """In 16 bits, whichever kernel takes the rows: all at once, and few."""
    model = quantdock.load(FIXTURES / name, dtype=dtype)
    reference = load_file(FIXTURES / name / "reference.safetensors")
    expected = reference["logits"].float()
    for ids in (reference["ids"], reference["ids"].repeat(2, 1)):
        found = logits(model, ids)[0].float()
        assert (found - expected[0]).norm() < tolerance * expected.norm()


def test_the_report_says_how_layers_multiply() -> None:
    model = quantdock.load(FIXTURES / PLAIN, dtype=torch.bfloat16)
    report = quantdock.report(model)
    each = next(iter(layers(model).values())).paths()
    ways: dict[str, list[str]] = {}
    for dtype, path in each.items():
        ways.setdefault(path, []).append(dtype)
    way = ", ".join(f"{path} in {' and '.join(dtypes)}" for path, dtypes in ways.items())
    assert report.paths == report.to_dict()["paths"] == dict.fromkeys(layers(model), way)
    assert f"{way}: {len(report.paths)} modules" in str(report)
    logits(model, torch.arange(4)[None])
    assert quantdock.report(model).paths == report.paths
    assert not quantdock.report(quantdock.dequantize(model)).paths


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_is_the_same(name: str, tmp_path: Path) -> None:
    """After use, too, when kernels have had their own forms of the weights."""
    model = quantdock.load(FIXTURES / name, dtype=torch.bfloat16)
    logits(model, torch.arange(4)[None])
    quantdock.save(model, tmp_path / "saved")
    stored, saved = (load_file(folder / "model.safetensors") for folder in (FIXTURES / name, tmp_path / "saved"))
    assert stored.keys() == saved.keys()
    for key, tensor in stored.items():
        assert tensor.dtype == saved[key].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), saved[key].reshape(-1).view(torch.uint8)), key


def test_saved_config_has_all_of_the_stored_one(tmp_path: Path) -> None:
    """``dynamic`` included, which transformers' own class has no field for; that class adds its defaults."""
    model = quantdock.load(FIXTURES / "b4_gptq_dynamic")
    quantdock.save(model, tmp_path / "saved")
    before, after = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (FIXTURES / "b4_gptq_dynamic", tmp_path / "saved")
    )
    assert {key: after.get(key) for key in before} == before
    assert before["dynamic"]


def test_the_dynamic_one_is_mixed() -> None:
    model = quantdock.load(FIXTURES / "b4_gptq_dynamic")
    bits = {name: layer.bits for name, layer in layers(model).items()}
    assert "model.layers.0.self_attn.q_proj" not in bits
    assert bits["model.layers.1.self_attn.q_proj"] == 4
    assert bits["model.layers.1.mlp.down_proj"] == 8


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def changed(tmp_path: Path, change: Change, name: str = PLAIN) -> Path:
    """A copy of a checkpoint whose quantization config and tensors a function has changed."""
    folder = tmp_path / "changed"
    shutil.copytree(FIXTURES / name, folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def drop(tensors: dict[str, Tensor], suffix: str) -> None:
    for name in [name for name in tensors if name.endswith(suffix)]:
        del tensors[name]


def test_without_g_idx(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda _, tensors: drop(tensors, ".g_idx"))
    model = quantdock.load(folder, dtype=torch.float16)
    assert digests(model) == json.loads((FIXTURES / PLAIN / "weights.json").read_text())
    quantdock.save(model, tmp_path / "saved")
    assert not any(name.endswith("g_idx") for name in load_file(tmp_path / "saved" / "model.safetensors"))


def test_scales_in_bfloat16(tmp_path: Path) -> None:
    def change(_: object, tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if name.endswith(".scales")}

    model = quantdock.load(changed(tmp_path, change), dtype=torch.bfloat16)
    assert {layer.scales.dtype for layer in layers(model).values()} == {torch.bfloat16}
    reference = load_file(FIXTURES / PLAIN / "reference.safetensors")
    expected = reference["logits"].float()
    assert (logits(model, reference["ids"]).float() - expected).norm() < 1e-2 * expected.norm()


def test_a_quantized_head(tmp_path: Path) -> None:
    """As large as ``gate_proj``, whose tensors stand in for it."""

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["lm_head"] = True
        del tensors["lm_head.weight"]
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"lm_head.{part}"] = tensors[f"model.layers.0.mlp.gate_proj.{part}"].clone()

    model = quantdock.load(changed(tmp_path, change), dtype=torch.float16)
    weights = json.loads((FIXTURES / PLAIN / "weights.json").read_text())
    assert digests(model)["lm_head"] == weights["model.layers.0.mlp.gate_proj"]


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
@pytest.mark.parametrize(
    "fields", [{"quant_method", "method"}, {"quant_method", "method", "format", "meta", "lm_head"}]
)
def test_config_in_a_file_of_its_own(name: str, fields: set[str], tmp_path: Path) -> None:
    """As AutoGPTQ leaves it, which says no ``quant_method``."""
    folder = tmp_path / "old"
    shutil.copytree(FIXTURES / PLAIN, folder)
    config = json.loads((folder / "config.json").read_text())
    own = json.loads((folder / "quantize_config.json").read_text())
    assert config.pop("quantization_config") == own
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").unlink()
    with pytest.raises(quantdock.LedgerError, match="qweight"):
        quantdock.plan(folder)
    (folder / name).write_text(json.dumps({key: value for key, value in own.items() if key not in fields}))
    model = quantdock.load(folder, dtype=torch.float16)
    assert digests(model) == json.loads((FIXTURES / PLAIN / "weights.json").read_text())


def test_a_file_of_another_method_is_left_alone(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / PLAIN, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    for other in ({"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, {"quant_method": "awq", "desc_act": False}):
        (tmp_path / "other" / "quantize_config.json").write_text(json.dumps(other))
        with pytest.raises(quantdock.LedgerError, match="qweight"):
            quantdock.plan(tmp_path / "other")


def test_kernel_fields_are_runtime() -> None:
    model = quantdock.load(
        FIXTURES / PLAIN, dtype=torch.float16, quantize={"quant_method": "gptq", "bits": 4, "compute_dtype": "bfloat16"}
    )
    reference = load_file(FIXTURES / PLAIN / "reference.safetensors")
    found, expected = logits(model, reference["ids"]).float(), reference["logits"].float()
    assert 0 < (found - expected).norm() < 1e-2 * expected.norm()


def put(suffix: str, make: Callable[[Tensor], Tensor]) -> Change:
    def change(_: object, tensors: dict[str, Tensor]) -> None:
        tensors |= {name: make(tensor).clone() for name, tensor in tensors.items() if name.endswith(suffix)}

    return change


def say(**fields: object) -> Change:
    return lambda config, _: config.update(fields)


def formats(name: str) -> Change:
    return say(format=name, checkpoint_format=name)


PROBLEMS: Mapping[str, tuple[Change, str]] = {
    "no qzeros": (lambda _, tensors: drop(tensors, ".qzeros"), "'qzeros' is missing, expected int32"),
    "no scales": (lambda _, tensors: drop(tensors, ".scales"), "'scales' is missing, expected float16"),
    "no qweight": (lambda _, tensors: drop(tensors, ".qweight"), "'qweight' is missing, expected int32"),
    "act order without g_idx": (
        lambda config, tensors: (config.update(desc_act=True), drop(tensors, ".g_idx")),
        "'g_idx' is missing",
    ),
    "short qweight": (put(".qweight", lambda tensor: tensor[:-1]), r"'qweight' is int32\[.*expected int32\["),
    "scales of another dtype": (put(".scales", lambda tensor: tensor.int()), "'scales' is int32.*expected float16"),
    "other bits": (say(bits=8), "'qweight' is int32.*for 8 bits"),
    "another group size": (say(group_size=32), "'qzeros' is int32.*group_size=32"),
    "words not filled": (say(bits=3, group_size=7), "group_size=7"),
    "g_idx past the groups": (put(".g_idx", lambda tensor: tensor + 1), "g_idx names the groups 1 to 1.*0 to 0"),
    "g_idx below": (put(".g_idx", lambda tensor: tensor - 1), "g_idx names the groups -1"),
    "bits that aren't": (say(bits=5), "GPTQ in 5 bits can't be read; expected 2, 3, 4, 8"),
    "another layout": (formats("bitblas"), "format 'bitblas' can't be read; .* 'gptq', 'gptq_v2', 'marlin'"),
    "an unknown format": (formats("no_such"), "format 'no_such' can't be read"),
    "formats that differ": (say(format="gptq_v2"), "checkpoint_format and format differ: gptq and gptq_v2"),
    "another method": (say(method="qqq"), "method is 'qqq'"),
    "a module stored but left out": (say(dynamic={"-:.*k_proj": {}}), r"k_proj.*dynamic leaves it alone"),
}


@pytest.mark.parametrize("problem", list(PROBLEMS))
def test_what_does_not_fit_is_refused(problem: str, tmp_path: Path) -> None:
    change, message = PROBLEMS[problem]
    with pytest.raises(quantdock.QuantdockError, match=message):
        quantdock.load(changed(tmp_path, change), dtype=torch.float16)
