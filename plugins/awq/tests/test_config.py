"""The config: what others write, and what doesn't fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantdock
from quantdock import ConfigError
from quantdock.testing import SmallModel, write_checkpoint
from quantdock_awq.config import AwqConfig

AUTOAWQ = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM", "modules_to_not_convert": None}
IN_CONFIG_JSON = {
    "quant_method": "awq",
    "backend": "autoawq",
    "bits": 4,
    "do_fuse": False,
    "exllama_config": None,
    "fuse_max_seq_len": None,
    "group_size": 64,
    "modules_to_fuse": None,
    "modules_to_not_convert": None,
    "version": "gemm",
    "zero_point": True,
}
GPTQMODEL = {
    "bits": 4,
    "dynamic": None,
    "group_size": 64,
    "desc_act": False,
    "lm_head": False,
    "method": "awq",
    "quant_method": "awq",
    "format": "gemm",
    "checkpoint_format": "gemm",
    "pack_dtype": "int32",
    "zero_point": True,
    "version": "gemm",
    "sym": False,
}


@pytest.mark.parametrize("data", [AUTOAWQ, IN_CONFIG_JSON, GPTQMODEL])
def test_what_others_write_is_read(data: dict[str, Any]) -> None:
    config = AwqConfig.from_dict(data)
    assert config == AwqConfig(bits=4, group_size=64)
    assert AwqConfig.from_dict(config.to_dict()) == config


def test_what_transformers_has() -> None:
    """Its config class passes data and lists on; the rest of its fields is about GPTQ."""
    transformers = pytest.importorskip("transformers", reason="the class is transformers'")
    theirs = transformers.AwqConfig(
        group_size=32, zero_point=False, modules_to_not_convert=["lm_head"], dataset=["text"], tokenizer="path"
    )
    config = AwqConfig.from_dict(theirs.to_dict())
    assert config == AwqConfig(group_size=32, zero_point=False, modules_to_not_convert=["lm_head"])
    assert (config.dataset, config.tokenizer, config.batch_size) == (["text"], "path", 1)
    for version in ("gemm", "gemv", "gemv_fast", "llm-awq"):
        again = transformers.AwqConfig.from_dict(AwqConfig(version=version).to_dict())
        assert AwqConfig.from_dict(again.to_dict()) == AwqConfig(version=version)


def test_data_is_never_written() -> None:
    config = AwqConfig(dataset=["text"], tokenizer="path", batch_size=4, max_length=512)
    assert not {"dataset", "tokenizer", "batch_size", "max_length"} & config.to_dict().keys()
    assert "text" not in repr(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": "4"}, r"AwqConfig.bits is '4', expected 4"),
        ({"bits": True}, r"AwqConfig.bits is True"),
        ({"group_size": 0}, r"AwqConfig.group_size is 0, expected a positive number or -1"),
        ({"group_size": -2}, r"AwqConfig.group_size is -2"),
        ({"zero_point": 1}, r"AwqConfig.zero_point is 1, expected true or false"),
        ({"modules_to_not_convert": "lm_head"}, r"modules_to_not_convert is 'lm_head', expected a list of names"),
        ({"modules_to_not_convert": [1]}, r"modules_to_not_convert is \[1\]"),
        ({"meta": []}, r"AwqConfig.meta is \[\], expected an object"),
        ({"dynamic": 1}, r"AwqConfig.dynamic is 1, expected an object"),
        ({"compute_dtype": "int8"}, r"AwqConfig.compute_dtype is torch.int8"),
        ({"method": "gptq"}, r"AwqConfig.method is 'gptq', expected 'awq'"),
        ({"bits": 4, "w_bit": 3}, "w_bit and bits differ: 3 and 4"),
        ({"group_size": 64, "q_group_size": 128}, "q_group_size and group_size differ: 128 and 64"),
        ({"version": "gemm", "format": "gemv"}, "differ: gemm and gemv"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AwqConfig.from_dict(fields)


def test_quantizing_needs_data(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    for config in (AwqConfig(), {"quant_method": "awq", "bits": 4}):
        with pytest.raises(ConfigError, match=r"AWQ needs calibration data .* quantize='gptq-int4' or 'bnb-nf4'"):
            quantdock.plan(tmp_path, model=SmallModel, quantize=config)


def test_a_data_set_is_not_fetched_by_its_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="dataset='pileval' is the name of a data set"):
        quantdock.plan(tmp_path, model=SmallModel, quantize=AwqConfig(group_size=64, dataset="pileval"))


def test_it_quantizes_to_gemm(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="version is 'gemv', expected 'gemm' to quantize"):
        quantdock.plan(tmp_path, model=SmallModel, quantize=AwqConfig(version="gemv", dataset=["text"]))


def test_the_compute_dtype_is_written_if_it_is_set() -> None:
    assert "compute_dtype" not in AwqConfig().to_dict()
    assert AwqConfig(compute_dtype=torch.bfloat16).to_dict()["compute_dtype"] == "bfloat16"
