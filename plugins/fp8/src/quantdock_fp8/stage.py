"""NVIDIA's checkpoints: what ``config.json`` may not say of quantization, ``hf_quant_config.json`` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantdock import StandaloneConfig

# This module is imported by every load, 8-bit floats or not.


class ModelOptStage(StandaloneConfig):
    """Reads ``hf_quant_config.json`` where ``config.json`` has no ``quantization_config``."""

    files = ("hf_quant_config.json",)
    quant_method = "modelopt"

    def recognizes(self, data: Mapping[str, Any]) -> bool:
        """Whether it is about more than the cache: then it says which algorithm."""
        nested = data.get("quantization")
        return bool(nested.get("quant_algo") if isinstance(nested, Mapping) else data.get("quant_algo"))
