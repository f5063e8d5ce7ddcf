"""The data of quanto quantization, as transformers' ``QuantoConfig`` has it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from quantdock import ConfigError, QuantizationConfig

WEIGHTS = ("int8", "float8", "int4", "int2")
ACTIVATIONS = (None, "int8", "float8")


@dataclass(frozen=True, kw_only=True)
class QuantoConfig(QuantizationConfig):
    """What quanto makes of weights; the fields, their names and defaults are those of transformers' class.

    Raises:
        ConfigError: a value doesn't fit; the message names the field.
    """

    quant_method: ClassVar[str] = "quanto"

    weights: str = "int8"
    activations: str | None = None
    modules_to_not_convert: tuple[str, ...] | None = None
    """Modules that stay as they are: regular expressions from the start of the name up to a dot, or ends of names.
    ``None`` leaves the choice to the architecture."""

    def __post_init__(self) -> None:
        for name, choices in (("weights", WEIGHTS), ("activations", ACTIVATIONS)):
            value: object = getattr(self, name)
            if not isinstance(value, str | None) or value not in choices:
                raise ConfigError(f"QuantoConfig.{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
        skip: object = self.modules_to_not_convert
        if skip is None:
            return
        if not isinstance(skip, list | tuple) or not all(isinstance(item, str) and item for item in skip):
            raise ConfigError(f"QuantoConfig.modules_to_not_convert is {skip!r}, expected a list of names or None")
        for item in skip:
            try:
                re.compile(item)
            except re.error as error:
                raise ConfigError(
                    f"QuantoConfig.modules_to_not_convert: {item!r} is no regular expression ({error})"
                ) from error
        object.__setattr__(self, "modules_to_not_convert", tuple(skip))

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, key by key what transformers writes."""
        skip = self.modules_to_not_convert
        return super().to_dict() | {"modules_to_not_convert": None if skip is None else list(skip)}
