"""The presets that users type. They are JSON, so that naming one doesn't import torchao."""

from __future__ import annotations

from typing import Any

from quantdock_torchao.config import TorchAoConfig


def _config(name: str, version: int, **data: Any) -> TorchAoConfig:
    return TorchAoConfig(quant_type={"default": {"_type": name, "_version": version, "_data": data}})


_PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}

# Every field is spelled out, as torchao itself writes them: a preset then equals what a checkpoint of it says.
INT8 = _config("Int8WeightOnlyConfig", 2, group_size=None, granularity=_PER_ROW, set_inductor_config=True)
INT8_DYNAMIC = _config(
    "Int8DynamicActivationInt8WeightConfig",
    2,
    act_mapping_type={"_type": "MappingType", "_data": "SYMMETRIC"},
    weight_only_decode=False,
    granularity=_PER_ROW,
    set_inductor_config=True,
    reduce_range=False,
)
FLOAT8 = _config(
    "Float8WeightOnlyConfig",
    2,
    weight_dtype={"_type": "torch.dtype", "_data": "float8_e4m3fn"},
    set_inductor_config=True,
    granularity=_PER_ROW,
)
INT4 = _config(
    "Int4WeightOnlyConfig",
    2,
    group_size=128,
    set_inductor_config=True,
    int4_packing_format="tile_packed_to_4d",
    int4_choose_qparams_algorithm={"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"},
    int4_tile_packed_ntile=8,
)
"""In the packing that needs no library beside torch and torchao; it exists on CUDA only."""
