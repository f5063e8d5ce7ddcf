"""torchao's own config objects as ``quantize=``, as they are: the same bits, and a reason where they can't be used."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import quantdock
from quantdock import ConfigError, PatternError, UnsupportedError
from quantdock.testing import SmallModel, write_checkpoint
from quantdock_torchao import TorchAoConfig, tensors, upstream

ao: Any = upstream.module("torchao.quantization")
Base: Any = upstream.module("torchao.core.config").AOBaseConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def load(folder: Path, quantize: Any) -> Any:
    return quantdock.load(folder, model=SmallModel, quantize=quantize)


def assert_same(ours: Any, theirs: Any) -> None:
    left, right = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert left.keys() == right.keys()
    for name, value in right.items():
        if not hasattr(value, "tensor_data_names"):
            assert torch.equal(left[name], value)
            continue
        assert tensors.describe(left[name]) == tensors.describe(value)
        parts = tensors.parts_of("weight", left[name])
        for part, tensor in tensors.parts_of("weight", value).items():
            assert torch.equal(parts[part].view(torch.uint8), tensor.view(torch.uint8)), f"{name} {part}"


@pytest.mark.parametrize(
    "method",
    [
        ao.Int8WeightOnlyConfig,
        lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(16)),
        ao.Int8DynamicActivationInt8WeightConfig,
        ao.Float8WeightOnlyConfig,
        lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        lambda: ao.FqnToConfig(
            OrderedDict(
                {r"re:.*\.up": ao.Int8WeightOnlyConfig(), "blocks.1.experts.weight": ao.Float8WeightOnlyConfig()}
            )
        ),
    ],
)
def test_bare_and_wrapped_are_the_same(method: Callable[[], Any], folder: Path, tmp_path: Path) -> None:
    bare = load(folder, method())
    assert any(hasattr(value, "tensor_data_names") for value in bare.parameters())
    assert_same(bare, load(folder, TorchAoConfig(quant_type=method())))
    saved = quantdock.save(bare, tmp_path / "saved")
    assert_same(quantdock.load(saved, model=SmallModel), bare)
    assert_same(load(saved, method()), bare)  # what it is already


def test_a_bare_config_for_a_pattern(folder: Path) -> None:
    model = load(folder, {"*.up": ao.Int8WeightOnlyConfig(), "*.down": ao.Float8WeightOnlyConfig()})
    assert type(model.get_parameter("blocks.0.up.weight")).__name__ == "Int8Tensor"
    assert type(model.get_parameter("blocks.0.down.weight")).__name__ == "Float8Tensor"


@dataclass
class Own(Base):  # type: ignore[misc]
    """A config that torchao's modules don't have."""

    bits: int = 8


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "scales-missing": (
        ao.Int8StaticActivationInt8WeightConfig,
        "Int8StaticActivationInt8WeightConfig",
        "quantizes activations by scales that are found in a calibration",
    ),
    "scales-given": (
        lambda: ao.Int8StaticActivationInt8WeightConfig(act_quant_scale=torch.ones(1, 1)),
        "Int8StaticActivationInt8WeightConfig",
        "can't be written as JSON .*Tensor",
    ),
    "not-torchaos": (Own, "Own", "no class of data 'Own'"),
    "training": (
        lambda: importlib.import_module("torchao.quantization.qat").QATConfig(
            ao.Int8WeightOnlyConfig(), step="prepare"
        ),
        "QATConfig",
        "no class of data 'QATConfig'",
    ),
    "needs-values": (
        lambda: ao.IntxWeightOnlyConfig(
            intx_choose_qparams_algorithm=ao.quant_api.IntxChooseQParamsAlgorithm("hqq_scale_only")
        ),
        "IntxWeightOnlyConfig",
        "tried out on a tensor without values, it raises",
    ),
    "dtype-of-codes": (
        lambda: ao.Float8WeightOnlyConfig(weight_dtype=torch.float32),
        "Float8WeightOnlyConfig",
        "makes Float8Tensor of float32; what can be loaded again is float8_e4m3fn",
    ),
    "tensor-class": (
        lambda: importlib.import_module("torchao.prototype.quantization.gguf").GGUFWeightOnlyConfig(),
        "GGUFWeightOnlyConfig",
        "makes GGUFQuantizedTensor of it; what can be used is Int8Tensor",
    ),
    "packing": (
        lambda: ao.Int4WeightOnlyConfig(int4_packing_format="opaque"),
        "Int4WeightOnlyConfig",
        "Unsupported int4 packing format: opaque",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_can_not_be_used_is_refused_with_the_reason_and_what_to_do(case: str, folder: Path) -> None:
    method, name, reason = UNSUPPORTED[case]
    with pytest.raises(
        UnsupportedError, match=rf"torchao's {name} can't be used: .*{reason}.*Use Int8WeightOnlyConfig"
    ):
        load(folder, method())
    with pytest.raises(UnsupportedError, match=rf"{reason}.*Use Int8WeightOnlyConfig"):
        load(folder, ao.FqnToConfig(OrderedDict({"blocks.0.up": method()})))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ao.Int4WeightOnlyConfig, "Int4WeightOnlyConfig can't be used on this machine: .*mslk.* Use Int8"),
        (
            lambda: ao.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d"),
            "Int4WeightOnlyConfig can't be used on this machine: .*CUDA.* Use Int8",
        ),
        (
            ao.Float8DynamicActivationFloat8WeightConfig,
            "Float8DynamicActivationFloat8WeightConfig can't be used on this machine: .*CUDA.* Use Int8",
        ),
    ],
)
def test_what_this_machine_lacks_is_named(method: Callable[[], Any], message: str, folder: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        load(folder, method())


@pytest.mark.parametrize("size", [0, -4, "x", 1.5])
def test_a_group_size_that_is_none_is_refused_once(size: Any, folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"IntxWeightOnlyConfig has group_size={size!r}, expected a whole number"):
        load(folder, ao.IntxWeightOnlyConfig(granularity=ao.PerGroup(size)))


@pytest.mark.parametrize(
    ("by_name", "message"),
    [
        ({}, "FqnToConfig: it names nothing, .* nothing would be quantized"),
        (
            {"blocks.9.up": ao.Int8WeightOnlyConfig(), "re:up": ao.Int8WeightOnlyConfig()},
            r"FqnToConfig: 'blocks\.9\.up', 're:up' matches no parameter, .* such as 'embed\.weight'.*whole names",
        ),
    ],
)
def test_names_that_mean_nothing_are_an_error(by_name: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(PatternError, match=message):
        load(folder, ao.FqnToConfig(OrderedDict(by_name)))


@pytest.mark.parametrize(
    ("by_name", "message"),
    [
        ({"re:(": ao.Int8WeightOnlyConfig()}, r"FqnToConfig: '\(' is no regular expression"),
        ({"re:.*up": "int8"}, r"FqnToConfig: 're:\.\*up' stands for 'int8', expected one of torchao's configs"),
        ({"re:.*up": ao.FqnToConfig(OrderedDict())}, r"FqnToConfig: 're:\.\*up' stands for FqnToConfig"),
    ],
)
def test_names_that_stand_for_no_config_are_an_error(by_name: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(folder, ao.FqnToConfig(OrderedDict(by_name)))
