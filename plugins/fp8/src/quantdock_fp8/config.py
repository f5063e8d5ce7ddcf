"""The data of 8-bit floating-point quantization, as ``config.json`` holds it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from quantdock import ConfigError, QuantizationConfig, runtime
from quantdock_fp8.activations import FBGEMM_FLOOR, Activations
from quantdock_fp8.scheme import Scheme


class FloatConfig(QuantizationConfig):
    """What the configs of this plugin have in common."""

    @property
    def scheme(self) -> Scheme:
        """How scales are stored."""
        raise NotImplementedError

    @property
    def skipped(self) -> tuple[str, ...]:
        """Entries of ``modules_to_not_convert``, for what is quantized while loading."""
        return ()

    @property
    def activations(self) -> Activations | None:
        """How activations are quantized; ``None`` if they aren't."""
        return None

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{type(self).__name__}.{name} is {getattr(self, name)!r}, expected {expected}")

    def _set_names(self, name: str) -> None:
        """Check a list of patterns of modules, and make it a tuple."""
        given: object = getattr(self, name)
        if given is None:
            return
        strings = isinstance(given, list | tuple) and all(isinstance(item, str) and item for item in given)
        self._expect(name, strings, "a list of module names or None")
        object.__setattr__(self, name, tuple(getattr(self, name)))

    def _written(self) -> dict[str, Any]:
        """Fields as JSON has them; those that aren't set, or aren't about what is stored, are left out."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in super().to_dict().items()
            if value is not None and name not in self.runtime_fields()
        }


class SkippingConfig(FloatConfig):
    """A config that lists the modules to leave alone as transformers does."""

    modules_to_not_convert: tuple[str, ...] | None

    @property
    def skipped(self) -> tuple[str, ...]:
        return self.modules_to_not_convert or ()

    def _set_skipped(self) -> None:
        self._set_names("modules_to_not_convert")
        for item in self.modules_to_not_convert or ():
            try:
                re.compile(item)
            except re.error as error:
                raise ConfigError(
                    f"{type(self).__name__}.modules_to_not_convert: {item!r} is no regular expression ({error})"
                ) from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON object. ``ignored_layers`` is another name of ``modules_to_not_convert``.

        Raises:
            ConfigError: a field is unknown or contradicts another, or a value doesn't fit; the message names it.
        """
        values = dict(data)
        ignored = values.pop("ignored_layers", None)
        if ignored is not None:
            listed = values.get("modules_to_not_convert")
            if listed is not None and listed != ignored:
                raise ConfigError(
                    f"{cls.__name__}: modules_to_not_convert is {listed!r}, but ignored_layers is {ignored!r}"
                )
            values["modules_to_not_convert"] = ignored
        return super().from_dict(values)

    def overridden_by(self, other: Self, asked: Collection[str] | None = None) -> Self:
        """See ``QuantizationConfig``; transformers' way to ask for full precision has another one here."""
        if getattr(other, "dequantize", False) and not getattr(self, "dequantize", False):
            raise ConfigError(
                f"{type(self).__name__}.dequantize is True: load the model as it is stored, then call "
                "quantdock.dequantize(model)"
            )
        return super().overridden_by(other, asked)


