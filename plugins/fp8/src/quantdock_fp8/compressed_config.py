"""The data of compressed-tensors checkpoints, as far as their weights are floats; fields as in compressed-tensors 0.20
(``QuantizationConfig``, ``QuantizationScheme``, ``QuantizationArgs``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from quantdock import ConfigError
from quantdock_fp8.config import FloatConfig
from quantdock_fp8.scheme import EXPONENTS, Granularity, Scheme
from quantdock_fp8.targets import check_patterns
from quantdock_fp8.tiling import Block

FLOAT = "float-quantized"
NVFP4 = "nvfp4-pack-quantized"
MXFP4 = "mxfp4-pack-quantized"
MIXED = "mixed-precision"
"""What the whole is called where groups differ in their formats."""

_GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
_WEIGHTS = {
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
}
_KEPT = ("input_scale", "input_global_scale", "output_scale", "k_scale", "v_scale")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One of ``config_groups``: which modules, and how their weights are stored."""

    name: str
    targets: tuple[str, ...]
    scheme: Scheme


@dataclass(frozen=True, kw_only=True)
class CompressedTensorsConfig(FloatConfig):
    """Groups of modules, each with its own way to store weights, as llm-compressor writes them.

    What isn't about the weights of modules is carried along: activations, the cache, who wrote it.

    Raises:
        ConfigError: a value doesn't fit, or a format isn't read; the message names the field.
    """

    quant_method: ClassVar[str] = "compressed-tensors"

    config_groups: Mapping[str, Any]
    """Name -> ``targets``, ``weights``, and more."""
    format: str | None = None
    """That of groups that don't say it themselves."""
    ignore: tuple[str, ...] | None = None
    """Modules that stay as they are, though they are targets: names, ``re:`` and a regular expression that matches from
    the start of a name, or classes."""
    kv_cache_scheme: Any = None
    quantization_status: str | None = None
    global_compression_ratio: float | None = None
    sparsity_config: Any = None
    transform_config: Any = None
    moe_sparsity_config: Any = None
    version: str | None = None

    def __post_init__(self) -> None:
        self._set_names("ignore")
        check_patterns("CompressedTensorsConfig.ignore", self.ignore or ())
        sparsity, transform = self.sparsity_config, self.transform_config
        dense = not sparsity or (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense")
        self._expect("sparsity_config", dense, "none, or the format 'dense'; sparse weights can't be loaded")
        unrotated = not transform or (isinstance(transform, Mapping) and not any(transform.values()))
        self._expect("transform_config", unrotated, "none; weights that were rotated can't be loaded")
        groups: object = self.config_groups
        self._expect("config_groups", isinstance(groups, Mapping) and bool(groups), "an object with a group or more")
        if self.format != MIXED:
            _check_format("CompressedTensorsConfig", self.format)
        if not self.groups:
            raise ConfigError(
                "CompressedTensorsConfig.config_groups has no group with weights, so nothing says how they are stored"
            )

    @property
    def groups(self) -> tuple[Group, ...]:
        """Those of ``config_groups`` that are about weights."""
        found = (_group(name, data, self.format) for name, data in self.config_groups.items())
        return tuple(group for group in found if group is not None)

    @property
    def scheme(self) -> Scheme:
        """That of the first group."""
        return self.groups[0].scheme

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return self._written()


def _group(name: str, data: object, default_format: str | None) -> Group | None:
    where = f"CompressedTensorsConfig.config_groups[{name!r}]"
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} is {data!r}, expected an object; write a preset's name out as what it stands for")
    _check_fields(where, data, _GROUP)
    targets: object = data.get("targets")
    if not isinstance(targets, list | tuple) or not all(isinstance(item, str) and item for item in targets):
        raise ConfigError(f"{where}.targets is {targets!r}, expected a list of names, patterns or classes")
    check_patterns(f"{where}.targets", targets)
    weights: object = data.get("weights")
    if weights is None:  # activations only, which aren't quantized
        return None
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{where}.weights is {weights!r}, expected an object or null")
    _check_fields(f"{where}.weights", weights, _WEIGHTS)
    stored_as = _check_format(where, data.get("format") or default_format)
    activations = data.get("input_activations")
    static = isinstance(activations, Mapping) and activations.get("dynamic") in (None, False)
    reason = f"input_activations of the group {name!r}, which aren't dynamic," if static else None
    return Group(name=name, targets=tuple(targets), scheme=_MAKERS[stored_as](f"{where}.weights", weights, reason))


