"""Experts in 4-bit floats with powers of two for 32 elements, as gpt-oss has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from quantdock import Parameter, QuantizationConfig
from quantdock_fp8.config import SkippingConfig
from quantdock_fp8.quantizer import LOADS, FloatQuantizer
from quantdock_fp8.scheme import STACKED_LEAVES, Scheme, component_of

_SCHEME = Scheme(
    bits=4,
    codes_name="weight_blocks",
    in_blocks=True,
    swapped=True,
    granularities=("block",),
    block_size=(1, 32),
    scale_name="weight_scales",
    scale_names=("weight_scales",),
    scale_dtypes=(torch.uint8,),
    extra_names=(),
)


@dataclass(frozen=True, kw_only=True)
class Mxfp4Config(SkippingConfig):
    """OCP Microscaling Formats' MXFP4, in the layout of gpt-oss.

    Raises:
        ConfigError: a value doesn't fit; the message names the field.
    """

    quant_method: ClassVar[str] = "mxfp4"

    modules_to_not_convert: tuple[str, ...] | None = None
    """As in ``Fp8Config``."""
    dequantize: bool = False
    """What transformers does when it loads the checkpoint; carried along. Here, call ``quantdock.dequantize``."""

    def __post_init__(self) -> None:
        self._expect("dequantize", isinstance(self.dequantize, bool), "true or false")
        self._set_skipped()

    @property
    def scheme(self) -> Scheme:
        return _SCHEME

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, as transformers writes it."""
        return {name: value for name, value in self._written().items() if value is not False}


class Mxfp4Quantizer(FloatQuantizer[Mxfp4Config]):
    """Loads experts that are stored as ``gate_up_proj_blocks``, ``gate_up_proj_scales``, and so on.

    Of ``[experts, columns, rows]``, which the architecture has, the transposes are stored:
    ``[experts, rows, columns / 32, 16]``, bytes with two codes each.
    """

    config_class: ClassVar[type[QuantizationConfig]] = Mxfp4Config
    capabilities = LOADS

    def refusal(self, parameter: Parameter) -> str | None:
        if len(parameter.spec.shape) != 3:
            return "MXFP4 is for the weights of all experts of a layer in one parameter only"
        if parameter.name in self.assemblies:
            return "the checkpoint has it in pieces, where MXFP4 has all experts of a layer in one tensor"
        return super().refusal(parameter)

    def companions(self) -> Mapping[str, str]:
        names = (_SCHEME.codes_name, *_SCHEME.scale_names)
        return {component_of(name, leaf): leaf for leaf in STACKED_LEAVES for name in names}

    def stored_in_pieces(self, parameter: Parameter) -> bool:
        return False
