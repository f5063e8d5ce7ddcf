"""bitsandbytes as a quantizer of quantdock: which parameters it takes, and where they live in a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from quantdock import (
    Capabilities,
    Layout,
    Parameter,
    QuantizationConfig,
    Quantizer,
    SkipList,
    TensorSpec,
    UnsupportedError,
    hookimpl,
)
from quantdock_bnb.config import BitsAndBytesConfig
from quantdock_bnb.formats import Format
from quantdock_bnb.fourbit_format import FourBit
from quantdock_bnb.int8_format import EightBit

_LINEAR = ("linear", "linear-transposed")


class BitsAndBytesQuantizer(Quantizer[BitsAndBytesConfig]):
    """Weights of linear layers in 4 bits (nf4, fp4) or 8 bits (LLM.int8)."""

    config_class: ClassVar[type[QuantizationConfig]] = BitsAndBytesConfig
    capabilities: ClassVar[Capabilities] = Capabilities(
        quantize=True, load=True, dequantize=True, save=True, train=True, compile=False
    )

    def __init__(self, config: BitsAndBytesConfig, *, prequantized: bool = False) -> None:
        super().__init__(config, prequantized=prequantized)
        if prequantized and config.load_in_8bit and config.llm_int8_has_fp16_weight:
            raise UnsupportedError(
                "the checkpoint was saved with llm_int8_has_fp16_weight=true, so nothing in it is quantized; take "
                "quantization_config out of its config.json, and pass quantize= to quantize it while loading"
            )
        self._format: Format = FourBit(config) if config.load_in_4bit else EightBit(config)
        # One for all layers of a shape: of a parameter's name, only the leaf is in its layout.
        self._layouts: dict[tuple[object, ...], Layout] = {}
        self._skipped = SkipList(config.llm_int8_skip_modules or ())

    # What the core asks -------------------------------------------------------------------------------------------

    def refusal(self, parameter: Parameter) -> str | None:
        rank = len(parameter.spec.shape)
        if parameter.role == "embedding":
            return "embedding: bitsandbytes quantizes the weights of linear layers only"
        if parameter.role not in _LINEAR or rank != 2:
            what = f"{rank}-D parameter" if rank != 2 else f"in {parameter.module_type.__name__}"
            return f"{what}: bitsandbytes quantizes the weights of linear layers only"
        if not parameter.module:
            return "the model is a linear layer itself: bitsandbytes swaps layers inside of a model"
        if not parameter.spec.numel:
            return "it has no elements"
        if not self.prequantized:  # what is stored quantized is loaded quantized, whatever the list says
            found = self._skipped.match(parameter.module)
            if found is not None:
                return f"llm_int8_skip_modules={found!r}"
        return None

    def layout(self, parameter: Parameter) -> Layout:
        kind = (parameter.leaf, parameter.spec, parameter.role)
        if kind not in self._layouts:
            self._layouts[kind] = self._format.layout(parameter)
        return self._layouts[kind]

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        kind = (parameter.leaf, parameter.spec, parameter.role, *found.items())
        if kind not in self._layouts:
            self._layouts[kind] = self._format.stored_layout(parameter, found)
        return self._layouts[kind]

    def companions(self) -> Mapping[str, str]:
        return dict.fromkeys(self._format.companions(), "weight")

    def saved_config(self, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        """The config, with the linear layers that were left alone listed: transformers would look for quantized
        tensors in all that aren't."""
        if self.prequantized:
            return self.config.to_dict()
        left = {
            parameter.module
            for name, parameter in parameters.items()
            if parameter.role in _LINEAR and name not in self.parameters
        }
        listed = self._skipped.extended(left, [parameter.module for parameter in self.parameters.values()])
        skip = tuple(listed) if listed else None
        return dataclasses.replace(self.config, llm_int8_skip_modules=skip).to_dict()

    def check_device(self, device: torch.device) -> None:
        supported = bnb.supported_torch_devices
        if device.type not in supported:
            raise UnsupportedError(
                f"bitsandbytes {bnb.__version__} doesn't run on {device.type!r}; pass a device_map= of "
                f"{', '.join(sorted(supported))}"
            )
        if device.type == "cuda" and not bnb.cextension.lib.compiled_with_cuda:
            raise UnsupportedError(
                f"bitsandbytes {bnb.__version__} has no library for the CUDA or ROCm version of torch "
                f"{torch.__version__}; `python -m bitsandbytes` says what it looked for. Install a matching build, or "
                "pass device_map='cpu'"
            )

    def preferred_device(self) -> torch.device | None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None

    # What the core calls ------------------------------------------------------------------------------------------

    @hookimpl
    def preprocess_model(self, model: nn.Module) -> None:
        swapped: dict[nn.Module, nn.Module] = {}
        for parameter in self.parameters.values():
            old = parameter.owner(model)
            if old not in swapped:
                swapped[old] = self._swap(old, parameter)
        for parent in [*model.modules()]:  # also those that hold a layer under a second name
            for name, child in parent._modules.items():
                if child in swapped:
                    parent._modules[name] = swapped[child]

    def _swap(self, old: nn.Module, parameter: Parameter) -> nn.Module:
        weight = old._parameters[parameter.leaf]
        assert weight is not None, "it is one of the model's parameters"
        out_features, in_features = _oriented(parameter, weight).shape
        bias = old._parameters["bias"]
        new = self._format.new_module(out_features, in_features, bias=bias is not None)
        if bias is not None:
            new.bias = bias
            old.bias = nn.Parameter(torch.empty_like(bias), requires_grad=bias.requires_grad)
        new.source_cls = type(old)  # type: ignore[assignment]  # transformers' name for it
        new.__dict__["_original"] = old  # on the meta device for good; past nn.Module, which would list it as a child
        _freeze(new)
        new.training = old.training
        return new

    @hookimpl
    def quantize_param(self, parameter: Parameter, tensor: Tensor) -> Mapping[str, Tensor] | None:
        if parameter.name not in self.parameters:
            return None
        return self._format.quantize(parameter, _oriented(parameter, tensor))

    def begin_slices(self, parameter: Parameter, device: torch.device) -> dict[str, Tensor]:
        return self._format.begin_slices(parameter, device)

    def quantize_slice(self, parameter: Parameter, tensor: Tensor, start: int, parts: Mapping[str, Tensor]) -> None:
        self._format.quantize_slice(parameter, _oriented(parameter, tensor), start, parts)

    def finish_slices(self, parameter: Parameter, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self._format.finish_slices(parameter, parts)

    def install(self, model: nn.Module, parameter: Parameter, components: Mapping[str, Tensor]) -> None:
        self._format.install(parameter.owner(model), parameter, components)

    def components(self, model: nn.Module, parameter: Parameter) -> Mapping[str, Tensor]:
        return self._format.components(parameter.owner(model), parameter)

    @hookimpl
    def postprocess_model(self, model: nn.Module) -> None:
        if not self.parameters:
            return
        for parameter in self.parameters.values():
            _freeze(parameter.owner(model))
        # transformers' and PEFT's names for it
        setattr(model, "is_loaded_in_4bit" if self.config.load_in_4bit else "is_loaded_in_8bit", True)

    def dequantize(self, components: Mapping[str, Tensor], parameter: Parameter) -> Tensor:
        matrix = self._format.dequantize(parameter, components).to(parameter.spec.dtype)
        return _oriented(parameter, matrix).contiguous()

    def restore_module(self, module: nn.Module, parameter: Parameter) -> nn.Module:
        original: nn.Module = module.__dict__["_original"]
        return original


def _freeze(module: nn.Module) -> None:
    """Require no gradient for what the layer itself holds, its bias too, as transformers has it."""
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.requires_grad_(False)


def _oriented(parameter: Parameter, tensor: Tensor) -> Tensor:
    """``[in, out]`` to ``[out, in]`` and back; bitsandbytes stores the latter."""
    return tensor.t() if parameter.role == "linear-transposed" else tensor
