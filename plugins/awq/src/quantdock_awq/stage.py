"""Older checkpoints: what ``config.json`` doesn't say of quantization, a file beside it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantdock import StandaloneConfig

# This module is imported by every load, AWQ or not.

_MARKS = frozenset({"w_bit", "q_group_size"})
"""Fields that a file has one of if it is AWQ's and says no ``quant_method``, as AutoAWQ's doesn't."""


class AwqStage(StandaloneConfig):
    """Reads ``quant_config.json`` or ``quantize_config.json`` where ``config.json`` has no ``quantization_config``."""

    files = ("quant_config.json", "quantize_config.json")
    quant_method = "awq"

    def recognizes(self, data: Mapping[str, Any]) -> bool:
        method = data.get("quant_method")
        return method == "awq" or (method is None and not _MARKS.isdisjoint(data))
