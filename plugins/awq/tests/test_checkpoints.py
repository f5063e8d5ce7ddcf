"""Checkpoints in each of AWQ's forms: what comes of them, and what doesn't fit."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantdock
from quantdock.testing import SmallModel
from quantdock_awq.modules import AwqLinear

sys.path.insert(0, str(Path(__file__).parent))
import awq_files

IDS = torch.arange(24).reshape(2, 12) * 7 % 32
VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq")


def load(folder: Path, **options: Any) -> nn.Module:
    return quantdock.load(folder, model=SmallModel, **options)


def layers(model: nn.Module) -> dict[str, AwqLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AwqLinear)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(IDS))


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [32, 64, 128, -1])
def test_weights_are_what_the_words_say(version: str, size: int, tmp_path: Path) -> None:
    made = awq_files.write(tmp_path, version, size)
    found = layers(load(tmp_path))
    assert found.keys() == made.keys()
    for name, layer in found.items():
        for dtype in (torch.float32, torch.float16):
            assert torch.equal(layer.dequantized(dtype), made[name].values(dtype)), name


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_computes_with_them(version: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In bfloat16 through torch's kernel for 4 bits, where there is one."""
    made = awq_files.write(tmp_path, version, 64)
    model, plain = load(tmp_path).to(dtype), load(tmp_path).double()
    for name, layer in layers(plain).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=torch.float64)
        linear.weight = nn.Parameter(made[name].values())
        linear.bias = layer.bias
        plain.set_submodule(name, linear)
    expected, tolerance = logits(plain), {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    assert (logits(model).double() - expected).norm() < tolerance * expected.norm()
    restored = quantdock.dequantize(load(tmp_path)).to(dtype)
    assert not layers(restored)
    assert (logits(restored).double() - expected).norm() < max(tolerance, 2e-3) * expected.norm()  # in float16


@pytest.mark.parametrize("version", VERSIONS)
def test_stored_tensors_stay_as_they_are(version: str, tmp_path: Path) -> None:
    """Whatever a forward has made of them: saved, copied, pickled, cast and moved."""
    awq_files.write(tmp_path / "model", version)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    model = load(tmp_path / "model").bfloat16()
    logits(model)
    quantdock.save(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    mine = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] in awq_files.LAYERS}
    same({name: saved[name] for name in mine if not name.endswith("bias")}, _without_bias(mine))
    expected = logits(load(tmp_path / "saved").bfloat16())
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        state = other.state_dict()
        same({name: state[name] for name in _without_bias(mine)}, _without_bias(mine))
        assert torch.equal(logits(other), expected)
    model.float()
    same({name: model.state_dict()[name] for name in _without_bias(mine)}, _without_bias(mine))


def _without_bias(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_config_is_saved_as_it_was(version: str, tmp_path: Path) -> None:
    awq_files.write(tmp_path / "model", version)
    quantdock.save(load(tmp_path / "model"), tmp_path / "saved")
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("model", "saved")
    )
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("version", ["exllama", "marlin", "ipex", "GEMM"])
def test_kernels_that_read_gemm(version: str, tmp_path: Path) -> None:
    """The files are gemm's, and are called so when they are saved: transformers knows no other name for them."""
    made = awq_files.write(tmp_path / "model", version, form="gemm")
    model = load(tmp_path / "model")
    for name, layer in layers(model).items():
        assert torch.equal(layer.dequantized(torch.float32), made[name].values(torch.float32))
    quantdock.save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["version"] == "gemm"


def test_llm_awq_by_its_backend(tmp_path: Path) -> None:
    """With ``scaled_zeros``, and in the form it had before: gemv's. The ``version`` says nothing then."""
    for form in ("llm-awq", "gemv"):
        made = awq_files.write(tmp_path / form, "gemv", form=form)
        awq_files.say(tmp_path / form, lambda config: config["quantization_config"].update(backend="llm-awq"))
        for name, layer in layers(load(tmp_path / form)).items():
            assert torch.equal(layer.dequantized(torch.float32), made[name].values(torch.float32))


def test_symmetric_weights(tmp_path: Path) -> None:
    """They have zero points, too: 8, in all words."""
    made = awq_files.write(tmp_path, "gemm", zero_point=False)
    for name, layer in layers(load(tmp_path)).items():
        assert torch.equal(layer.dequantized(torch.float32), made[name].values(torch.float32))


def test_scales_in_bfloat16(tmp_path: Path) -> None:
    awq_files.write(tmp_path, "gemm")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if name.endswith(".scales")}

    awq_files.rewrite(tmp_path, change)
    assert {layer.scales.dtype for layer in layers(load(tmp_path)).values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["quant_config.json", "quantize_config.json"])
def test_config_in_a_file_of_its_own(name: str, tmp_path: Path) -> None:
    """As AutoAWQ leaves it, in its own words."""
    made = awq_files.write(tmp_path, "gemm")
    awq_files.say(tmp_path, lambda config: config.pop("quantization_config"))
    with pytest.raises(quantdock.LedgerError, match="qweight"):
        quantdock.plan(tmp_path, model=SmallModel)
    own = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM", "modules_to_not_convert": None}
    (tmp_path / name).write_text(json.dumps(own))
    for layer, module in layers(load(tmp_path)).items():
        assert torch.equal(module.dequantized(torch.float32), made[layer].values(torch.float32))


