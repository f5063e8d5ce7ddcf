"""What is loaded how: one case is the same request in the words of each contender."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to load; everything stays in bfloat16 that isn't quantized."""

    preset: str | None = None
    """What quantdock is given as ``quantize``."""
    bitsandbytes: Mapping[str, object] = field(default_factory=dict)
    """Arguments of transformers' ``BitsAndBytesConfig``; empty for no quantization."""
    cached: bool = False
    """quantdock finds its own result of an earlier load in its cache."""


AS_STORED = "bf16"
"""The case that asks for nothing: a checkpoint comes as it is stored, quantized or not."""

_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

METHODS: dict[str, Case] = {
    "nf4": Case(preset="bnb-nf4", bitsandbytes=_NF4),
    "nf4-dq": Case(preset="bnb-nf4-dq", bitsandbytes=_NF4 | {"bnb_4bit_use_double_quant": True}),
    "fp4": Case(preset="bnb-fp4", bitsandbytes={"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "int8": Case(preset="bnb-int8", bitsandbytes={"load_in_8bit": True}),
}

CASES: dict[str, Case] = {
    AS_STORED: Case(),
    **METHODS,
    "nf4-cached": Case(preset="bnb-nf4", bitsandbytes=_NF4, cached=True),
}
