"""Floats of few bits as quantizers of quantdock, one for each ``quant_method`` that checkpoints use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from quantdock import (
    Assembly,
    Capabilities,
    ConfigError,
    Layout,
    Parameter,
    QuantizationConfig,
    Quantizer,
    SkipList,
    Slices,
    StoredTensor,
    TensorSpec,
    UnsupportedError,
    hookimpl,
    linears,
    ops,
)
from quantdock_fp8 import codes, eight_bits
from quantdock_fp8.config import FbgemmFp8Config, FloatConfig, Fp8Config, Mxfp8Config
from quantdock_fp8.linear import Fp8Linear
from quantdock_fp8.modelopt_config import ModelOptConfig
from quantdock_fp8.pieces import assemble, disassemble, parts_of
from quantdock_fp8.scheme import STACKED_LEAVES, Scheme, component_of
from quantdock_fp8.tiling import Block
from quantdock_fp8.weight import Coding, Weight, Weights

_DEVICES = ("cpu", "cuda", "xpu")
_LINEAR = ("linear", "linear-transposed")
_QUANTIZES = Capabilities(quantize=True, load=True, dequantize=True, save=True, train=True)
LOADS = Capabilities(quantize=False, load=True, dequantize=True, save=True, train=True)

ConfigT = TypeVar("ConfigT", bound=FloatConfig)


class FloatQuantizer(Quantizer[ConfigT]):
    """Weights of linear layers and of experts in floats of few bits, with the scales that the config describes."""

    def __init__(self, config: ConfigT, *, prequantized: bool = False) -> None:
        super().__init__(config, prequantized=prequantized)
        self._scheme = config.scheme
        self._skipped = SkipList(config.skipped)
        self._cuts: dict[str, int | None] = {}

    def scheme_of(self, parameter: Parameter) -> Scheme:
        """How a parameter is stored."""
        return self._scheme

    # What the core asks -------------------------------------------------------------------------------------------

    def refusal(self, parameter: Parameter) -> str | None:
        if not parameter.spec.numel:
            return "it has no elements"
        if self._may_be_experts(parameter):
            if self._cut(parameter) is None:
                return "the checkpoint has it in pieces that aren't rows of equal numbers"
        elif parameter.leaf != "weight" or parameter.module_type is not nn.Linear:
            # Classes that inherit from it may use their weight in other ways, as nn.MultiheadAttention's does.
            kind = parameter.module_type.__name__
            return f"in {kind}: this method is for the weights of nn.Linear and of experts only"
        elif not parameter.module:
            return "the model is a linear layer itself: layers are swapped inside of a model"
        if not self.prequantized:  # what is stored quantized is loaded quantized, whatever the list says
            entry = self._skipped.match(parameter.module)
            if entry is not None:
                return f"modules_to_not_convert={entry!r}"
        return None

    def _may_be_experts(self, parameter: Parameter) -> bool:
        """Whether a parameter is what transformers quantizes beside linear layers (``replace_with_fp8_linear``); what
        is stored quantized is whatever the checkpoint says."""
        if len(parameter.spec.shape) != 3 or parameter.module_type.__module__.startswith("torch."):
            return False
        return self.prequantized or parameter.module.rpartition(".")[2] == "experts"

    def layout(self, parameter: Parameter) -> Layout:
        components = self._scheme.made(parameter, self._parts(parameter))
        shape, tiling = parameter.spec.shape, self._coding(parameter, components).tiling
        matrix = (shape[-2] // tiling.parts, shape[-1])
        working = codes.working_bytes(matrix, tiling.block, parameter.spec.dtype.itemsize)
        slices = Slices(multiple=tiling.block[0] if len(shape) == 2 else 1, working_bytes=working)
        # One scale for a whole weight is known only when all of it has been seen; of experts, each has its own.
        whole = len(shape) == 2 and self._scheme.granularities[0] == "tensor"
        return Layout(components=components, working_bytes=working, slices=None if whole else slices)

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        return Layout(components=self.scheme_of(parameter).stored(parameter, found, self._parts(parameter)))

    def stands_for(self, name: str, found: Mapping[str, TensorSpec]) -> TensorSpec | None:
        codes = found.get(self._scheme.codes_name)
        return None if codes is None else self._scheme.decoded(codes)

    def companions(self) -> Mapping[str, str]:
        return self.companions_of(self._scheme)

    def companions_of(self, scheme: Scheme) -> dict[str, str]:
        """Those of parameters that are stored as ``scheme`` says."""
        names = [name for name in scheme.names() if name != "weight"]
        return {component_of(name, leaf): leaf for leaf in ("weight", *STACKED_LEAVES) for name in names}

    def assemble(
        self, parameter: Parameter, pieces: Mapping[str, Mapping[str, StoredTensor]]
    ) -> Mapping[str, Assembly]:
        return assemble(parameter, self.assemblies[parameter.name], pieces, self.scheme_of(parameter))

    def stored_in_pieces(self, parameter: Parameter) -> bool:
        return len(parameter.spec.shape) == 3

    def disassemble(self, parameter: Parameter, exported: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        components, scheme = self.layout_of(parameter).components, self.scheme_of(parameter)
        called = {component_of(name, parameter.leaf): name for name in scheme.names()}
        each = parameter.spec.shape[0] * max(1, self._parts(parameter))
        one = [component_of(name, parameter.leaf) for name in (*scheme.extra_names, *scheme.factor_names)]
        if "tensor" in scheme.granularities:
            one += [name for name, spec in components.items() if spec.numel == each]
        coding = self._coding(parameter, components)
        return disassemble(parameter, exported, codes=coding.codes, companions=called, tiling=coding.tiling, single=one)

    def saved_config(self, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        """The config, with the linear layers and experts that were left alone listed: transformers would look for
        quantized tensors in all that aren't."""
        config = self.config.to_dict()
        if not self.prequantized:
            left = {
                parameter.module
                for name, parameter in parameters.items()
                if (parameter.role in _LINEAR or self._may_be_experts(parameter)) and name not in self.parameters
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
        if self.config.activations is None:
            return
        for parameter in self.parameters.values():
            if len(parameter.spec.shape) == 2:
                tiling = self._coding(parameter, self.layout_of(parameter).components).tiling
                spec, static = parameter.spec, self.config.activations.static
                eight_bits.way(device, spec.dtype, spec.shape, tiling.block, static)

    def preferred_device(self) -> torch.device | None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None

    # What the core calls ------------------------------------------------------------------------------------------

    @hookimpl
    def preprocess_model(self, model: nn.Module) -> None:
        swapped: dict[nn.Module, nn.Module] = {}
        for parameter in self.parameters.values():
            old = parameter.owner(model)
            components = self.layout_of(parameter).components
            coding = self._coding(parameter, components)
            if len(parameter.spec.shape) == 3:
                leaf, dtype = parameter.leaf, parameter.spec.dtype
                linears.hold(old, leaf, components, coding, dtype, swapped=coding.swapped)
            else:
                assert isinstance(old, nn.Linear)
                swapped[old] = Fp8Linear(old, components, coding, self.config.activations)
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
        name = component_of(self._scheme.scale_name, parameter.leaf)
        scale, stop = parts[name], start + len(tensor)
        tiling = self._coding(parameter, {name: TensorSpec.of(scale)}).tiling
        if tensor.dim() == 2:
            mine = scale[start // tiling.block[0] : -(-stop // tiling.block[0])] if scale.dim() else scale
            self._encode(tensor, tiling.block, parts[parameter.leaf][start:stop], mine)
            return
        grid = tiling.grid((tensor.shape[1], tensor.shape[2]))
        for matrix, into, own in zip(tensor, parts[parameter.leaf][start:stop], scale[start:stop], strict=True):
            for rows, down in tiling.ranges(len(matrix)):
                self._encode(matrix[rows], tiling.block, into[rows], own.view(grid)[down])

    def _encode(self, matrix: Tensor, block: Block, into: Tensor, scale: Tensor) -> None:
        """Write the codes of a matrix, and its scales."""
        found = ops.fp8_scales(ops.block_magnitudes(matrix, block=block), rule=self._scheme.rule)
        scale.copy_(found.stored.reshape(scale.shape))
        codes.encode(matrix, found, block, into)

    def dequantize(self, components: Mapping[str, Tensor], parameter: Parameter) -> Tensor:
        coding = self._coding(parameter, {name: TensorSpec.of(tensor) for name, tensor in components.items()})
        spec, device = parameter.spec, components[coding.codes].device
        stored: Weight | Weights
        stored = coding.matrices(components) if len(spec.shape) == 3 else Weight.of(components, coding)
        out = torch.empty(spec.shape, dtype=spec.dtype, device=device)
        stored.decode_into(out.mT if coding.swapped else out)
        return out

    def restore_module(self, module: nn.Module, parameter: Parameter) -> nn.Module:
        if len(parameter.spec.shape) == 2:
            return super().restore_module(module, parameter)
        linears.let_go(module, parameter.leaf)
        return module

    def _parts(self, parameter: Parameter) -> int:
        return self._cut(parameter) or 0

    def _cut(self, parameter: Parameter) -> int | None:
        """See ``parts_of``, which looks at every piece."""
        if parameter.name not in self.assemblies:
            return 0
        if parameter.name not in self._cuts:
            self._cuts[parameter.name] = parts_of(self.assemblies[parameter.name], parameter.spec.shape)
        return self._cuts[parameter.name]

    def _coding(self, parameter: Parameter, components: Mapping[str, TensorSpec]) -> Coding:
        return self.scheme_of(parameter).coding(parameter, components, self._parts(parameter))


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
    capabilities: ClassVar[Capabilities] = LOADS


class ModelOptQuantizer(FloatQuantizer[ModelOptConfig]):
    """Loads checkpoints of NVIDIA's Model Optimizer."""

    config_class: ClassVar[type[QuantizationConfig]] = ModelOptConfig
    capabilities: ClassVar[Capabilities] = LOADS
