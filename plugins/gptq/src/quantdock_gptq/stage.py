"""Older checkpoints: what ``config.json`` doesn't say of quantization, a file beside it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantdock import StandaloneConfig

# This module is imported by every load, GPTQ or not.

_MARKS = frozenset({"desc_act", "checkpoint_format", "damp_percent"})
"""Fields that a file has one of if it is GPTQ's and says no ``quant_method``, as AutoGPTQ's doesn't."""


class GPTQStage(StandaloneConfig):
    """Reads ``quantize_config.json`` or ``quant_config.json`` where ``config.json`` has no ``quantization_config``."""

    files = ("quantize_config.json", "quant_config.json")
    quant_method = "gptq"

    def recognizes(self, data: Mapping[str, Any]) -> bool:
        method = data.get("quant_method")
        return method == "gptq" or (method is None and not _MARKS.isdisjoint(data))
