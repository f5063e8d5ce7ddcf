"""What other tools write loads, is checked, dequantizes to codes times scales, and is saved as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantdock
from quantdock_fp8.linear import Fp8Linear

ROWS, COLUMNS = 200, 330
E8M0 = torch.float8_e8m0fnu


def every_code(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Each of the 254 codes that are numbers, signed zeros and subnormals among them."""
    numbers = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    index = torch.randint(len(numbers), (rows * columns,), generator=torch.Generator().manual_seed(0))
    index[: len(numbers)] = torch.arange(len(numbers))
    return numbers[index].reshape(rows, columns).view(torch.float8_e4m3fn)


def single(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.01 + 1e-4


def exponents(*shape: int) -> Tensor:
    return torch.randint(110, 125, shape, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def blocks(scale: Tensor, down: int, across: int) -> Tensor:
    """The scale of each element, spelled out."""
    return scale.repeat_interleave(down, 0).repeat_interleave(across, 1)[:ROWS, :COLUMNS]


DEEPSEEK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
AUTOFP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
NVIDIA = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}, "targets": ["Linear"]}},
    "ignore": ["lm_head"],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
}
OLDER_NVIDIA = {
    "quant_method": "modelopt",
    "producer": {"name": "modelopt", "version": "0.17.0"},
    "quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "kv_cache_quant_algo": None, "exclude_modules": []},
}
MX = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0", "activation_scheme": "dynamic"}

# Config, tensors beside the codes, and the scale of each element.
FILES: dict[str, tuple[dict[str, Any], dict[str, Tensor], Tensor]] = {
    "DeepSeek-V3": (DEEPSEEK, {"weight_scale_inv": single(2, 3)}, blocks(single(2, 3), 128, 128)),
    "DeepSeek-V3.1": (
        DEEPSEEK | {"scale_fmt": "ue8m0"},
        {"weight_scale_inv": exponents(2, 3).view(E8M0).float()},
        blocks(exponents(2, 3).view(E8M0).float(), 128, 128),
    ),
    "blocks with one-byte scales": (
        DEEPSEEK | {"scale_fmt": "ue8m0"},
        {"weight_scale_inv": exponents(2, 3).view(E8M0)},
        blocks(torch.exp2(exponents(2, 3).float() - 127), 128, 128),
    ),
    "blocks with scales in bfloat16": (
        DEEPSEEK,
        {"weight_scale_inv": single(2, 3).bfloat16()},
        blocks(single(2, 3).bfloat16().float(), 128, 128),
    ),
    "blocks with scales in float16": (
        DEEPSEEK,
        {"weight_scale_inv": single(2, 3).half()},
        blocks(single(2, 3).half().float(), 128, 128),
    ),
    "blocks with one-byte scales, as plain bytes": (
        DEEPSEEK | {"scale_fmt": "ue8m0"},
        {"weight_scale_inv": exponents(2, 3)},
        blocks(torch.exp2(exponents(2, 3).float() - 127), 128, 128),
    ),
    "transformers, static": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": True},
        {"weight_scale_inv": single()[...], "activation_scale": torch.tensor(0.5)},
        single().expand(ROWS, COLUMNS),
    ),
    "AutoFP8, static": (
        AUTOFP8,
        {"weight_scale": single(1), "input_scale": torch.tensor([0.5])},
        single(1).expand(ROWS, COLUMNS),
    ),
    "AutoFP8, dynamic": (
        AUTOFP8 | {"activation_scheme": "dynamic"},
        {"weight_scale": single()},
        single().expand(ROWS, COLUMNS),
    ),
    "AutoFP8, rows": (
        AUTOFP8 | {"activation_scheme": "dynamic"},
        {"weight_scale": single(ROWS, 1)},
        single(ROWS, 1).expand(ROWS, COLUMNS),
    ),
    "FBGEMM": (
        FBGEMM,
        {"weight_scale": single(ROWS, 1), "input_scale_ub": torch.tensor([1200.0])},
        single(ROWS, 1).expand(ROWS, COLUMNS),
    ),
    "ModelOpt": (
        NVIDIA,
        {"weight_scale": single(), "input_scale": torch.tensor(0.5), "k_scale": torch.tensor(1.5)},
        single().expand(ROWS, COLUMNS),
    ),
    "ModelOpt, rows": (OLDER_NVIDIA, {"weight_scale": single(ROWS)}, single(ROWS)[:, None].expand(ROWS, COLUMNS)),
    "ModelOpt, blocks": (
        NVIDIA | {"quant_algo": "FP8_PB_WO"},
        {"weight_scale": single(2, 1, 3, 1)},
        blocks(single(2, 1, 3, 1).reshape(2, 3), 128, 128),
    ),
    "DeepSeek-V4": (
        DEEPSEEK | {"scale_fmt": "ue8m0"},
        {"scale": exponents(2, 3).view(E8M0)},
        blocks(torch.exp2(exponents(2, 3).float() - 127), 128, 128),
    ),
    "MXFP8": (MX, {"weight_scale_inv": exponents(ROWS, 11)}, blocks(torch.exp2(exponents(ROWS, 11) - 127.0), 1, 32)),
    "ModelOpt, MXFP8": (
        NVIDIA | {"quant_algo": "MXFP8"},
        {"weight_scale": exponents(ROWS, 11)},
        blocks(torch.exp2(exponents(ROWS, 11) - 127.0), 1, 32),
    ),
}


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.layer = nn.Linear(COLUMNS, ROWS, dtype=dtype)
        self.lm_head = nn.Linear(ROWS, 4, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.lm_head(self.layer(x)))


