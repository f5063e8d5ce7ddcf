"""8-bit floats as quantizers of quantdock, one for each ``quant_method`` that checkpoints use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from quantdock import (
    Capabilities,
    ConfigError,
    Layout,
    Parameter,
    QuantizationConfig,
    Quantizer,
    SkipList,
    Slices,
    TensorSpec,
    UnsupportedError,
    hookimpl,
    ops,
)
from quantdock_fp8 import codes
from quantdock_fp8.config import FbgemmFp8Config, FloatConfig, Fp8Config, ModelOptConfig, Mxfp8Config
from quantdock_fp8.linear import Fp8Linear
from quantdock_fp8.scheme import EXTRA_NAMES, SCALE_NAMES, Block, as_grid, scale_of

_DEVICES = ("cpu", "cuda", "xpu")
_LINEAR = ("linear", "linear-transposed")
_QUANTIZES = Capabilities(quantize=True, load=True, dequantize=True, save=True, train=True)
_LOADS = Capabilities(quantize=False, load=True, dequantize=True, save=True, train=True)

ConfigT = TypeVar("ConfigT", bound=FloatConfig)


class FloatQuantizer(Quantizer[ConfigT]):
    """Weights of linear layers in float8_e4m3fn, with the scales that the config describes."""

    def __init__(self, config: ConfigT, *, prequantized: bool = False) -> None:
        super().__init__(config, prequantized=prequantized)
        self._scheme = config.scheme
        self._skipped = SkipList(config.skipped)

    # What the core asks -------------------------------------------------------------------------------------------

    def refusal(self, parameter: Parameter) -> str | None:
        if parameter.leaf != "weight" or parameter.module_type is not nn.Linear:
            # Classes that inherit from it may use their weight in other ways, as nn.MultiheadAttention's does.
            return f"in {parameter.module_type.__name__}: 8-bit floats are for the weights of nn.Linear only"
        if not parameter.module:
            return "the model is a linear layer itself: layers are swapped inside of a model"
        if not parameter.spec.numel:
            return "it has no elements"
        if not self.prequantized:  # what is stored quantized is loaded quantized, whatever the list says
            entry = self._skipped.match(parameter.module)
            if entry is not None:
                return f"modules_to_not_convert={entry!r}"
        return None

    def layout(self, parameter: Parameter) -> Layout:
        components = self._scheme.made(parameter)
        shape, block = parameter.spec.shape, self._block(parameter, components)
        working = codes.working_bytes(shape, block, parameter.spec.dtype.itemsize)
        # One scale for a whole weight is known only when all of it has been seen.
        whole = self._scheme.granularities[0] == "tensor"
        slices = None if whole else Slices(multiple=block[0], working_bytes=working)
        return Layout(components=components, working_bytes=working, slices=slices)

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        return Layout(components=self._scheme.stored(parameter, found))

    def companions(self) -> Mapping[str, str]:
        return dict.fromkeys((*SCALE_NAMES, *EXTRA_NAMES), "weight")

    def saved_config(self, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        """The config, with the linear layers that were left alone listed: transformers would look for quantized
        tensors in all that aren't."""
        config = self.config.to_dict()
        if not self.prequantized:
            left = {
                parameter.module
                for name, parameter in parameters.items()
                if parameter.role in _LINEAR and name not in self.parameters
            }
            taken = [parameter.module for parameter in self.parameters.values()]
            config["modules_to_not_convert"] = self._skipped.extended(left, taken)
        return config

    def check_device(self, device: torch.device) -> None:
        if device.type not in _DEVICES:
            raise UnsupportedError(
                f"{self.config.quant_method} doesn't run on {device.type!r}, where torch has no 8-bit floats; pass a "
                f"device_map= of {', '.join(_DEVICES)}"
            )

    def preferred_device(self) -> torch.device | None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None

    # What the core calls ------------------------------------------------------------------------------------------

    @hookimpl
    def preprocess_model(self, model: nn.Module) -> None:
        swapped: dict[nn.Module, nn.Module] = {}
        for parameter in self.parameters.values():
            old = model.get_submodule(parameter.module)
            assert isinstance(old, nn.Linear)
            components = self.layout_of(parameter).components
            swapped[old] = Fp8Linear(old, components, self._block(parameter, components))
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child in swapped:
                    parent._modules[name] = swapped[child]

    @hookimpl
    def quantize_param(self, parameter: Parameter, tensor: Tensor) -> Mapping[str, Tensor] | None:
        if parameter.name not in self.parameters:
            return None
        parts = self.begin_slices(parameter, tensor.device)
        self.quantize_slice(parameter, tensor, 0, parts)
        return parts

    def quantize_slice(self, parameter: Parameter, tensor: Tensor, start: int, parts: Mapping[str, Tensor]) -> None:
        scale = parts[self._scheme.scale_name]
        block = self._block(parameter, {self._scheme.scale_name: TensorSpec.of(scale)})
        found = ops.fp8_scales(codes.largest(tensor, block), rule=self._scheme.rule)
        stop = start + len(tensor)
        mine = scale[start // block[0] : -(-stop // block[0])] if scale.dim() else scale
        mine.copy_(found.stored.reshape(mine.shape))
        codes.encode(tensor, found, block, parts[parameter.leaf][start:stop])

    def dequantize(self, components: Mapping[str, Tensor], parameter: Parameter) -> Tensor:
        scale = components[scale_of(components)]
        block = self._block(parameter, {name: TensorSpec.of(tensor) for name, tensor in components.items()})
        scales = as_grid(scale, parameter.spec.shape, block)
        return codes.decode(components[parameter.leaf], scales, block, parameter.spec.dtype)

    def _block(self, parameter: Parameter, components: Mapping[str, TensorSpec]) -> Block:
        """Rows and columns that share a scale, which the scale's shape tells."""
        return self._scheme.stored_blocks(parameter.spec.shape)[components[scale_of(components)].shape]


class Fp8Quantizer(FloatQuantizer[Fp8Config]):
    """One scale per weight or per block; quantizes as transformers does (``integrations.finegrained_fp8``)."""

    config_class: ClassVar[type[QuantizationConfig]] = Fp8Config
    capabilities: ClassVar[Capabilities] = _QUANTIZES

    def __init__(self, config: Fp8Config, *, prequantized: bool = False) -> None:
        super().__init__(config, prequantized=prequantized)
        if prequantized:
            return
        if config.activation_scheme != "dynamic":
            raise ConfigError(
                "Fp8Config.activation_scheme is 'static', but scales of activations aren't measured while loading; "
                "pass 'dynamic'"
            )
        if config.dequantize:
            raise ConfigError("Fp8Config.dequantize is True, but the checkpoint isn't quantized; drop quantize=")


class FbgemmFp8Quantizer(FloatQuantizer[FbgemmFp8Config]):
    """One scale per row; quantizes as FBGEMM's ``quantize_fp8_row`` does."""

    config_class: ClassVar[type[QuantizationConfig]] = FbgemmFp8Config
    capabilities: ClassVar[Capabilities] = _QUANTIZES


class Mxfp8Quantizer(FloatQuantizer[Mxfp8Config]):
    """Loads checkpoints with one power of two for 32 elements of a row."""

    config_class: ClassVar[type[QuantizationConfig]] = Mxfp8Config
    capabilities: ClassVar[Capabilities] = _LOADS


class ModelOptQuantizer(FloatQuantizer[ModelOptConfig]):
    """Loads checkpoints of NVIDIA's Model Optimizer."""

    config_class: ClassVar[type[QuantizationConfig]] = ModelOptConfig
    capabilities: ClassVar[Capabilities] = _LOADS