def _check_fields(where: str, data: Mapping[Any, Any], known: set[str]) -> None:
    unknown = sorted(map(str, data.keys() - known))
    if unknown:
        raise ConfigError(
            f"{where} has the field {', '.join(map(repr, unknown))}, which this plugin doesn't know; known fields: "
            f"{', '.join(sorted(known))}"
        )


def _check_format(where: str, found: object) -> str:
    if isinstance(found, str) and found in _MAKERS:
        return found
    raise ConfigError(
        f"{where}.format is {found!r}; of compressed-tensors, quantdock-fp8 reads "
        f"{' and '.join(map(repr, _MAKERS))}, and {MIXED!r} of groups that are stored so"
    )


def _expect(where: str, data: Mapping[str, Any], name: str, default: object, *expected: object) -> None:
    found = data.get(name, default)
    if found not in expected:
        raise ConfigError(f"{where}.{name} is {found!r}, expected {' or '.join(map(repr, expected))}")


def _float8(where: str, weights: Mapping[str, Any], static: str | None) -> Scheme:
    _expect_floats(where, weights, 8)
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:  # as compressed-tensors infers it
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    _expect(where, {"strategy": strategy}, "strategy", None, "tensor", "channel", "block")
    granularity: Granularity = "block" if strategy == "block" else "row" if strategy == "channel" else "tensor"
    return Scheme(
        granularities=(granularity,),
        block_size=_block(where, weights.get("block_structure")) if granularity == "block" else None,
        scale_name="weight_scale",
        scale_names=("weight_scale",),
        scale_dtypes=_FLOATS,
        static=static,
        extra_names=_KEPT,
    )


def _nvfp4(where: str, weights: Mapping[str, Any], static: str | None) -> Scheme:
    """Scales of 16 elements, relative to one number: NVIDIA's format. It is divided by that number
    (``NVFP4PackedCompressor``), where Model Optimizer multiplies."""
    _expect_floats(where, weights, 4)
    _expect(where, weights, "strategy", "tensor_group", "tensor_group", "group")
    _expect(where, weights, "group_size", None, 16)
    return Scheme(
        bits=4,
        codes_name="weight_packed",
        granularities=("block",),
        block_size=(1, 16),
        scale_name="weight_scale",
        scale_names=("weight_scale",),
        scale_dtypes=(torch.float8_e4m3fn,),
        factor_name="weight_global_scale",
        divides=True,
        extra_names=_KEPT,
    )


def _mxfp4(where: str, weights: Mapping[str, Any], static: str | None) -> Scheme:
    """Powers of two for 32 elements."""
    _expect_floats(where, weights, 4)
    _expect(where, weights, "strategy", "group", "group")
    _expect(where, weights, "group_size", None, 32)
    return Scheme(
        bits=4,
        codes_name="weight_packed",
        granularities=("block",),
        block_size=(1, 32),
        scale_name="weight_scale",
        scale_names=("weight_scale",),
        scale_dtypes=EXPONENTS,
        extra_names=_KEPT,
    )


def _expect_floats(where: str, weights: Mapping[str, Any], bits: int) -> None:
    _expect(where, weights, "type", "int", "float")
    _expect(where, weights, "num_bits", 8, bits)
    _expect(where, weights, "symmetric", True, True)
    _expect(where, weights, "dynamic", False, False)


def _block(where: str, given: object) -> Block:
    sizes = given.split("x") if isinstance(given, str) else given  # older versions wrote "128x128"
    listed = list(sizes) if isinstance(sizes, list | tuple) else []
    numbers = [int(size) for size in listed if _is_size(size)]
    if len(listed) != 2 or len(numbers) != 2:
        raise ConfigError(f"{where}.block_structure is {given!r}, expected two positive integers")
    return numbers[0], numbers[1]


def _is_size(given: object) -> bool:
    if isinstance(given, str):
        return given.isascii() and given.isdigit() and int(given) > 0
    return type(given) is int and given > 0


_MAKERS = {FLOAT: _float8, NVFP4: _nvfp4, MXFP4: _mxfp4}
"""Format -> what reads ``weights``."""
