"""The configs are the JSON that the ecosystem's checkpoints have, and what doesn't fit is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from quantdock import ConfigError
from quantdock_fp8 import presets
from quantdock_fp8.config import FbgemmFp8Config, FloatConfig, Fp8Config, Mxfp8Config
from quantdock_fp8.modelopt_config import ModelOptConfig
from quantdock_fp8.quantizer import Fp8Quantizer

METHODS = {config.quant_method: config for config in (Fp8Config, FbgemmFp8Config, Mxfp8Config, ModelOptConfig)}


def their_class(name: str) -> Any:
    return getattr(pytest.importorskip("transformers", reason="the class is transformers'"), name)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("FineGrainedFP8Config", {}),
        ("FineGrainedFP8Config", {"weight_block_size": None, "modules_to_not_convert": ["lm_head"]}),
        ("FineGrainedFP8Config", {"activation_scheme": "static", "scale_fmt": "ue8m0", "dequantize": True}),
        ("FbgemmFp8Config", {"activation_scale_ub": 900.0, "modules_to_not_convert": ["lm_head"]}),
    ],
)
def test_transformers_config_and_back(name: str, values: dict[str, Any]) -> None:
    theirs = their_class(name)(**values)
    written = json.loads(theirs.to_json_string(use_diff=False))
    ours = METHODS[written["quant_method"]].from_dict(written)
    assert json.loads(type(theirs).from_dict(ours.to_dict()).to_json_string(use_diff=False)) == written


@pytest.mark.parametrize("config", [presets.TENSOR, presets.ROW, presets.BLOCK, Mxfp8Config()])
def test_presets_and_defaults_are_read_alike_by_transformers(config: FloatConfig) -> None:
    name = "FbgemmFp8Config" if isinstance(config, FbgemmFp8Config) else "FineGrainedFP8Config"
    theirs = their_class(name).from_dict(config.to_dict())
    again = type(config).from_dict(theirs.to_dict())
    assert again == config


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("fp8", {"fmt": "e5m2"}, "Fp8Config.fmt is 'e5m2', expected 'e4m3'"),
    ("fp8", {"scale_fmt": "e5m3"}, "scale_fmt is 'e5m3', expected 'float' or 'ue8m0'"),
    ("fp8", {"activation_scheme": "none"}, "activation_scheme is 'none', expected 'dynamic' or 'static'"),
    ("fp8", {"weight_block_size": [128]}, r"weight_block_size is \[128\], expected two positive"),
    ("fp8", {"weight_block_size": [128, 0]}, r"weight_block_size is \[128, 0\], expected two positive"),
    ("fp8", {"weight_block_size": [128, True]}, r"weight_block_size is \[128, True\], expected two positive"),
    ("fp8", {"expert_dtype": "fp4"}, "expert_dtype is 'fp4', expected 'fp8'; experts in 4 bits"),
    ("fp8", {"modules_to_convert": ["embed"]}, r"modules_to_convert is \('embed',\), expected none"),
    ("fp8", {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head', expected a list"),
    ("fp8", {"modules_to_not_convert": ["("]}, r"modules_to_not_convert: '\(' is no regular expression"),
    (
        "fp8",
        {"modules_to_not_convert": ["a"], "ignored_layers": ["b"]},
        r"modules_to_not_convert is \['a'\], but ignored_layers is \['b'\]",
    ),
    ("fp8", {"dequantize": 1}, "dequantize is 1, expected true or false"),
    ("fp8", {"kwant": 1}, "no field 'kwant'"),
    ("fbgemm_fp8", {"activation_scale_ub": 0}, "activation_scale_ub is 0, expected a positive number"),
    ("mxfp8", {"weight_block_size": [128, 128]}, r"weight_block_size is \(128, 128\), expected \[1, 32\]"),
    ("mxfp8", {"scale_fmt": "float"}, "scale_fmt is 'float', expected 'ue8m0'"),
    ("modelopt", {}, "quant_algo is missing"),
    (
        "modelopt",
        {"quant_algo": "W4A8_AWQ"},
        "quant_algo is 'W4A8_AWQ', expected one of 'FP8', .*; this plugin reads no",
    ),
    ("modelopt", {"quant_algo": "NVFP4", "group_size": 32}, "group_size is 32, expected 16, which 'NVFP4' has"),
    ("modelopt", {"quant_algo": "FP8", "group_size": 32}, "group_size is 32, expected none, which 'FP8' has"),
    ("modelopt", {"quantization": "FP8"}, "quantization is 'FP8', expected an object"),
    (
        "modelopt",
        {"quant_algo": "FP8", "quantization": {"quant_algo": "MXFP8"}},
        "quant_algo differs inside and outside of quantization",
    ),
]


@pytest.mark.parametrize(("method", "data", "message"), WRONG)
def test_what_does_not_fit_is_named(method: str, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        METHODS[method].from_dict({"quant_method": method, **data})


def test_null_is_a_default() -> None:
    assert Fp8Config.from_dict({"weight_block_size": None, "fmt": None, "modules_to_not_convert": None}) == Fp8Config()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Fp8Config(activation_scheme="static"), "aren't measured while loading; pass 'dynamic'"),
        (Fp8Config(dequantize=True), "the checkpoint isn't quantized; drop quantize="),
    ],
)
def test_what_quantizing_cannot_do(config: Fp8Config, message: str) -> None:
    Fp8Quantizer(config, prequantized=True)
    with pytest.raises(ConfigError, match=message):
        Fp8Quantizer(config)


def test_full_precision_is_asked_for_in_another_way() -> None:
    stored = Fp8Config(weight_block_size=(128, 128))
    with pytest.raises(ConfigError, match=r"call quantdock.dequantize\(model\)"):
        stored.overridden_by(Fp8Config(weight_block_size=(128, 128), dequantize=True))
    kept = Fp8Config(dequantize=True)  # transformers writes the field, too
    assert Fp8Config.from_dict(kept.to_dict()) == kept.overridden_by(kept) == kept


def test_torch_has_the_dtypes_that_the_formats_are_made_of() -> None:
    assert torch.finfo(torch.float8_e4m3fn).max == 448.0
    assert torch.tensor([127], dtype=torch.uint8).view(torch.float8_e8m0fnu).float().item() == 1.0
