"""The data of torchao quantization, as ``config.json`` holds it."""

from __future__ import annotations

import copy
import dataclasses
import enum
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from quantdock import ConfigError, QuantizationConfig, UnsupportedError
from quantdock_torchao import upstream

INSTEAD = (
    "Use Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Float8WeightOnlyConfig or IntxWeightOnlyConfig, "
    "which need no GPU, or torchao's quantize_ on the loaded model"
)
"""What to do about a config that can't be used."""


@dataclass(frozen=True, kw_only=True)
class TorchAoConfig(QuantizationConfig):
    """What torchao does to which weights; the fields, their names and defaults are those of transformers' class.

    Raises:
        ConfigError: a value doesn't fit; the message names the field.
        UnsupportedError: ``quant_type`` is an object of torchao's that can't be written as JSON and read again.
    """

    quant_method: ClassVar[str] = "torchao"

    quant_type: Mapping[str, Any]
    """``{"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {...}}}``, as ``config.json`` has it. May
    be given as one of torchao's own config objects, ``FqnToConfig`` included."""
    modules_to_not_convert: tuple[str, ...] | None = None
    """Modules that stay as they are: regular expressions from the start of the name up to a dot, or ends of names.
    ``None`` leaves the choice to the architecture."""
    include_input_output_embeddings: bool = False
    """Quantize embeddings too; only for checkpoints that are quantized already."""
    untie_embedding_weights: bool = False
    """Give a tied head a tensor of its own; only for checkpoints that are quantized already."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "quant_type", _as_json(self.quant_type))
        skip: object = self.modules_to_not_convert
        if skip is not None:
            strings = isinstance(skip, list | tuple) and all(isinstance(item, str) and item for item in skip)
            if not strings:
                raise ConfigError(
                    f"TorchAoConfig.modules_to_not_convert is {skip!r}, expected a list of module names or None"
                )
            object.__setattr__(self, "modules_to_not_convert", tuple(self.modules_to_not_convert or ()))
            for item in self.modules_to_not_convert or ():
                _require_expression("modules_to_not_convert", item)
        for name in ("include_input_output_embeddings", "untie_embedding_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"TorchAoConfig.{name} is {getattr(self, name)!r}, expected true or false")

    @classmethod
    def of(cls, method: Any) -> TorchAoConfig:
        """The config for one of torchao's own config objects, such as ``Int8WeightOnlyConfig()``.

        Raises:
            UnsupportedError: it can't be written as JSON, or read again from it.
        """
        return cls(quant_type=method)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        if "quant_type" not in data:
            raise ConfigError(
                "TorchAoConfig.quant_type is missing from the quantization_config (it has "
                f'{", ".join(map(str, data))}), expected {{"default": {{"_type": ..., "_data": ...}}}} in it, as '
                "transformers, torchao and quantdock write it"
            )
        return super().from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, key by key what transformers writes."""
        skip = self.modules_to_not_convert
        return super().to_dict() | {
            "quant_type": copy.deepcopy(self.quant_type),
            "modules_to_not_convert": None if skip is None else list(skip),
        }

    def method(self) -> Any:
        """torchao's own config object.

        Raises:
            ConfigError: torchao has no such config, or doesn't take its values.
        """
        data = self.quant_type["default"]
        try:
            _check_types(data)
            found = upstream.module("torchao.core.config").config_from_dict(data)
        except Exception as error:  # torchao's classes check their values in their own ways
            raise ConfigError(f"TorchAoConfig.quant_type: torchao can't read it ({error})") from error
        if not _is_config(found):
            raise ConfigError(f"TorchAoConfig.quant_type is {data['_type']!r}, which is no config of torchao's")
        if isinstance(found, upstream.module("torchao.quantization").FqnToConfig):
            _check_names(found.fqn_to_config)
        return found


def _is_config(value: object) -> bool:
    return isinstance(value, upstream.module("torchao.core.config").AOBaseConfig)


