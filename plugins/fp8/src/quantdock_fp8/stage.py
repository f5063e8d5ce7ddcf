"""NVIDIA's checkpoints: what ``config.json`` may not say of quantization, ``hf_quant_config.json`` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from pathlib import Path

from quantdock import LoadOptions, ModelConfig, Source, hookimpl, read_json_object

# This module is imported by every load, 8-bit floats or not.

_FILE = "hf_quant_config.json"


class ModelOptStage:
    """Reads ``hf_quant_config.json`` where ``config.json`` has no ``quantization_config``."""

    @hookimpl(wrapper=True)
    def resolve_config(
        self, source: Source, options: LoadOptions
    ) -> Generator[None, ModelConfig | None, ModelConfig | None]:
        """Whoever resolved the config: with a ``quantization_config``, if only the file beside it has that."""
        config = yield
        if config is None or Path(config.origin).name != "config.json" or options.config is not None:
            return config
        if config.quantization is not None:
            return config
        for name, path in source.fetch([_FILE]).items():
            data = read_json_object(path, "a quantization config")
            if _quantizes_weights(data):
                return dataclasses.replace(
                    config,
                    data={**config.data, "quantization_config": data | {"quant_method": "modelopt"}},
                    origin=f"{config.origin} and {name}",
                )
        return config


def _quantizes_weights(data: Mapping[str, object]) -> bool:
    """Whether it is Model Optimizer's, and about more than the cache: then it says which algorithm."""
    nested = data.get("quantization")
    return bool(nested.get("quant_algo") if isinstance(nested, Mapping) else data.get("quant_algo"))
