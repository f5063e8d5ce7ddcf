"""The config: what it reads, what it writes, and that it names nothing but data."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdock import ConfigError, UnsupportedError
from quantdock_torchao import TorchAoConfig, upstream
from quantdock_torchao.presets import FLOAT8, INT4, INT8, INT8_DYNAMIC
from quantdock_torchao.quantizer import TorchAoQuantizer


def config(name: object, data: object = None) -> TorchAoConfig:
    version = 2 if name in ("Int8WeightOnlyConfig", "IntxWeightOnlyConfig") else 1
    data = {} if data is None else data
    return TorchAoConfig(quant_type={"default": {"_type": name, "_version": version, "_data": data}})


def test_presets_are_what_torchao_and_transformers_write() -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    ao = upstream.module("torchao.quantization")
    pairs = [
        (INT8, ao.Int8WeightOnlyConfig()),
        (INT8_DYNAMIC, ao.Int8DynamicActivationInt8WeightConfig()),
        (FLOAT8, ao.Float8WeightOnlyConfig()),
        (INT4, ao.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d")),
    ]
    for ours, theirs in pairs:
        assert ours.method() == theirs
        assert TorchAoConfig(quant_type=theirs) == ours
        assert json.loads(json.dumps(transformers.TorchAoConfig(theirs).to_dict())) == ours.to_dict()
        assert TorchAoConfig.from_dict(transformers.TorchAoConfig(theirs).to_dict()) == ours


def test_configs_by_name_survive_json_in_their_order() -> None:
    ao = upstream.module("torchao.quantization")
    by_name = OrderedDict(
        [
            ("re:.*z", ao.Int8WeightOnlyConfig()),
            ("a", None),
            ("re:.*b", ao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
        ]
    )
    ours = TorchAoConfig(quant_type=ao.FqnToConfig(by_name))
    method = TorchAoConfig.from_dict(json.loads(json.dumps(ours.to_dict()))).method()
    assert list(method.fqn_to_config.items()) == list(by_name.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "int8_weight_only"}, "quant_type is 'int8_weight_only'"),
        ({"quant_type": {"other": INT8.quant_type["default"]}}, "quant_type is"),
        ({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "quant_type is"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        ({"modules_to_not_convert": ["("]}, r"modules_to_not_convert: '\(' is no regular expression"),
        ({"untie_embedding_weights": 1}, "untie_embedding_weights is 1"),
        ({"include_input_output_embeddings": None}, "include_input_output_embeddings is None"),
    ],
)
def test_values_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchAoConfig(**{"quant_type": INT8.quant_type} | changes)


def test_a_config_with_tensors_has_no_json() -> None:
    ao = upstream.module("torchao.quantization")
    with pytest.raises(UnsupportedError, match=r"can't be written as JSON and read again, .* Use Int8WeightOnlyConfig"):
        TorchAoConfig(quant_type=ao.Int8StaticActivationInt8WeightConfig(act_quant_scale=torch.ones(1, 1)))


@pytest.mark.parametrize(
    "name",
    [
        "quantize_",
        "to_nf4",
        "Int8Tensor",
        "torch",
        "os",
        "utils",
        "register_quantize_module_handler",
        "__class__",
        "a.b",
    ],
)
def test_what_is_no_class_of_data_is_not_called(name: str) -> None:
    """torchao looks a name up in its modules and calls whatever it finds there."""
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        config(name).method()
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        config("Int8WeightOnlyConfig", {"granularity": {"_type": name, "_data": {}}}).method()
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        config("FqnToConfig", {"fqn_to_config": {"a": {"_type": name, "_data": {}}}}).method()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("NoSuchConfig", {}, "no class of data 'NoSuchConfig'"),
        ("Int8WeightOnlyConfig", {"no_such_field": 1}, "no_such_field"),
        ("MappingType", "SYMMETRIC", "'MappingType', which is no config"),
        ("MappingType", "__class__", "has no member '__class__'"),
        ("torch.dtype", "load", "'load' is not the name of a torch dtype"),
        ("torch.dtype", "float32", "'torch.dtype', which is no config"),
        (["Int8WeightOnlyConfig"], {}, "is not the name of a class"),
        ("IntxWeightOnlyConfig", [], r"_data of IntxWeightOnlyConfig is \[\], expected an object"),
        ("IntxWeightOnlyConfig", {"granularity": {"_type": "PerRow", "_data": None}}, "_data of PerRow is None"),
        (
            "IntxWeightOnlyConfig",
            {"granularity": {"_type": "PerRow", "_version": 7, "_data": {}}},
            "PerRow has version 7",
        ),
        ("IntxWeightOnlyConfig", {"weight_dtype": {"_type": "torch.dtype", "_data": "int16"}}, "must be torch.intx"),
        ("FqnToConfig", {"fqn_to_config": [1]}, r"fqn_to_config is \[1\], expected configs by names"),
        ("FqnToConfig", {"fqn_to_config": {"a": 3}}, "'a' stands for 3, expected one of torchao's configs"),
        ("FqnToConfig", {"fqn_to_config": {"re:(": None}}, r"FqnToConfig: '\(' is no regular expression"),
    ],
)
def test_what_torchao_can_not_read_is_named(name: object, data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(name, data).method()


def test_a_config_that_names_no_method_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"quant_type is missing from the quantization_config \(it has quant_method\)"
    ):
        TorchAoConfig.from_dict({"quant_method": "torchao"})


def test_a_config_of_a_newer_torchao_is_refused() -> None:
    """torchao itself would warn, and read it as one of its own."""
    asked = TorchAoConfig(quant_type={"default": INT8.quant_type["default"] | {"_version": 9}})
    with pytest.raises(
        ConfigError, match="Int8WeightOnlyConfig has version 9, and the torchao that is installed knows"
    ):
        asked.method()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(field=st.sampled_from(["granularity", "group_size", "set_inductor_config"]), value=JSON)
def test_any_json_is_read_or_refused(field: str, value: object) -> None:
    asked = TorchAoConfig(
        quant_type={"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {field: value}}}
    )
    try:
        method = asked.method()
    except ConfigError:
        return
    assert getattr(method, field) == value


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("Int4WeightOnlyConfig", {}, "Int4WeightOnlyConfig can't be used on this machine: Requires mslk"),
        (
            "Float8DynamicActivationFloat8WeightConfig",
            {},
            "Float8DynamicActivationFloat8WeightConfig can't be used on this machine: .* requires CUDA",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_what_this_machine_can_not_run_is_refused_once(name: str, data: dict[str, Any], message: str) -> None:
    asked = TorchAoConfig(quant_type={"default": {"_type": name, "_version": 2, "_data": data}})
    with pytest.raises(UnsupportedError, match=message):
        TorchAoQuantizer(asked)
    TorchAoQuantizer(asked, prequantized=True)  # what it loads is described in the file


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_the_preset_for_cuda_is_refused_without() -> None:
    with pytest.raises(UnsupportedError, match="Int4WeightOnlyConfig can't be used on this machine"):
        TorchAoQuantizer(INT4)


@pytest.mark.parametrize("name", ["include_input_output_embeddings", "untie_embedding_weights"])
def test_embeddings_are_not_quantized_while_loading(name: str) -> None:
    asked = TorchAoConfig(quant_type=INT8.quant_type, **{name: True})
    with pytest.raises(UnsupportedError, match=name):
        TorchAoQuantizer(asked)
    TorchAoQuantizer(asked, prequantized=True)
