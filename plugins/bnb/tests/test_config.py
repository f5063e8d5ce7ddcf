"""The config reads and writes exactly what transformers does, and names what doesn't fit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from quantdock import ConfigError
from quantdock_bnb import presets
from quantdock_bnb.config import BLOCKSIZES, STORAGE_DTYPES, BitsAndBytesConfig

transformers = pytest.importorskip("transformers", reason="compares with transformers' own config class")

ARGUMENTS = [
    {"load_in_4bit": True},
    {"load_in_8bit": True},
    {"load_in_8bit": True, "llm_int8_threshold": 0.0, "llm_int8_skip_modules": ["lm_head", "h.*"]},
    {"load_in_8bit": True, "llm_int8_has_fp16_weight": True, "llm_int8_enable_fp32_cpu_offload": True},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"},
    *({"load_in_4bit": True, "bnb_4bit_quant_storage": dtype} for dtype in STORAGE_DTYPES),
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_same_json_as_transformers(arguments: dict[str, object]) -> None:
    theirs = transformers.BitsAndBytesConfig(**arguments)
    ours = BitsAndBytesConfig.from_dict(theirs.to_dict())
    assert list(ours.to_dict().items()) == list(theirs.to_dict().items())
    assert BitsAndBytesConfig.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours
    assert transformers.BitsAndBytesConfig.from_dict(ours.to_dict()).to_dict() == theirs.to_dict()


def test_defaults_are_those_of_transformers() -> None:
    for mode in ("load_in_4bit", "load_in_8bit"):
        ours = BitsAndBytesConfig(**{mode: True})
        assert ours.to_dict() == transformers.BitsAndBytesConfig(**{mode: True}).to_dict()


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blocksize_is_written_unless_it_is_the_usual_one(blocksize: int) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_blocksize=blocksize)
    written = config.to_dict()
    assert ("bnb_4bit_blocksize" in written) == (blocksize != 64)
    assert BitsAndBytesConfig.from_dict(written) == config
    transformers.BitsAndBytesConfig.from_dict(written)  # it passes over the field, and still reads the rest


def test_null_dtypes_and_old_configs() -> None:
    old = {"load_in_4bit": True, "bnb_4bit_compute_dtype": None, "bnb_4bit_quant_type": "nf4"}
    assert BitsAndBytesConfig.from_dict(old).bnb_4bit_compute_dtype == torch.float32
    assert BitsAndBytesConfig.from_dict({"_load_in_8bit": True}).load_in_8bit
    assert BitsAndBytesConfig.from_dict({"load_in_8bit": True, "llm_int8_threshold": 6}).llm_int8_threshold == 6.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "neither of load_in_4bit and load_in_8bit"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "both of load_in_4bit and load_in_8bit"),
        ({"load_in_4bit": True, "_load_in_4bit": False}, "load_in_4bit is True, but _load_in_4bit is False"),
        ({"load_in_4bit": True, "bnb_4bit_kwant_type": "nf4"}, "no field 'bnb_4bit_kwant_type'"),
        ({"load_in_4bit": 1}, "load_in_4bit is 1, expected true or false"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type is 'int4', expected one of 'fp4'"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat17"}, "bnb_4bit_compute_dtype: 'bfloat17' is not the"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype is torch.int8, expected"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "int32"}, "bnb_4bit_quant_storage is torch.int32, expected"),
        ({"load_in_4bit": True, "bnb_4bit_blocksize": 100}, "bnb_4bit_blocksize is 100, expected one of 32, 64"),
        ({"load_in_8bit": True, "llm_int8_threshold": -1.0}, "llm_int8_threshold is -1.0, expected a number"),
        ({"load_in_8bit": True, "llm_int8_threshold": "6"}, "llm_int8_threshold is '6', expected a number"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules is 'lm_head', expected a"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": [""]}, "llm_int8_skip_modules is .* expected a list"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["("]}, r"llm_int8_skip_modules: '\(' is no regular"),
        ({"load_in_8bit": True, "bnb_4bit_use_double_quant": "no"}, "bnb_4bit_use_double_quant is 'no', expected true"),
    ],
)
def test_what_does_not_fit_is_named(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BitsAndBytesConfig.from_dict(data)


def test_what_a_user_may_override_for_a_saved_checkpoint() -> None:
    assert BitsAndBytesConfig.runtime_fields() == {
        "bnb_4bit_compute_dtype",
        "llm_int8_threshold",
        "llm_int8_enable_fp32_cpu_offload",
    }
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=("lm_head",))
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)
    assert stored.overridden_by(asked).bnb_4bit_compute_dtype == torch.float16
    with pytest.raises(ConfigError, match="load_in_8bit=False"):
        stored.overridden_by(presets.INT8)


def test_presets() -> None:
    assert presets.NF4.bnb_4bit_quant_type == presets.NF4_DQ.bnb_4bit_quant_type == "nf4"
    assert presets.FP4.bnb_4bit_quant_type == "fp4"
    assert presets.NF4_DQ.bnb_4bit_use_double_quant
    assert not presets.NF4.bnb_4bit_use_double_quant
    assert {p.bnb_4bit_compute_dtype for p in (presets.NF4, presets.NF4_DQ, presets.FP4)} == {torch.bfloat16}
    assert presets.INT8.load_in_8bit
    assert presets.INT8.llm_int8_threshold == 6.0


def test_presets_import_no_bitsandbytes() -> None:
    script = "import sys, quantdock_bnb.presets; sys.exit('bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