def stored(beside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "layer.weight": every_code(),
        "layer.bias": torch.randn(ROWS, generator=generator).bfloat16(),
        "lm_head.weight": torch.randn(4, ROWS, generator=generator).bfloat16(),
        **{f"layer.{name}": tensor for name, tensor in beside.items()},
    }


def write(folder: Path, config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    data = {"dtype": "bfloat16"} | ({} if config is None else {"quantization_config": dict(config)})
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )


@pytest.mark.parametrize("name", FILES)
def test_loads_and_computes_with_codes_times_scales(tmp_path: Path, name: str) -> None:
    config, beside, scale = FILES[name]
    model = quantdock.load(write(tmp_path / "it", config, stored(beside)), model=Model)
    layer = model.get_submodule("layer")
    assert isinstance(layer, Fp8Linear)
    assert not isinstance(model.get_submodule("lm_head"), Fp8Linear)
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes

    exact = every_code().float() * scale
    expected = exact.bfloat16()
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(4)).bfloat16()
    used = exact if layer.path(x.dtype) == "compiled" else expected
    reference = nn.functional.linear(x.double(), used.double(), stored(beside)["layer.bias"].double())
    with torch.no_grad():
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert (found.double() - reference).abs().max() <= 2**-8 * reference.abs().max()

    restored = quantdock.dequantize(model)
    assert type(restored.get_submodule("layer")) is nn.Linear
    assert same_bits(restored.get_parameter("layer.weight").data, expected)


@pytest.mark.parametrize("name", FILES)
def test_is_saved_as_it_was(tmp_path: Path, name: str) -> None:
    config, beside, _ = FILES[name]
    source = write(tmp_path / "it", config, stored(beside))
    model = quantdock.load(source, model=Model)
    model(torch.ones(1, COLUMNS, dtype=torch.bfloat16))
    saved = quantdock.save(model, tmp_path / "saved")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, saved))
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)
    written = json.loads((saved / "config.json").read_text())["quantization_config"]
    flat = {**config, **config.get("quantization", {})}
    renamed = {"ignored_layers": "modules_to_not_convert"}
    for key, value in flat.items():
        if key != "quantization":
            assert written.get(renamed.get(key, key)) == value, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_scales_of_any_size(tmp_path: Path, dtype: torch.dtype) -> None:
    """Factors of 2**120 on the way, as fast decoders use them, would lose these."""
    for number, size in enumerate((1e-36, 1e-8, 1.0, 1e30)):
        scale = torch.full((2, 3), size)
        source = write(tmp_path / str(number), DEEPSEEK, stored({"weight_scale_inv": scale}))
        model = quantdock.dequantize(quantdock.load(source, model=partial(Model, dtype)))
        expected = (every_code().float() * size).to(dtype)
        assert same_bits(model.get_parameter("layer.weight").data, expected)


def test_codes_and_scales_that_are_nan(tmp_path: Path) -> None:
    tensors = stored({"weight_scale_inv": torch.full((2, 3), 127, dtype=torch.uint8).view(E8M0)})
    tensors["layer.weight"].view(torch.uint8)[5, 7:9] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
    tensors["layer.weight_scale_inv"].view(torch.uint8)[1, 2] = 255
    model = quantdock.dequantize(quantdock.load(write(tmp_path / "it", DEEPSEEK, tensors), model=Model))
    expected = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    expected[5, 7:9] = expected[128:, 256:] = True
    assert torch.equal(model.get_parameter("layer.weight").isnan(), expected)


