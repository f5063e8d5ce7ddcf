"""The data of checkpoints of NVIDIA's Model Optimizer, as ``config.json`` or ``hf_quant_config.json`` holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from quantdock import ConfigError
from quantdock_fp8.config import FloatConfig
from quantdock_fp8.scheme import Scheme

_ALGORITHMS: Mapping[str, Scheme] = {
    "FP8": Scheme(granularities=("tensor",), scale_name="weight_scale"),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(granularities=("row",), scale_name="weight_scale"),
    "FP8_PB_WO": Scheme(granularities=("block",), block_size=(128, 128), scale_name="weight_scale"),
    "MXFP8": Scheme(granularities=("block",), block_size=(1, 32), scale_name="weight_scale"),
    "NVFP4": Scheme(
        bits=4,
        granularities=("block",),
        block_size=(1, 16),
        scale_name="weight_scale",
        scale_names=("weight_scale",),
        scale_dtypes=(torch.float8_e4m3fn,),
        factor_name="weight_scale_2",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ModelOptConfig(FloatConfig):
    """What NVIDIA's Model Optimizer writes, for those of its algorithms that have weights in floats.

    All but ``quant_algo`` and ``group_size`` is carried along.

    Raises:
        ConfigError: a value doesn't fit; the message names the field.
    """

    quant_method: ClassVar[str] = "modelopt"

    quant_algo: str
    group_size: int | None = None
    """Elements of a row that share a scale, where the algorithm doesn't say it already."""
    producer: Any = None
    config_groups: Any = None
    ignore: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] | None = None
    kv_cache_scheme: Any = None
    kv_cache_quant_algo: str | None = None

    def __post_init__(self) -> None:
        known = ", ".join(map(repr, _ALGORITHMS))
        self._expect("quant_algo", self.quant_algo in _ALGORITHMS, f"one of {known}; this plugin reads no other")
        block = self.scheme.block_size
        if self.group_size is not None:
            fits = block is not None and block == (1, self.group_size)
            other = "none" if block is None or block[0] > 1 else f"{block[1]}"
            self._expect("group_size", fits, f"{other}, which {self.quant_algo!r} has")
        self._set_names("ignore")
        self._set_names("exclude_modules")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON object; what older files have in an object ``quantization`` is a field like any other.

        Raises:
            ConfigError: a field is unknown, missing or contradicts another, or a value doesn't fit.
        """
        values = dict(data)
        nested = values.pop("quantization", None)
        if nested is not None:
            if not isinstance(nested, Mapping):
                raise ConfigError(f"ModelOptConfig.quantization is {nested!r}, expected an object")
            twice = sorted(name for name in nested.keys() & values.keys() if nested[name] != values[name])
            if twice:
                raise ConfigError(f"ModelOptConfig: {', '.join(twice)} differs inside and outside of quantization")
            values |= nested
        if "quant_algo" not in values:
            raise ConfigError("ModelOptConfig.quant_algo is missing; it says how scales are stored")
        return super().from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, without the object ``quantization`` that older files have."""
        return self._written()

    @property
    def scheme(self) -> Scheme:
        return _ALGORITHMS[self.quant_algo]
