"""The conformance suite of quantdock, for every preset that runs on CPU and the other configs that do."""

from __future__ import annotations

from typing import Any

from quantdock.testing import QuantizerConformance
from quantdock_torchao.config import TorchAoConfig
from quantdock_torchao.presets import FLOAT8, INT8, INT8_DYNAMIC


def config(name: str, **data: Any) -> TorchAoConfig:
    return TorchAoConfig(quant_type={"default": {"_type": name, "_version": 2, "_data": data}})


def group(size: int) -> dict[str, Any]:
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": size}}


FOUR_BITS = {"_type": "torch.dtype", "_data": "int4"}


class TestRows(QuantizerConformance):
    method = "torchao"
    presets = ("torchao-int8", "torchao-int8-dynamic")
    configs = (INT8, INT8_DYNAMIC)
    min_sqnr_db = 38.0
    heavy_modules = ("torchao",)


class TestFloat8(QuantizerConformance):
    method = "torchao"
    presets = ("torchao-float8", "torchao-int4")
    configs = (FLOAT8,)
    min_sqnr_db = 28.0
    heavy_modules = ("torchao",)


class TestGroups(QuantizerConformance):
    method = "torchao"
    configs = (
        config("Int8WeightOnlyConfig", granularity=group(32)),
        config("IntxWeightOnlyConfig", weight_dtype=FOUR_BITS, granularity=group(32)),
        config("Int8DynamicActivationIntxWeightConfig", weight_dtype=FOUR_BITS, weight_granularity=group(32)),
    )
    min_sqnr_db = 17.0
    unsupported_shape = (40, 64)


class TestWhole(QuantizerConformance):
    """One scale for a tensor: no slices."""

    method = "torchao"
    configs = (config("Int8WeightOnlyConfig", granularity={"_type": "PerTensor", "_version": 1, "_data": {}}),)
    min_sqnr_db = 30.0
