"""What is loaded how: one case is the same request in the words of each contender."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to load; everything stays in bfloat16 that isn't quantized."""

    preset: str | None = None
    """What quantdock is given as ``quantize``."""
    config: Mapping[str, object] | None = field(default_factory=dict)
    """The same for transformers, as ``config.json`` has it; empty for no quantization, ``None`` where it has no way."""
    packages: tuple[str, ...] = ()
    """Modules that quantdock needs for it and that may not be installed."""
    cached: bool = False
    """quantdock finds its own result of an earlier load in its cache."""

    @property
    def missing(self) -> str | None:
        """Why it can't be measured here."""
        absent = [name for name in self.packages if find_spec(name) is None]
        return f"no module named {' or '.join(map(repr, absent))}" if absent else None


def _bitsandbytes(**settings: object) -> dict[str, object]:
    return {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "bfloat16", **settings}


def _torchao(preset: str, name: str) -> Case:
    quant_type = {"default": {"_type": name, "_version": 2, "_data": {}}}
    config = {"quant_method": "torchao", "quant_type": quant_type}
    return Case(preset=preset, config=config, packages=("quantdock_torchao", "torchao"))


def _quanto(weights: str) -> Case:
    config = {"quant_method": "quanto", "weights": weights}
    return Case(preset=f"quanto-{weights}", config=config, packages=("quantdock_quanto", "optimum"))


AS_STORED = "bf16"
"""The case that asks for nothing: a checkpoint comes as it is stored, quantized or not."""

_NF4 = _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")

METHODS: dict[str, Case] = {
    "nf4": Case(preset="bnb-nf4", config=_NF4),
    "nf4-dq": Case(preset="bnb-nf4-dq", config=_NF4 | {"bnb_4bit_use_double_quant": True}),
    "fp4": Case(preset="bnb-fp4", config=_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "int8": Case(preset="bnb-int8", config=_bitsandbytes(load_in_8bit=True)),
    "torchao-int8": _torchao("torchao-int8", "Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": _torchao("torchao-int8-dynamic", "Int8DynamicActivationInt8WeightConfig"),
    "torchao-float8": _torchao("torchao-float8", "Float8WeightOnlyConfig"),
    "quanto-int8": _quanto("int8"),
    "quanto-float8": _quanto("float8"),
}
"""Quantized on the way, by transformers too."""

ALONE: dict[str, Case] = {
    name: Case(preset=name, config=None, packages=(package,))
    for name, package in (
        ("fp8", "quantdock_fp8"),
        ("fp8-row", "quantdock_fp8"),
        ("fp8-block", "quantdock_fp8"),
        ("gptq-int4", "quantdock_gptq"),
        ("gptq-int8", "quantdock_gptq"),
    )
}
"""What transformers doesn't do: it refuses FP8 where there is no GPU, and GPTQ without data."""

CASES: dict[str, Case] = {
    AS_STORED: Case(),
    **METHODS,
    **ALONE,
    "nf4-cached": Case(preset="bnb-nf4", config=_NF4, cached=True),
}


def left_out(cases: Sequence[str]) -> dict[str, str]:
    """Those that can't be measured here, and why."""
    return {case: reason for case in cases if (reason := CASES[case].missing) is not None}