@dataclass(frozen=True, kw_only=True)
class Fp8Config(SkippingConfig):
    """One scale per weight, or per block of it: DeepSeek's, transformers' and AutoFP8's ``fp8``.

    Raises:
        ConfigError: a value doesn't fit; the message names the field.
    """

    quant_method: ClassVar[str] = "fp8"

    weight_block_size: tuple[int, int] | None = None
    """Rows and columns that share a scale; ``None`` for one scale per weight."""
    activation_scheme: str = "dynamic"
    """How a kernel for 8-bit activations gets their scale: from themselves, or from the checkpoint (``"static"``)."""
    fmt: str = "e4m3"
    scale_fmt: str = "float"
    """``"ue8m0"`` for scales that are powers of two; quantizing then stores them as float8_e8m0fnu."""
    modules_to_not_convert: tuple[str, ...] | None = None
    """Modules that stay as they are: regular expressions from the start of the name up to a dot, or ends of names.
    ``None`` leaves the choice to the architecture."""
    modules_to_convert: tuple[str, ...] | None = None
    """Embeddings that are quantized too, which this plugin can't load."""
    expert_dtype: str = "fp8"
    dequantize: bool = False
    """What transformers does when it loads the checkpoint; carried along. Here, call ``quantdock.dequantize``."""
    kv_cache_scheme: Any = None
    """For those who quantize the cache; carried along."""
    quantize_activations: bool = runtime(False)
    """Whether linear layers multiply in 8 bits, with activations as ``activation_scheme`` says; on GPUs that can. No
    property of what is stored: it is never written, and asked for anew at each load."""

    def __post_init__(self) -> None:
        block: object = self.weight_block_size
        if block is not None:
            sizes = isinstance(block, list | tuple) and len(block) == 2
            positive = sizes and all(type(size) is int and size > 0 for size in self.weight_block_size or ())
            self._expect("weight_block_size", positive, "two positive integers, or None for one scale per weight")
            object.__setattr__(self, "weight_block_size", tuple(self.weight_block_size or ()))
        self._expect("activation_scheme", self.activation_scheme in ("dynamic", "static"), "'dynamic' or 'static'")
        self._expect("fmt", self.fmt == "e4m3", "'e4m3', the only format that this plugin knows scales for")
        self._expect("scale_fmt", self.scale_fmt in ("float", "ue8m0"), "'float' or 'ue8m0'")
        self._expect("expert_dtype", self.expert_dtype == "fp8", "'fp8'; experts in 4 bits can't be loaded")
        self._expect("dequantize", isinstance(self.dequantize, bool), "true or false")
        self._expect("quantize_activations", isinstance(self.quantize_activations, bool), "true or false")
        self._set_skipped()
        self._set_names("modules_to_convert")
        self._expect("modules_to_convert", not self.modules_to_convert, "none; quantized embeddings can't be loaded")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON object; ``null`` stands for a field's default."""
        return super().from_dict({name: value for name, value in data.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, as DeepSeek and transformers write it. ``weight_block_size`` is always in it: transformers
        would take its absence for blocks of 128."""
        defaults = {"scale_fmt": "float", "expert_dtype": "fp8", "dequantize": False}
        written = {name: value for name, value in self._written().items() if defaults.get(name, ...) != value}
        return written | {"weight_block_size": written.get("weight_block_size")}

    @property
    def scheme(self) -> Scheme:
        return Scheme(
            granularities=("tensor", "row") if self.weight_block_size is None else ("block",),
            block_size=self.weight_block_size,
            rule="power_of_two" if self.scale_fmt == "ue8m0" else "reciprocal",
            static="activation_scheme='static'" if self.activation_scheme == "static" else None,
        )

    @property
    def activations(self) -> Activations | None:
        return Activations(static=self.activation_scheme == "static") if self.quantize_activations else None


@dataclass(frozen=True, kw_only=True)
class FbgemmFp8Config(SkippingConfig):
    """One scale per row, as FBGEMM has them.

    Raises:
        ConfigError: a value doesn't fit; the message names the field.
    """

    quant_method: ClassVar[str] = "fbgemm_fp8"

    activation_scale_ub: float = 1200.0
    """The largest magnitude of activations that a kernel for 8-bit activations tells apart."""
    modules_to_not_convert: tuple[str, ...] | None = None
    """As in ``Fp8Config``."""
    quantize_activations: bool = runtime(False)
    """As in ``Fp8Config``; with magnitudes up to ``activation_scale_ub``."""

    def __post_init__(self) -> None:
        bound: object = self.activation_scale_ub
        number = isinstance(bound, int | float) and not isinstance(bound, bool) and bound > 0
        self._expect("activation_scale_ub", number, "a positive number")
        object.__setattr__(self, "activation_scale_ub", float(self.activation_scale_ub))
        self._expect("quantize_activations", isinstance(self.quantize_activations, bool), "true or false")
        self._set_skipped()

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, as transformers writes it."""
        return self._written()

    @property
    def scheme(self) -> Scheme:
        return Scheme(granularities=("row",), scale_name="weight_scale", rule="floored")

    @property
    def activations(self) -> Activations | None:
        return Activations(bound=self.activation_scale_ub, floor=FBGEMM_FLOOR) if self.quantize_activations else None


@dataclass(frozen=True, kw_only=True)
class Mxfp8Config(Fp8Config):
    """One power of two for 32 elements of a row: OCP Microscaling Formats, as checkpoints with ``mxfp8`` have them.

    Raises:
        ConfigError: a value doesn't fit; the message names the field.
    """

    quant_method: ClassVar[str] = "mxfp8"

    weight_block_size: tuple[int, int] | None = (1, 32)
    scale_fmt: str = "ue8m0"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect("weight_block_size", self.weight_block_size == (1, 32), "[1, 32]")
        self._expect("scale_fmt", self.scale_fmt == "ue8m0", "'ue8m0'")
        reason = "false; products of MXFP8 with MXFP8 aren't written"
        self._expect("quantize_activations", not self.quantize_activations, reason)
