"""AWQ as a quantizer of quantdock: which parameters it takes, and what is stored of each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantdock import (
    Assembly,
    Calibration,
    CalibrationBlock,
    Capabilities,
    ConfigError,
    Layout,
    Parameter,
    QuantizationConfig,
    Quantizer,
    SkipList,
    StoredTensor,
    TensorSpec,
    UnsupportedError,
    hookimpl,
    linears,
)
from quantdock_awq import calibrating, forms, rounding
from quantdock_awq.config import VERSIONS, AwqConfig
from quantdock_awq.modules import AwqLinear, weight_of
from quantdock_awq.packing import BITS, GEMM, Packing

_NAME = "quantdock-awq"
_LINEAR = ("linear", "linear-transposed")


class AwqQuantizer(Quantizer[AwqConfig]):
    """Weights of linear layers, and of experts that are stored as such, as codes of 4 bits, with a scale and a zero
    point for each group."""

    config_class: ClassVar[type[QuantizationConfig]] = AwqConfig
    capabilities: ClassVar[Capabilities] = Capabilities(
        quantize=True, load=True, dequantize=True, save=True, train=True, compile=False
    )

    def __init__(self, config: AwqConfig, *, prequantized: bool = False) -> None:
        super().__init__(config, prequantized=prequantized)
        if config.bits != BITS:
            raise UnsupportedError(f"AWQ in {config.bits} bits can't be read or made; expected 4")
        if config.version not in VERSIONS:
            raise UnsupportedError(
                f"the AWQ version {config.version!r} is unknown; quantdock-awq reads {', '.join(VERSIONS)}, and what "
                "kernels make of gemm's tensors (exllama, marlin, ipex)"
            )
        if not prequantized:
            _expect_quantizing(config)
        self._skipped = SkipList(config.modules_to_not_convert or ())
        self._known: dict[str, linears.Experts | None] = {}

    # What the core asks -------------------------------------------------------------------------------------------

    def refusal(self, parameter: Parameter) -> str | None:
        rank, experts = len(parameter.spec.shape), self._experts(parameter)
        if experts is not None and not self.prequantized:
            return "experts in one parameter: calibration looks at the inputs of linear layers only"
        if experts is None and (parameter.role not in _LINEAR or rank != 2):
            what = f"{rank}-D parameter" if rank != 2 else f"in {parameter.module_type.__name__}"
            return f"{what}: AWQ is for the weights of linear layers, and of experts that are stored one by one"
        if not parameter.module:
            return "the model is a linear layer itself: AWQ swaps layers inside of a model"
        if not parameter.spec.numel:
            return "it has no elements"
        if not self.prequantized:  # what is stored quantized is loaded quantized, whatever the list says
            entry = self._skipped.match(parameter.module)
            if entry is not None:
                return f"modules_to_not_convert={entry!r}"
        return None

    def layout(self, parameter: Parameter) -> Layout:
        components = self._form(parameter, GEMM).components(rounding.SCALE_DTYPE)
        return Layout(components=components, working_bytes=rounding.working_bytes(*_oriented(parameter)))

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        experts, stored = self._experts(parameter), self.stored_as.get(parameter.name, parameter.name)
        if experts is None:
            return Layout(components=self._checked(parameter, stored.rpartition(".")[0], found))
        one = self._checked(parameter, parameter.name, experts.unstacked(parameter.leaf, found))
        return Layout(components=experts.stacked(parameter.leaf, one))

    def stands_for(self, name: str, found: Mapping[str, TensorSpec]) -> TensorSpec | None:
        return forms.stands_for(self.config.version, found)

    def assemble(
        self, parameter: Parameter, pieces: Mapping[str, Mapping[str, StoredTensor]]
    ) -> Mapping[str, Assembly]:
        experts = self._experts(parameter)
        if experts is None:
            return super().assemble(parameter, pieces)

        def check(name: str, specs: Mapping[str, TensorSpec]) -> None:
            self._checked(parameter, name.rpartition(".")[0], specs)

        return experts.assemble(parameter.leaf, pieces, check)

    def stored_in_pieces(self, parameter: Parameter) -> bool:
        return self._experts(parameter) is not None

    def disassemble(self, parameter: Parameter, exported: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        return linears.disassemble(parameter, exported)

    def companions(self) -> Mapping[str, str]:
        return dict.fromkeys(forms.NAMES, "weight")

    def saved_config(self, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        """The config, with the linear layers and experts that were left alone in ``modules_to_not_convert``: readers
        would look for quantized tensors in all that aren't."""
        if self.prequantized:
            return self.config.to_dict()
        left = {
            parameter.module
            for name, parameter in parameters.items()
            if (parameter.role in _LINEAR or self._experts(parameter) is not None) and name not in self.parameters
        }
        taken = [parameter.module for parameter in self.parameters.values()]
        return dataclasses.replace(
            self.config,
            modules_to_not_convert=self._skipped.extended(left, taken) or None,
            meta=self.config.meta or {"quantizer": [f"{_NAME}:{version(_NAME)}"]},
        ).to_dict()

    # Calibration --------------------------------------------------------------------------------------------------

    def calibration(self) -> Calibration | None:
        if self.prequantized:
            return None
        return Calibration(
            dataset=self.config.dataset,
            tokenizer=self.config.tokenizer,
            batch_size=self.config.batch_size,
            max_length=self.config.max_length,
        )

    def calibrate(self, block: CalibrationBlock) -> Iterator[tuple[Parameter, Mapping[str, Tensor]]]:
        return calibrating.calibrate(block, self._size, zero_point=self.config.zero_point, components=self._made)

    def calibration_bytes(self, parameters: Sequence[Parameter], rows: int) -> int:
        return calibrating.working_bytes([_oriented(parameter) for parameter in parameters], rows)

    def _made(self, parameter: Parameter, rounded: rounding.Rounded) -> Mapping[str, Tensor]:
        """The components of a weight that calibration has rounded."""
        if not torch.isfinite(rounded.scales).all():
            raise self._unscalable(parameter)
        return rounding.packed(rounded)

    # What the core calls ------------------------------------------------------------------------------------------

    @hookimpl
    def preprocess_model(self, model: nn.Module) -> None:
        for parameter in self.parameters.values():
            old = parameter.owner(model)
            components = self.layout_of(parameter).components
            experts = self._experts(parameter)
            if experts is not None:
                reading = self._reading(parameter, experts, components)
                linears.hold(old, parameter.leaf, components, reading, parameter.spec.dtype)
                continue
            bias = old._parameters["bias"]
            new = AwqLinear(
                _oriented(parameter),
                components,
                packing=forms.packing_of(self.config.version, components),
                group_size=self._size(parameter),
                bias=bias,
                compute_dtype=self.config.compute_dtype,
            )
            if bias is not None:
                old.bias = nn.Parameter(torch.empty_like(bias))
            new.__dict__["_original"] = old  # on the meta device for good; past nn.Module, which would list it
            model.set_submodule(parameter.module, new.train(old.training))

    @hookimpl
    def quantize_param(self, parameter: Parameter, tensor: Tensor) -> Mapping[str, Tensor] | None:
        """To the nearest codes. Loads call ``calibrate`` instead; this is for who has a tensor and no block."""
        if parameter.name not in self.parameters:
            return None
        rows = tensor if parameter.role == "linear" else tensor.t()
        size, zero_point = self._size(parameter), self.config.zero_point
        return self._made(parameter, rounding.round_to_nearest(rows.float(), size, zero_point=zero_point))

    def install(self, model: nn.Module, parameter: Parameter, components: Mapping[str, Tensor]) -> None:
        experts = self._experts(parameter)
        if experts is None:
            self._expect_undamaged(parameter, components)
        else:
            stacks = {name.removeprefix(f"{parameter.leaf}_"): tensor for name, tensor in components.items()}
            for expert in range(len(experts.names)):
                for part in range(experts.parts):
                    self._expect_undamaged(parameter, {name: stack[expert, part] for name, stack in stacks.items()})
        super().install(model, parameter, components)

    def _expect_undamaged(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> None:
        groups = self._shape(parameter)[1] // self._size(parameter)
        damage = forms.packing_of(self.config.version, _specs(tensors)).damage(tensors, groups)
        if damage is not None:
            raise UnsupportedError(f"{parameter.name}: {damage}; the file is damaged")

    def dequantize(self, components: Mapping[str, Tensor], parameter: Parameter) -> Tensor:
        experts = self._experts(parameter)
        if experts is not None:
            matrices = self._reading(parameter, experts, _specs(components)).matrices(components)
            return linears.dequantize_all(matrices, parameter.spec.dtype)
        packing = forms.packing_of(self.config.version, _specs(components))
        weight = weight_of(components, _oriented(parameter), packing=packing, group_size=self._size(parameter))
        result = linears.dequantize(weight, parameter.spec.dtype)
        return result if parameter.role == "linear" else result.t().contiguous()

    def restore_module(self, module: nn.Module, parameter: Parameter) -> nn.Module:
        if self._experts(parameter) is not None:
            linears.let_go(module, parameter.leaf)
            return module
        original: nn.Module = module.__dict__["_original"]
        return original

    # Which form ---------------------------------------------------------------------------------------------------

    def _experts(self, parameter: Parameter) -> linears.Experts | None:
        """Which linear layers a parameter is stored as, if those are experts."""
        if len(parameter.spec.shape) != 3:
            return None
        if parameter.name not in self._known:
            self._known[parameter.name] = linears.Experts.of(parameter, self.assemblies.get(parameter.name))
        return self._known[parameter.name]

    def _reading(
        self, parameter: Parameter, experts: linears.Experts, components: Mapping[str, TensorSpec]
    ) -> linears.JointReading:
        packing = forms.packing_of(self.config.version, experts.unstacked(parameter.leaf, components))
        read = functools.partial(weight_of, packing=packing, group_size=self._size(parameter))
        return linears.JointReading.of(parameter.leaf, experts, read, self.config.compute_dtype)

    def _form(self, parameter: Parameter, packing: Packing) -> forms.Form:
        return forms.Form(
            name=parameter.name, shape=self._shape(parameter), size=self._size(parameter), packing=packing
        )

    def _checked(self, parameter: Parameter, stored: str, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        form = self._form(parameter, forms.packing_of(self.config.version, found))
        return form.checked(stored, found, self.config.group_size)

    def _shape(self, parameter: Parameter) -> tuple[int, int]:
        """Outputs and inputs of each linear layer that a parameter is stored as."""
        experts = self._experts(parameter)
        return _oriented(parameter) if experts is None else experts.shape

    def _size(self, parameter: Parameter) -> int:
        """Inputs per group."""
        return self._shape(parameter)[1] if self.config.group_size == -1 else self.config.group_size

    @staticmethod
    def _unscalable(parameter: Parameter) -> UnsupportedError:
        return UnsupportedError(
            f"{parameter.name} has weights that are infinite, not numbers, or too large for a scale in "
            f"{rounding.SCALE_DTYPE}; leave it out, or repair the checkpoint"
        )


def _expect_quantizing(config: AwqConfig) -> None:
    """
    Raises:
        ConfigError: a model can't be quantized so.
    """
    if config.dataset is None:
        raise ConfigError(
            "AWQ needs calibration data to quantize, and AwqConfig.dataset is none: pass texts, "
            "AwqConfig(dataset=[...]). Without data, quantize='gptq-int4' or 'bnb-nf4' give 4 bits"
        )
    if config.version != "gemm":
        raise ConfigError(
            f"AwqConfig.version is {config.version!r}, expected 'gemm' to quantize: every reader knows it, and the "
            "others are for kernels of their own"
        )


def _specs(components: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in components.items()}


def _oriented(parameter: Parameter) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    first, second = parameter.spec.shape
    return (first, second) if parameter.role == "linear" else (second, first)