WRONG: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "no scale": (DEEPSEEK, {}, "a scale may be missing"),
    "no scale, but others": (
        AUTOFP8,
        {"input_scale": torch.tensor(1.0)},
        "'weight_scale_inv' is missing: the codes mean nothing without",
    ),
    "two scales": (AUTOFP8, {"weight_scale": single(), "weight_scale_inv": single()}, "both 'weight_scale_inv' and"),
    "no scale of activations": (AUTOFP8, {"weight_scale": single()}, "'input_scale' is missing, which activation_sch"),
    "blocks where none are expected": (
        AUTOFP8 | {"activation_scheme": "dynamic"},
        {"weight_scale": single(2, 3)},
        r"'weight_scale' is float32\[2, 3\], expected the shape \[\] or \[1\] or \[200, 1\]",
    ),
    "other blocks": (
        DEEPSEEK | {"weight_block_size": [64, 64]},
        {"weight_scale_inv": single(2, 3)},
        r"float32\[2, 3\], expected the shape \[4, 6\] .* for blocks of \[64, 64\]",
    ),
    "one scale instead of blocks": (
        DEEPSEEK,
        {"weight_scale_inv": single()},
        r"float32\[\], expected the shape \[2, 3",
    ),
    "scales that are integers": (
        DEEPSEEK,
        {"weight_scale_inv": torch.ones(2, 3, dtype=torch.int32)},
        "int32.* expected one of float32, bfloat16, float16, float8_e8m0fnu, uint8",
    ),
    "a vector of activations' scales": (
        AUTOFP8,
        {"weight_scale": single(), "input_scale": single(3)},
        r"'input_scale' is float32\[3\], expected one element",
    ),
    "five bits of exponent": (
        DEEPSEEK,
        {"weight_scale_inv": single(2, 3), "weight": every_code().float().to(torch.float8_e5m2)},
        r"'weight' is float8_e5m2\[200, 330\], expected float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error(tmp_path: Path, name: str) -> None:
    config, beside, message = WRONG[name]
    source = write(tmp_path / "it", config, stored({}) | {f"layer.{key}": value for key, value in beside.items()})
    with pytest.raises(quantdock.LedgerError, match=message) as caught:
        quantdock.load(source, model=Model)
    assert "layer." in str(caught.value)


OTHER = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}


def test_a_config_that_stands_in_another_file(tmp_path: Path) -> None:
    """Model Optimizer may write ``hf_quant_config.json`` only."""
    _, beside, _ = FILES["ModelOpt"]
    source = write(tmp_path / "it", None, stored(beside))
    with pytest.raises(quantdock.LedgerError, match="quantization_config"):
        quantdock.load(source, model=Model)
    (source / "hf_quant_config.json").write_text(json.dumps(OTHER))
    plan = quantdock.plan(source, model=Model)
    assert plan.config.origin.endswith("config.json and hf_quant_config.json")
    model = plan.execute()
    assert isinstance(model.get_submodule("layer"), Fp8Linear)
    written = quantdock.save(model, tmp_path / "saved") / "config.json"
    assert json.loads(written.read_text())["quantization_config"]["quant_algo"] == "FP8"


def test_a_config_in_another_file_is_no_reason_to_guess(tmp_path: Path) -> None:
    """What ``config.json`` says holds, an unknown algorithm is an error, and one for the cache alone is none."""
    _, beside, _ = FILES["ModelOpt, blocks"]
    source = write(tmp_path / "it", FILES["ModelOpt, blocks"][0], stored(beside))
    (source / "hf_quant_config.json").write_text(json.dumps(OTHER))
    assert isinstance(quantdock.load(source, model=Model).get_submodule("layer"), Fp8Linear)

    plain = write(tmp_path / "plain", None, {name: torch.zeros_like(p) for name, p in Model().state_dict().items()})
    for algorithm in ("W4A8_AWQ", None):
        other = {"quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"}}
        (plain / "hf_quant_config.json").write_text(json.dumps(other))
        if algorithm is None:
            assert type(quantdock.load(plain, model=Model).get_submodule("layer")) is nn.Linear
        else:
            with pytest.raises(quantdock.ConfigError, match="quant_algo is 'W4A8_AWQ', expected one of 'FP8'"):
                quantdock.load(plain, model=Model)


class Scaled(Model):
    """With a parameter that is called as DeepSeek-V4 calls the scale of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.scale = nn.Parameter(torch.ones(ROWS, dtype=torch.bfloat16))


def test_a_parameter_that_is_called_like_a_scale(tmp_path: Path) -> None:
    scale = torch.randn(ROWS).bfloat16()
    tensors = stored({"scale": exponents(2, 3).view(E8M0)}) | {"norm.scale": scale}
    model = quantdock.load(write(tmp_path / "it", DEEPSEEK, tensors), model=Scaled)
    assert same_bits(model.get_parameter("norm.scale").data, scale)
    assert isinstance(model.get_submodule("layer"), Fp8Linear)


ONLY_LOAD: dict[str, dict[str, Any]] = {
    "mxfp8": {},
    "mxfp4": {},
    "modelopt": NVIDIA,
    "compressed-tensors": {
        "format": "float-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
        },
    },
}


@pytest.mark.parametrize("method", ONLY_LOAD)
def test_methods_that_only_load_say_so(tmp_path: Path, method: str) -> None:
    source = write(tmp_path / "it", None, {"layer.weight": torch.ones(ROWS, COLUMNS).bfloat16()})
    with pytest.raises(quantdock.ConfigError, match=f"'{method}' .* can't quantize while loading"):
        quantdock.load(source, model=Model, quantize={"quant_method": method, **ONLY_LOAD[method]})