def _check_names(by_name: object) -> None:
    """Raise unless these are configs, or ``None``, by names and expressions."""
    if not isinstance(by_name, Mapping):
        raise ConfigError(f"FqnToConfig.fqn_to_config is {by_name!r:.200}, expected configs by names")
    for key, value in by_name.items():
        if not isinstance(key, str):
            raise ConfigError(f"FqnToConfig: {key!r} is no name of a parameter or module")
        if key.startswith("re:"):
            _require_expression("quant_type: FqnToConfig", key[3:])
        by_names = isinstance(value, upstream.module("torchao.quantization").FqnToConfig)
        if value is not None and (by_names or not _is_config(value)):
            raise ConfigError(
                f"FqnToConfig: {key!r} stands for {value!r:.200}, expected one of torchao's configs for a tensor, or "
                "None to leave it as it is"
            )


def _require_expression(field: str, item: str) -> None:
    try:
        re.compile(item)
    except re.error as error:
        raise ConfigError(f"TorchAoConfig.{field}: {item!r} is no regular expression ({error})") from error


def _as_json(quant_type: object) -> dict[str, Any]:
    """The JSON object of a config, which torchao need not be imported for unless it is one of its objects."""
    if isinstance(quant_type, Mapping):
        default = quant_type.get("default")
        if quant_type.keys() == {"default"} and isinstance(default, Mapping) and {"_type", "_data"} <= default.keys():
            return copy.deepcopy(dict(quant_type))
    elif any(base.__module__ == "torchao.core.config" for base in type(quant_type).__mro__):
        try:
            data = upstream.module("torchao.core.config").config_to_dict(quant_type)
            _check_types(data)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UnsupportedError(
                f"torchao's {type(quant_type).__name__} can't be used: {quant_type!r:.200} can't be written as JSON "
                f"and read again, as a saved model needs it ({error}). {INSTEAD}"
            ) from error
        return {"default": data}
    raise ConfigError(
        f"TorchAoConfig.quant_type is {quant_type!r:.200}, expected one of torchao's config objects, or "
        '{"default": {"_type": ..., "_data": ...}} as in config.json'
    )


def _check_types(data: object) -> None:
    """Raise unless every ``_type`` names a class of data: torchao looks names up in its modules, and calls them.

    Raises:
        ValueError: one names something else.
    """
    if isinstance(data, list):
        for item in data:
            _check_types(item)
        return
    if not isinstance(data, Mapping):
        return
    if "_type" in data:
        _check_type(data["_type"], data.get("_data"), data.get("_version", 1))
    for value in data.values():
        _check_types(value)


def _check_type(name: object, value: object, version: object) -> None:
    if name == "torch.dtype":
        if not isinstance(value, str) or not isinstance(getattr(torch, value, None), torch.dtype):
            raise ValueError(f"{value!r} is not the name of a torch dtype")
        return
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
        raise ValueError(f"{name!r} is not the name of a class")
    found = _lookup(name)
    if not isinstance(found, type) or not (
        dataclasses.is_dataclass(found) or issubclass(found, enum.Enum) or hasattr(found, "_fields")  # a named tuple
    ):
        raise ValueError(f"torchao's modules for configs have no class of data {name!r}")
    if issubclass(found, enum.Enum):
        if not isinstance(value, str) or value not in found.__members__:
            raise ValueError(f"{name} has no member {value!r}")
    elif not isinstance(value, Mapping):  # torchao would make something of it
        raise ValueError(f"_data of {name} is {value!r:.200}, expected an object with its fields")
    known = getattr(found, "version", 1)
    if type(version) is not int or version > known:  # torchao would read it as one of its own
        raise ValueError(f"{name} has version {version!r}, and the torchao that is installed knows up to {known}")


def _lookup(name: str) -> object:
    """What torchao would take ``name`` for."""
    for path in upstream.module("torchao.core.config").ALLOWED_AO_MODULES:
        try:
            return getattr(importlib.import_module(path), name)
        except (ImportError, AttributeError):
            continue
    return None
