"""GPTQ as a quantizer of quantdock: which parameters it takes, and what is stored of each."""

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
    Layout,
    Parameter,
    QuantizationConfig,
    Quantizer,
    Slices,
    StoredTensor,
    TensorSpec,
    UnsupportedError,
    hookimpl,
    linears,
)
from quantdock_gptq import calibrating, forms, marlin, nearest, rounding
from quantdock_gptq.choosing import LINEAR, Choosing
from quantdock_gptq.config import BITS, FORMATS, GPTQConfig, Settings
from quantdock_gptq.modules import GPTQLinear, weight_of

_NAME = "quantdock-gptq"
_SLICE = 32  # outputs, whose codes fill whole words for any number of bits


class GPTQQuantizer(Quantizer[GPTQConfig]):
    """Weights of linear layers, and of experts that are stored as such, as codes of 2, 3, 4 or 8 bits, with a scale and
    a zero point for each group."""

    config_class: ClassVar[type[QuantizationConfig]] = GPTQConfig
    capabilities: ClassVar[Capabilities] = Capabilities(
        quantize=True, load=True, dequantize=True, save=True, train=True, compile=False
    )

    def __init__(self, config: GPTQConfig, *, prequantized: bool = False) -> None:
        super().__init__(config, prequantized=prequantized)
        if config.checkpoint_format not in FORMATS:
            raise UnsupportedError(
                f"the GPTQ checkpoint format {config.checkpoint_format!r} can't be read; quantdock-gptq reads "
                f"{', '.join(map(repr, FORMATS))}. Look for the same model in one of these: runtimes make their own "
                "layouts (bitblas, ...) from them while loading"
            )
        for bits in {
            config.bits,
            *(overrides.get("bits", config.bits) for overrides in (config.dynamic or {}).values()),
        }:
            if bits not in BITS:
                raise UnsupportedError(f"GPTQ in {bits} bits can't be read; expected {', '.join(map(str, BITS))}")
        self._less_one = config.checkpoint_format == "gptq"
        self._is_marlin = config.checkpoint_format == marlin.FORMAT
        if self._is_marlin:
            marlin.expect(config, prequantized=prequantized)
        quantizers = (config.meta or {}).get("quantizer")
        # Others leave g_idx out where inputs are in order; what was saved here has it.
        self._written_here = isinstance(quantizers, list) and any(str(name).startswith(_NAME) for name in quantizers)
        self._choosing = Choosing(config)
        self._data = None if prequantized or config.dataset is None else _data(config)

    # What the core asks -------------------------------------------------------------------------------------------

    def refusal(self, parameter: Parameter) -> str | None:
        rank, experts = len(parameter.spec.shape), self._experts(parameter)
        if experts is None and (parameter.role not in LINEAR or rank != 2):
            what = f"{rank}-D parameter" if rank != 2 else f"in {parameter.module_type.__name__}"
            return f"{what}: GPTQ quantizes the weights of linear layers, and of experts that are stored one by one"
        if experts is not None and self._is_marlin:
            return "experts in the checkpoint format 'marlin' aren't read"
        if not parameter.module:
            return "the model is a linear layer itself: GPTQ swaps layers inside of a model"
        if not parameter.spec.numel:
            return "it has no elements"
        return self._choosing.refusal(parameter, prequantized=self.prequantized)

    def layout(self, parameter: Parameter) -> Layout:
        settings, experts = self._settings(parameter), self._experts(parameter)
        outputs, inputs = shape = _oriented(parameter) if experts is None else experts.shape
        size, _ = settings.groups(inputs)
        if inputs % size:
            raise UnsupportedError(
                f"{parameter.name}: groups of {size} don't divide its {inputs} inputs; choose a group_size that does, "
                "or -1 for one group, or leave this parameter out"
            )
        if settings.desc_act and self._data is None:
            raise UnsupportedError(
                f"{parameter.name}: desc_act orders inputs by their activations, and there are none when weights are "
                "rounded while loading; set desc_act to false, or give the config a dataset to calibrate with"
            )
        working = rounding.working_bytes(outputs, inputs, settings)
        components = forms.components(parameter.name, shape, settings, rounding.SCALE_DTYPE, indexed=True)
        if experts is not None:
            slices, components = Slices(working_bytes=working), experts.stacked(parameter.leaf, components)
        else:
            slices = Slices(dim=int(parameter.role != "linear"), multiple=_SLICE, working_bytes=working)
        return Layout(components=components, working_bytes=working, slices=slices)

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        experts = self._experts(parameter)
        if experts is None:
            return Layout(components=self._checked(parameter.name, _oriented(parameter), parameter, found))
        one = experts.unstacked(parameter.leaf, found)
        expected = self._checked(parameter.name, experts.shape, parameter, one)
        return Layout(components=experts.stacked(parameter.leaf, expected))

    def stands_for(self, name: str, found: Mapping[str, TensorSpec]) -> TensorSpec | None:
        return forms.stands_for(found)

    def assemble(
        self, parameter: Parameter, pieces: Mapping[str, Mapping[str, StoredTensor]]
    ) -> Mapping[str, Assembly]:
        experts = self._experts(parameter)
        if experts is None:
            return super().assemble(parameter, pieces)

        def check(name: str, specs: Mapping[str, TensorSpec]) -> None:
            self._checked(name, experts.shape, parameter, specs)

        return experts.assemble(parameter.leaf, pieces, check)

    def stored_in_pieces(self, parameter: Parameter) -> bool:
        return self._experts(parameter) is not None

    def disassemble(self, parameter: Parameter, exported: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        return linears.disassemble(parameter, exported)

    def companions(self) -> Mapping[str, str]:
        return dict.fromkeys((*forms.NAMES, *marlin.NAMES) if self._is_marlin else forms.NAMES, "weight")

    def saved_config(self, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        """The config, with the linear layers that were left alone in ``dynamic``: readers would look for quantized
        tensors in all that aren't."""
        if self.prequantized:
            return self.config.to_dict()
        taken = self.parameters.values()
        left = [
            parameter
            for name, parameter in parameters.items()
            if (parameter.role in LINEAR or self._experts(parameter) is not None) and name not in self.parameters
        ]
        alone: dict[str, Mapping[str, Any]] = {key: {} for key in self._choosing.left_alone(left, taken)}
        dynamic = alone | dict(self.config.dynamic or {})
        search = {} if self._data is None else self.config.search_as_written()
        return dataclasses.replace(
            self.config,
            **search,
            lm_head=any(parameter.module.rpartition(".")[2] == "lm_head" for parameter in taken),
            dynamic=dynamic or None,
            meta=self.config.meta or {"quantizer": [f"{_NAME}:{version(_NAME)}"]},
        ).to_dict()

    # What the core calls ------------------------------------------------------------------------------------------

    @hookimpl
    def preprocess_model(self, model: nn.Module) -> None:
        for parameter in self.parameters.values():
            old = parameter.owner(model)
            if self._experts(parameter) is not None:
                components = self.layout_of(parameter).components
                linears.hold(old, parameter.leaf, components, self._reading(parameter), parameter.spec.dtype)
                continue
            bias = old._parameters["bias"]
            new = self._layer(parameter, bias)
            if bias is not None:
                old.bias = nn.Parameter(torch.empty_like(bias))
            new.__dict__["_original"] = old  # on the meta device for good; past nn.Module, which would list it
            model.set_submodule(parameter.module, new.train(old.training))

    @hookimpl
    def quantize_param(self, parameter: Parameter, tensor: Tensor) -> Mapping[str, Tensor] | None:
        if parameter.name not in self.parameters:
            return None
        parts = self.begin_slices(parameter, tensor.device)
        self.quantize_slice(parameter, tensor, 0, parts)
        return parts

    def begin_slices(self, parameter: Parameter, device: torch.device) -> dict[str, Tensor]:
        parts = super().begin_slices(parameter, device)
        index = next(tensor for name, tensor in parts.items() if name.endswith("g_idx"))
        nearest.number_groups(index, self._settings(parameter))
        return parts

    def quantize_slice(self, parameter: Parameter, tensor: Tensor, start: int, parts: Mapping[str, Tensor]) -> None:
        experts, settings = self._experts(parameter), self._settings(parameter)
        if experts is None:
            rows = tensor if parameter.role == "linear" else tensor.t()
            nearest.write(parameter.name, rows, settings, parts, start, less_one=self._less_one)
            return
        for expert, matrix in enumerate(tensor, start):
            for part, rows in enumerate(matrix.split(experts.shape[0])):
                own = {name.removeprefix(f"{parameter.leaf}_"): stack[expert, part] for name, stack in parts.items()}
                nearest.write(parameter.name, rows, settings, own, 0, less_one=self._less_one)

    def calibration(self) -> Calibration | None:
        return self._data

    def calibrate(self, block: CalibrationBlock) -> Iterator[tuple[Parameter, Mapping[str, Tensor]]]:
        method = calibrating.Method(config=self.config, choosing=self._choosing, less_one=self._less_one)
        for parameter, found in calibrating.quantize_block(block, method):
            components = self.quantize_param(parameter, block.weight(parameter)) if found is None else found
            assert components is not None, "it is one of this quantizer's"
            yield parameter, components

    def calibration_bytes(self, parameters: Sequence[Parameter], rows: int) -> int:
        sequential = self.config.true_sequential is not False
        return calibrating.calibration_bytes(parameters, rows, sequential=sequential)

    def install(self, model: nn.Module, parameter: Parameter, components: Mapping[str, Tensor]) -> None:
        damage = forms.damage(components)
        if damage is not None:
            raise UnsupportedError(f"{parameter.name}: {damage}; the file is damaged")
        super().install(model, parameter, components)

    def dequantize(self, components: Mapping[str, Tensor], parameter: Parameter) -> Tensor:
        if self._experts(parameter) is not None:
            return linears.dequantize_all(self._reading(parameter).matrices(components), parameter.spec.dtype)
        settings, shape = self._settings(parameter), _oriented(parameter)
        size, _ = settings.groups(shape[1])
        weight: linears.Weight
        if self._is_marlin:
            weight = marlin.weight_of(components, shape)
        else:
            weight = weight_of(components, shape, bits=settings.bits, group_size=size, less_one=self._less_one)
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
        return self._choosing.experts(parameter, self.assemblies)

    def _settings(self, parameter: Parameter) -> Settings:
        return self._choosing.settings(parameter)

    def _layer(self, parameter: Parameter, bias: nn.Parameter | None) -> linears.GroupedLinear:
        """What takes the place of a linear layer."""
        settings, shape = self._settings(parameter), _oriented(parameter)
        components, dtype = self.layout_of(parameter).components, self.config.compute_dtype
        if self._is_marlin:
            return marlin.MarlinLinear(shape, components, bias=bias, compute_dtype=dtype)
        return GPTQLinear(
            shape,
            components,
            bits=settings.bits,
            group_size=settings.groups(shape[1])[0],
            less_one=self._less_one,
            bias=bias,
            compute_dtype=dtype,
        )

    def _reading(self, parameter: Parameter) -> linears.JointReading:
        experts, settings = self._experts(parameter), self._settings(parameter)
        assert experts is not None
        size, _ = settings.groups(experts.shape[1])
        read = functools.partial(weight_of, bits=settings.bits, group_size=size, less_one=self._less_one)
        return linears.JointReading.of(parameter.leaf, experts, read, self.config.compute_dtype)

    def _checked(
        self, name: str, shape: tuple[int, int], parameter: Parameter, found: Mapping[str, TensorSpec]
    ) -> dict[str, TensorSpec]:
        settings = self._settings(parameter)
        if self._is_marlin:
            return marlin.checked(name, shape, settings.group_size, found)
        return forms.checked(name, shape, settings, found, indexed=settings.desc_act or self._written_here)


def _data(config: GPTQConfig) -> Calibration:
    """What the config gives to calibrate with.

    Raises:
        ConfigError: it isn't a list of samples.
        UnsupportedError: it asks for something that isn't done here.
    """
    if any(overrides.get("mse") for overrides in (config.dynamic or {}).values()):
        raise UnsupportedError(
            "GPTQConfig.dynamic asks for mse, a search for scales that quantdock-gptq hasn't; drop it"
        )
    return Calibration(
        dataset=config.dataset,
        tokenizer=config.tokenizer,
        batch_size=config.batch_size,
        max_length=config.model_seqlen,
    )


def _oriented(parameter: Parameter) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    first, second = parameter.spec.shape
    return (first, second) if parameter.role == "linear" else (second, first)
