"""The config of a model: ``config.json`` as data, with the user's overrides applied."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from quantdock.errors import ConfigError

CONFIG_NAME = "config.json"


@runtime_checkable
class ConfigObject(Protocol):
    """A config object of an architecture library (transformers' ``PretrainedConfig``, for one)."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a source says about its model."""

    data: Mapping[str, Any]
    """The JSON object."""
    origin: str
    """Where it was read, for messages."""
    native: ConfigObject | None = None
    """The config object the user passed, for the architecture that understands it."""

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The checkpoint's own ``quantization_config``; composite configs may keep it beside the text model's."""
        for holder in (self.data, self.data.get("text_config")):
            if isinstance(holder, Mapping) and holder.get("quantization_config") is not None:
                found = holder["quantization_config"]
                if not isinstance(found, Mapping):
                    raise ConfigError(
                        f"{self.origin}: quantization_config is {type(found).__name__}, expected an object"
                    )
                return found
        return None

    @property
    def dtype(self) -> str | None:
        """The dtype the model was saved in (``dtype``, or ``torch_dtype`` as older files call it)."""
        found = self.data.get("dtype", self.data.get("torch_dtype"))
        return found if isinstance(found, str) else None

    def overridden(self, overrides: Mapping[str, Any] | None) -> ModelConfig:
        """This config with ``overrides`` merged in; objects are merged key by key, anything else is replaced.

        Raises:
            ConfigError: an override names a key of a nested object that isn't an object in this config.
        """
        if not overrides:
            return self
        return replace(self, data=_merged(self.data, overrides, self.origin, ""), native=None)


def _merged(base: Mapping[str, Any], overrides: Mapping[str, Any], origin: str, path: str) -> dict[str, Any]:
    result = copy.deepcopy(dict(base))
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value, origin, f"{path}{key}.")
        else:
            result[key] = copy.deepcopy(value)
    return result


def read_config(path: Path) -> ModelConfig:
    """Read a ``config.json``.

    Raises:
        ConfigError: it isn't JSON, or not an object.
    """
    return ModelConfig(data=read_json_object(path, "a model config"), origin=str(path))


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON file that has to hold an object.

    Raises:
        ConfigError: it can't be read, isn't JSON, or isn't an object; the message says where the JSON breaks.
    """
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}); expected {what}") from error
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}); expected {what}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds a JSON {type(data).__name__}, expected an object with {what}")
    return data
