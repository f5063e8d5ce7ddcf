"""The data of bitsandbytes quantization, as ``config.json`` holds it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from quantdock import ConfigError, QuantizationConfig, runtime

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Elements that share one scale, as far as bitsandbytes' 4-bit kernels go."""

DEFAULT_BLOCKSIZE = 64
QUANT_TYPES = ("fp4", "nf4")
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STORAGE_DTYPES = (torch.float16, torch.float32, torch.int8, torch.uint8, torch.float64, torch.bfloat16)

_MODES = ("load_in_4bit", "load_in_8bit")
_FLAGS = (
    *_MODES,
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "bnb_4bit_use_double_quant",
)
_CHOICES: Mapping[str, tuple[object, ...]] = {
    "bnb_4bit_quant_type": QUANT_TYPES,
    "bnb_4bit_compute_dtype": COMPUTE_DTYPES,
    "bnb_4bit_quant_storage": STORAGE_DTYPES,
    "bnb_4bit_blocksize": BLOCKSIZES,
}
_DTYPES = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")


@dataclass(frozen=True, kw_only=True)
class BitsAndBytesConfig(QuantizationConfig):
    """bitsandbytes in 4 or in 8 bits; the fields, their names and defaults are those of transformers' class.

    Exactly one of ``load_in_4bit`` and ``load_in_8bit`` is true. A field of the other mode is carried along unused.

    Raises:
        ConfigError: a value doesn't fit; the message names the field.
    """

    quant_method: ClassVar[str] = "bitsandbytes"

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = runtime(6.0)
    """Activations beyond it are multiplied in 16 bits; 0 turns that off."""
    llm_int8_skip_modules: tuple[str, ...] | None = None
    """Modules that stay as they are, in 4 bits too: regular expressions from the start of the name up to a dot, or
    ends of names. ``None`` leaves the choice to the architecture."""
    llm_int8_enable_fp32_cpu_offload: bool = runtime(False)
    llm_int8_has_fp16_weight: bool = False
    """Keep the weights in full precision and quantize them in each forward. Fixes what is stored, so it is no runtime
    field."""
    bnb_4bit_compute_dtype: torch.dtype = runtime(torch.float32)
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    """Quantize the scales too, to 8 bits in blocks of 256."""
    bnb_4bit_quant_storage: torch.dtype = torch.uint8
    """Dtype that the packed codes are viewed as; FSDP wants the model's own."""
    bnb_4bit_blocksize: int = DEFAULT_BLOCKSIZE
    """Elements per scale. transformers has no such field and always uses 64; it loads other sizes, since each stored
    parameter names its own. Written only when it isn't 64."""

    def __post_init__(self) -> None:
        for name in _FLAGS:
            self._expect(name, isinstance(getattr(self, name), bool), "true or false")
        if self.load_in_4bit == self.load_in_8bit:
            both = "both" if self.load_in_4bit else "neither"
            raise ConfigError(f"BitsAndBytesConfig: {both} of load_in_4bit and load_in_8bit is true; set exactly one")
        threshold: object = self.llm_int8_threshold
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool) and threshold >= 0
        self._expect("llm_int8_threshold", number, "a number that is not negative")
        object.__setattr__(self, "llm_int8_threshold", float(self.llm_int8_threshold))
        self._set_skip_modules()
        for name, choices in _CHOICES.items():
            self._expect(name, getattr(self, name) in choices, f"one of {', '.join(map(repr, choices))}")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"BitsAndBytesConfig.{name} is {getattr(self, name)!r}, expected {expected}")

    def _set_skip_modules(self) -> None:
        skip: object = self.llm_int8_skip_modules
        if skip is None:
            return
        strings = isinstance(skip, list | tuple) and all(isinstance(item, str) and item for item in skip)
        self._expect("llm_int8_skip_modules", strings, "a list of module names or None")
        skip = tuple(self.llm_int8_skip_modules or ())
        for item in skip:
            try:
                re.compile(item)
            except re.error as error:
                raise ConfigError(
                    f"BitsAndBytesConfig.llm_int8_skip_modules: {item!r} is no regular expression ({error})"
                ) from error
        object.__setattr__(self, "llm_int8_skip_modules", skip)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON object, as transformers writes it.

        transformers writes each mode twice, once with a leading underscore; both have to agree. A dtype of ``null``
        is the default.

        Raises:
            ConfigError: a field is unknown or contradicts another, or a value doesn't fit; the message names it.
        """
        values = dict(data)
        for name in _MODES:
            twin = values.pop(f"_{name}", None)
            if twin is not None and values.setdefault(name, twin) != twin:
                raise ConfigError(f"BitsAndBytesConfig: {name} is {values[name]!r}, but _{name} is {twin!r}")
        for name in _DTYPES:
            if name in values and values[name] is None:
                del values[name]
        return super().from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, key by key what transformers writes; ``bnb_4bit_blocksize`` comes last, unless it is 64."""
        values = super().to_dict()
        skip = self.llm_int8_skip_modules
        result = {
            "quant_method": values["quant_method"],
            "_load_in_8bit": self.load_in_8bit,
            "_load_in_4bit": self.load_in_4bit,
            "llm_int8_threshold": self.llm_int8_threshold,
            "llm_int8_skip_modules": None if skip is None else list(skip),
            "llm_int8_enable_fp32_cpu_offload": self.llm_int8_enable_fp32_cpu_offload,
            "llm_int8_has_fp16_weight": self.llm_int8_has_fp16_weight,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": values["bnb_4bit_compute_dtype"],
            "bnb_4bit_quant_storage": values["bnb_4bit_quant_storage"],
            "load_in_4bit": self.load_in_4bit,
            "load_in_8bit": self.load_in_8bit,
        }
        if self.bnb_4bit_blocksize != DEFAULT_BLOCKSIZE:
            result["bnb_4bit_blocksize"] = self.bnb_4bit_blocksize
        return result
