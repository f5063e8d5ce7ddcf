"""AWQ as a quantizer of quantdock: which parameters it takes, and what is stored of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantdock import (
    Calibration,
    CalibrationBlock,
    Capabilities,
    ConfigError,
    Layout,
    Parameter,
    QuantizationConfig,
    Quantizer,
    SkipList,
    TensorSpec,
    UnsupportedError,
    hookimpl,
    linears,
)
from quantdock_awq import calibrating, rounding
from quantdock_awq.config import VERSIONS, AwqConfig
from quantdock_awq.modules import AwqLinear, weight_of
from quantdock_awq.packing import BITS, GEMM, GEMV, GEMV_FAST, Packing

_NAME = "quantdock-awq"
_LINEAR = ("linear", "linear-transposed")
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PACKINGS: Mapping[str, Packing] = {"gemm": GEMM, "gemv": GEMV, "gemv_fast": GEMV_FAST, "llm-awq": GEMV_FAST}


class AwqQuantizer(Quantizer[AwqConfig]):
    """Weights of linear layers as codes of 4 bits, with a scale and a zero point for each group."""

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

    # What the core asks -------------------------------------------------------------------------------------------

    def refusal(self, parameter: Parameter) -> str | None:
        rank = len(parameter.spec.shape)
        if parameter.role not in _LINEAR or rank != 2:
            what = f"{rank}-D parameter" if rank != 2 else f"in {parameter.module_type.__name__}"
            return f"{what}: AWQ quantizes the weights of linear layers only"
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
        outputs, inputs = _oriented(parameter)
        components = self._components(parameter, GEMM, rounding.SCALE_DTYPE)
        return Layout(components=components, working_bytes=rounding.working_bytes(outputs, inputs))

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        scales = found.get("scales")
        dtype = scales.dtype if scales is not None and scales.dtype in _SCALE_DTYPES else rounding.SCALE_DTYPE
        packing = self._packing(found)
        expected = self._components(parameter, packing, dtype, found)
        problems = [
            f"component {name!r} is missing, expected {expected[name]}" for name in expected.keys() - found.keys()
        ]
        problems += [f"component {name!r} is not part of the format" for name in found.keys() - expected.keys()]
        problems += [
            f"component {name!r} is {found[name]}, expected {spec}"
            for name, spec in expected.items()
            if name in found and found[name] != spec
        ]
        if problems:
            stored = self.stored_as.get(parameter.name, parameter.name).rpartition(".")[0]
            raise UnsupportedError(
                f"{stored}: {'; '.join(sorted(problems))}, for version={packing.label!r} and group_size="
                f"{self.config.group_size}. {self._advice(parameter, packing, found)}"
            )
        return Layout(components=expected)

    def companions(self) -> Mapping[str, str]:
        return dict.fromkeys(("qweight", "qzeros", "scaled_zeros", "scales"), "weight")

    def saved_config(self, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        """The config, with the linear layers that were left alone in ``modules_to_not_convert``: readers would look for
        quantized tensors in all that aren't."""
        if self.prequantized:
            return self.config.to_dict()
        left = {
            parameter.module
            for name, parameter in parameters.items()
            if parameter.role in _LINEAR and name not in self.parameters
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
            bias = old._parameters["bias"]
            new = AwqLinear(
                _oriented(parameter),
                components,
                packing=self._packing(components),
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
        _, inputs = _oriented(parameter)
        damage = self._packing_of(components).damage(components, inputs // self._size(parameter))
        if damage is not None:
            raise UnsupportedError(f"{parameter.name}: {damage}; the file is damaged")
        super().install(model, parameter, components)

    def dequantize(self, components: Mapping[str, Tensor], parameter: Parameter) -> Tensor:
        weight = weight_of(
            components, self._packing_of(components), _oriented(parameter), group_size=self._size(parameter)
        )
        result = linears.dequantize(weight, parameter.spec.dtype)
        return result if parameter.role == "linear" else result.t().contiguous()

    def restore_module(self, module: nn.Module, parameter: Parameter) -> nn.Module:
        original: nn.Module = module.__dict__["_original"]
        return original

    # Which form ---------------------------------------------------------------------------------------------------

    def _packing(self, found: Mapping[str, TensorSpec]) -> Packing:
        """The form of a weight. llm-awq had gemv's before it had its own."""
        qweight = found.get("qweight")
        if self.config.version == "llm-awq" and qweight is not None and qweight.dtype == torch.int32:
            return GEMV
        return _PACKINGS[self.config.version]

    def _packing_of(self, components: Mapping[str, Tensor]) -> Packing:
        return self._packing({name: TensorSpec.of(tensor) for name, tensor in components.items()})

    def _components(
        self,
        parameter: Parameter,
        packing: Packing,
        dtype: torch.dtype,
        found: Mapping[str, TensorSpec] | None = None,
    ) -> dict[str, TensorSpec]:
        """The stored tensors of a parameter, under the names that are there if they were found.

        Raises:
            UnsupportedError: it has no such form.
        """
        (outputs, inputs), size = _oriented(parameter), self._size(parameter)
        if inputs % size:
            raise UnsupportedError(
                f"{parameter.name}: groups of {size} don't divide its {inputs} inputs; choose a group_size that does, "
                "or -1 for one group, or leave this parameter out"
            )
        misfit = packing.misfit(outputs, inputs, size)
        if misfit is not None:
            raise UnsupportedError(
                f"{parameter.name}: {misfit}; AWQ's version {packing.label!r} has no form for it, so leave this "
                "parameter out"
            )
        specs = packing.components(outputs, inputs, size, dtype)
        usual = packing.zeros_names[0]
        name = next((name for name in packing.zeros_names if found is not None and name in found), usual)
        return {name if key == usual else key: spec for key, spec in specs.items()}

    def _advice(self, parameter: Parameter, packing: Packing, found: Mapping[str, TensorSpec]) -> str:
        """What may be the matter with stored tensors that don't fit."""
        outputs, inputs = _oriented(parameter)
        for other in (GEMM, GEMV, GEMV_FAST):
            if other is packing or other.misfit(outputs, inputs, inputs) is not None:
                continue
            qweight = other.components(outputs, inputs, inputs, rounding.SCALE_DTYPE)["qweight"]
            if qweight == found.get("qweight"):
                return f"The files look like version {other.label!r}: correct the version in the quantization_config"
        return (
            "The files and the quantization_config contradict each other, or the download is incomplete; a layout that "
            "a runtime made (marlin's) isn't read"
        )

    def _size(self, parameter: Parameter) -> int:
        """Inputs per group."""
        return _oriented(parameter)[1] if self.config.group_size == -1 else self.config.group_size

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


def _oriented(parameter: Parameter) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    first, second = parameter.spec.shape
    return (first, second) if parameter.role == "linear" else (second, first)
