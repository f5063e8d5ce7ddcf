"""Older checkpoints: what ``config.json`` doesn't say of quantization, a file beside it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from pathlib import Path

from quantdock import LoadOptions, ModelConfig, Source, hookimpl, read_json_object

# This module is imported by every load, AWQ or not.

_FILES = ("quant_config.json", "quantize_config.json")
_MARKS = frozenset({"w_bit", "q_group_size"})
"""Fields that a file has one of if it is AWQ's and says no ``quant_method``, as AutoAWQ's doesn't."""


class AwqStage:
    """Reads ``quant_config.json`` or ``quantize_config.json`` where ``config.json`` has no ``quantization_config``."""

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
        for name, path in source.fetch(_FILES).items():
            data = read_json_object(path, "a quantization config")
            method = data.get("quant_method")
            if method == "awq" or (method is None and not _MARKS.isdisjoint(data)):
                quantization = data | {"quant_method": "awq"}
                return dataclasses.replace(
                    config,
                    data={**config.data, "quantization_config": quantization},
                    origin=f"{config.origin} and {name}",
                )
        return config
