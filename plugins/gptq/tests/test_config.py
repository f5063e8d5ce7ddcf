"""The config: what others write, and what doesn't fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantdock import ConfigError
from quantdock_gptq.config import GPTQConfig, Search, Settings

AUTOGPTQ = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
}
TRANSFORMERS = {
    "bits": 3,
    "tokenizer": None,
    "dataset": "c4",
    "group_size": -1,
    "damp_percent": 0.1,
    "desc_act": False,
    "sym": True,
    "true_sequential": True,
    "use_cuda_fp16": False,
    "model_seqlen": 2048,
    "batch_size": 1,
    "block_name_to_quantize": "model.layers",
    "module_name_preceding_first_block": ["model.embed_tokens"],
    "pad_token_id": None,
    "use_exllama": True,
    "max_input_length": None,
    "exllama_config": {"version": 1},
    "cache_block_outputs": True,
    "modules_in_block_to_quantize": None,
    "quant_method": "gptq",
}


@pytest.mark.parametrize("data", [AUTOGPTQ, TRANSFORMERS])
def test_what_others_write_is_read(data: dict[str, Any]) -> None:
    config = GPTQConfig.from_dict(data)
    assert config.of("any") == Settings(bits=data["bits"], group_size=data["group_size"], desc_act=False, sym=True)
    assert config.checkpoint_format == "gptq"
    assert GPTQConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"format": "gptq_v2"}, "gptq_v2"),
        ({"checkpoint_format": "GPTQ_V2", "format": "gptq_v2"}, "gptq_v2"),
        ({"checkpoint_format": None}, "gptq"),
        ({"is_marlin_format": True}, "marlin"),
        ({"is_marlin_format": True, "checkpoint_format": "gptq"}, "marlin"),
        ({"is_marlin_format": False, "checkpoint_format": "gptq"}, "gptq"),
    ],
)
def test_checkpoint_formats(fields: dict[str, Any], expected: str) -> None:
    assert GPTQConfig.from_dict({"bits": 4} | fields).checkpoint_format == expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.0.mlp.up", (4, 128)),
        ("model.layers.0.mlp.down", (8, 128)),
        ("model.layers.1.mlp.down", None),
        ("x.model.layers.1.mlp.down", (4, 128)),  # matched from the start
        ("lm_head", (2, 32)),
    ],
)
def test_the_first_pattern_that_matches_counts(module: str, expected: tuple[int, int] | None) -> None:
    dynamic = {
        r"-:model\.layers\.1\.": {},
        r"+:model\.layers\.\d+\.mlp\.down": {"bits": 8},
        r"model\.layers\.0\.mlp\.down": {"bits": 2},
        "lm_head": {"bits": 2, "group_size": 32, "mse": 2.4},
    }
    found = GPTQConfig(dynamic=dynamic).of(module)
    assert (found and (found.bits, found.group_size)) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": "4"}, r"GPTQConfig.bits is '4'"),
        ({"bits": True}, r"GPTQConfig.bits is True"),
        ({"group_size": 0}, r"GPTQConfig.group_size is 0, expected a positive number or -1"),
        ({"group_size": -2}, r"GPTQConfig.group_size is -2"),
        ({"sym": 1}, r"GPTQConfig.sym is 1"),
        ({"pack_dtype": "int64"}, r"GPTQConfig.pack_dtype is 'int64', expected 'int32'"),
        ({"compute_dtype": "int8"}, r"GPTQConfig.compute_dtype is torch.int8"),
        ({"damp_percent": 1.5}, r"GPTQConfig.damp_percent is 1.5, expected a number between 0 and 1"),
        ({"meta": []}, r"GPTQConfig.meta is \[\]"),
        ({"dynamic": []}, r"GPTQConfig.dynamic is \[\]"),
        ({"dynamic": {"-:(": {}}}, r"GPTQConfig.dynamic\['-:\('\] is no regular expression"),
        ({"dynamic": {"x": 1}}, r"GPTQConfig.dynamic\['x'\] is 1"),
        ({"dynamic": {"x": {"bits": 0}}}, r"GPTQConfig.dynamic\['x'\].bits is 0"),
        ({"dynamic": {"x": {"sym": "yes"}}}, r"GPTQConfig.dynamic\['x'\].sym is 'yes'"),
        ({"dynamic": {"x": {"adapter": {}}}}, r"GPTQConfig.dynamic\['x'\] has the field 'adapter'"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTQConfig.from_dict({"bits": 4} | fields)


def test_how_codes_are_found() -> None:
    assert GPTQConfig().search("x") == Search(damp_percent=0.05, static_groups=False, act_group_aware=True)
    assert not GPTQConfig(desc_act=True).search("x").act_group_aware
    assert not GPTQConfig(act_group_aware=False).search("x").act_group_aware
    assert not GPTQConfig(static_groups=True).search("x").act_group_aware


def test_data_are_no_part_of_a_checkpoint() -> None:
    config = GPTQConfig(dataset=["a text"], tokenizer="folder", model_seqlen=64, batch_size=4)
    assert config.to_dict() == GPTQConfig().to_dict()
    assert config == GPTQConfig()
    assert "a text" not in repr(config)
    stored = GPTQConfig.from_dict(TRANSFORMERS)
    assert stored.overridden_by(GPTQConfig(bits=3, group_size=-1)) == stored
    with pytest.raises(ConfigError, match="already quantized, so there is nothing to calibrate with batch_size="):
        stored.overridden_by(config)


def test_bits_have_to_be_given() -> None:
    with pytest.raises(ConfigError, match="bits isn't given"):
        GPTQConfig.from_dict({"group_size": 128})


def test_the_compute_dtype_is_written_if_it_is_set() -> None:
    assert "compute_dtype" not in GPTQConfig().to_dict()
    assert GPTQConfig(compute_dtype=torch.bfloat16).to_dict()["compute_dtype"] == "bfloat16"