def test_a_file_of_another_method_is_left_alone(tmp_path: Path) -> None:
    awq_files.write(tmp_path, "gemm")
    awq_files.say(tmp_path, lambda config: config.pop("quantization_config"))
    for other in ({"bits": 4, "desc_act": False}, {"quant_method": "gptq", "w_bit": 4}):
        (tmp_path / "quant_config.json").write_text(json.dumps(other))
        config = quantdock.inspect(tmp_path).to_dict()
        assert "awq" not in json.dumps(config.get("quantization_config"))


def test_what_the_list_names_may_still_be_quantized(tmp_path: Path) -> None:
    """The files tell; lists are matched in different ways by those who write and read them."""
    made = awq_files.write(tmp_path, "gemm")
    awq_files.say(tmp_path, lambda config: config["quantization_config"].update(modules_to_not_convert=["up", "head"]))
    assert layers(load(tmp_path)).keys() == made.keys()


def drop(tensors: dict[str, Tensor], suffix: str) -> None:
    for name in [name for name in tensors if name.endswith(suffix)]:
        del tensors[name]


def put(suffix: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: make(tensor).clone() for name, tensor in tensors.items() if name.endswith(suffix)}

    return change


def fields(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"].update(values)


def _nothing(_: object) -> None:
    pass


Change = Callable[[dict[str, Any]], object]
PROBLEMS: Mapping[str, tuple[str, Change, Change, str]] = {
    "no scales": (
        "gemm",
        _nothing,
        lambda t: drop(t, "1.up.scales"),
        r"blocks\.1\.up: .*'scales' is missing, exp.*float16",
    ),
    "no qzeros": ("gemm", _nothing, lambda t: drop(t, ".qzeros"), "'qzeros' is missing, expected int32"),
    "no qweight": ("gemm", _nothing, lambda t: drop(t, "0.down.qweight"), r"blocks\.0\.down: .*'qweight' is missing"),
    "no scaled zeros": ("llm-awq", _nothing, lambda t: drop(t, ".scaled_zeros"), "'qzeros' is missing"),
    "short qweight": ("gemm", _nothing, put(".qweight", lambda t: t[:-1]), r"'qweight' is int32\[.*expected int32\["),
    "integer scales": ("gemv", _nothing, put(".scales", lambda t: t.int()), "'scales' is int32.*expected float16"),
    "another group size": ("gemm", fields(group_size=32), _nothing, "'qzeros' is int32.*group_size=32"),
    "a size that doesn't divide": ("gemm", fields(group_size=96), _nothing, "groups of 96 don't divide its 128 inputs"),
    "sizes without a form": ("gemv", fields(group_size=8), _nothing, "groups of 8 inputs, expected 16, 32, 64"),
    "bits": ("gemm", fields(bits=3), _nothing, "AWQ in 3 bits can't be read or made; expected 4"),
    "a version": ("gemm", fields(version="gemm2"), _nothing, "version 'gemm2' is unknown; .* reads gemm, gemv"),
    "gemv called gemm": ("gemv", fields(version="gemm"), _nothing, "look like version 'gemv': correct the version"),
    "gemm called gemv": ("gemm", fields(version="gemv"), _nothing, "look like version 'gemm': correct the version"),
    "fast called gemm": ("gemv_fast", fields(version="gemm"), _nothing, "look like version 'gemv_fast'"),
    "marlin's own layout": (
        "gemm",
        fields(version="marlin"),
        put(".qweight", lambda t: t.view(t.shape[0] // 16, -1)),
        "a layout that a runtime made",
    ),
    "products of nothing": (
        "gemv_fast",
        _nothing,
        put(".qzeros", lambda t: t * 1.05),
        "isn't the negative product of a scale and a zero point",
    ),
    "formats that differ": ("gemm", fields(format="gemv"), _nothing, "differ: gemm and gemv"),
}


@pytest.mark.parametrize("problem", list(PROBLEMS))
def test_what_does_not_fit_is_refused(problem: str, tmp_path: Path) -> None:
    version, config, tensors, message = PROBLEMS[problem]
    awq_files.write(tmp_path, version)
    awq_files.say(tmp_path, config)
    awq_files.rewrite(tmp_path, tensors)
    with pytest.raises(quantdock.QuantdockError, match=message):
        load(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("version", VERSIONS)
def test_on_a_device(version: str, tmp_path: Path) -> None:
    """Loaded there, used there, moved here and used, and moved back."""
    awq_files.write(tmp_path, version)
    here, there = load(tmp_path, device_map="cpu"), load(tmp_path, device_map="cuda")
    before = {name: tensor.clone() for name, tensor in here.state_dict().items()}
    with torch.no_grad():
        expected = there(IDS.cuda())
        assert (here(IDS) - expected.cpu()).float().norm() < 2e-2 * expected.float().norm()
        there.cpu()(IDS)
        there.cuda()
        assert torch.equal(there(IDS.cuda()), expected)
    same({name: tensor.cpu() for name, tensor in there.state_dict().items()}, before)
