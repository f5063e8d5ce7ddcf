"""GPTQ as a quantizer of quantdock: which parameters it takes, and what is stored of each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantdock import (
    Calibration,
    CalibrationBlock,
    Capabilities,
    Layout,
    Parameter,
    QuantizationConfig,
    Quantizer,
    Slices,
    TensorSpec,
    UnsupportedError,
    hookimpl,
    linears,
)
from quantdock_gptq import calibrating, rounding
from quantdock_gptq.config import BITS, FORMATS, GPTQConfig, Settings
from quantdock_gptq.modules import GPTQLinear, GPTQWeight

_NAME = "quantdock-gptq"
_LINEAR = ("linear", "linear-transposed")
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SLICE = 32  # outputs, whose codes fill whole words for any number of bits


class GPTQQuantizer(Quantizer[GPTQConfig]):
    """Weights of linear layers as codes of 2, 3, 4 or 8 bits, with a scale and a zero point for each group."""

    config_class: ClassVar[type[QuantizationConfig]] = GPTQConfig
    capabilities: ClassVar[Capabilities] = Capabilities(
        quantize=True, load=True, dequantize=True, save=True, train=True, compile=False
    )

    def __init__(self, config: GPTQConfig, *, prequantized: bool = False) -> None:
        super().__init__(config, prequantized=prequantized)
        if config.checkpoint_format not in FORMATS:
            raise UnsupportedError(
                f"the GPTQ checkpoint format {config.checkpoint_format!r} can't be read; quantdock-gptq reads "
                f"{' and '.join(map(repr, FORMATS))}. Look for the same model in one of these: runtimes make their own "
                "layouts (marlin, bitblas, ...) from them while loading"
            )
        for bits in {
            config.bits,
            *(overrides.get("bits", config.bits) for overrides in (config.dynamic or {}).values()),
        }:
            if bits not in BITS:
                raise UnsupportedError(f"GPTQ in {bits} bits can't be read; expected {', '.join(map(str, BITS))}")
        self._less_one = config.checkpoint_format == "gptq"
        quantizers = (config.meta or {}).get("quantizer")
        # Others leave g_idx out where inputs are in order; what was saved here has it.
        self._written_here = isinstance(quantizers, list) and any(str(name).startswith(_NAME) for name in quantizers)
        self._by_module: dict[str, Settings | None] = {}
        self._data = None if prequantized or config.dataset is None else _data(config)

    # What the core asks -------------------------------------------------------------------------------------------

    def refusal(self, parameter: Parameter) -> str | None:
        rank = len(parameter.spec.shape)
        if parameter.role not in _LINEAR or rank != 2:
            what = f"{rank}-D parameter" if rank != 2 else f"in {parameter.module_type.__name__}"
            return f"{what}: GPTQ quantizes the weights of linear layers only"
        if not parameter.module:
            return "the model is a linear layer itself: GPTQ swaps layers inside of a model"
        if not parameter.spec.numel:
            return "it has no elements"
        if self._of(parameter.module) is None:
            return "dynamic leaves it alone ('-:')"
        if not self.prequantized and not _named(parameter.module, self.config.modules_in_block_to_quantize):
            return "modules_in_block_to_quantize leaves it out"
        return None

    def layout(self, parameter: Parameter) -> Layout:
        settings, (outputs, inputs) = self._settings(parameter), _oriented(parameter)
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
        working = rounding.working_bytes(outputs, inputs)
        slices = Slices(dim=int(parameter.role != "linear"), multiple=_SLICE, working_bytes=working)
        components = self._components(parameter, settings, rounding.SCALE_DTYPE, indexed=True)
        return Layout(components=components, working_bytes=working, slices=slices)

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        settings = self._settings(parameter)
        scales = found.get("scales")
        dtype = scales.dtype if scales is not None and scales.dtype in _SCALE_DTYPES else rounding.SCALE_DTYPE
        indexed = "g_idx" in found or settings.desc_act or self._written_here
        expected = self._components(parameter, settings, dtype, indexed=indexed)
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
            raise UnsupportedError(
                f"{parameter.name}: {'; '.join(sorted(problems))}, for {settings.bits} bits and group_size="
                f"{settings.group_size}. The files and the quantization_config (or its dynamic) contradict each other, "
                "or the download is incomplete"
            )
        return Layout(components=expected)

    def companions(self) -> Mapping[str, str]:
        return dict.fromkeys(("qweight", "qzeros", "scales", "g_idx"), "weight")

    def saved_config(self, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        """The config, with the linear layers that were left alone in ``dynamic``: readers would look for quantized
        tensors in all that aren't."""
        if self.prequantized:
            return self.config.to_dict()
        taken = {parameter.module for parameter in self.parameters.values()}
        left = {
            parameter.module
            for parameter in parameters.values()
            if parameter.role in _LINEAR and parameter.module not in taken and self._of(parameter.module)
        }
        heads = {module for module in left if module.rpartition(".")[2] == "lm_head"}  # which lm_head=false leaves out
        alone: dict[str, Mapping[str, Any]] = {f"-:^{re.escape(module)}$": {} for module in sorted(left - heads)}
        dynamic = alone | dict(self.config.dynamic or {})
        search = {} if self._data is None else self.config.search_as_written()
        return dataclasses.replace(
            self.config,
            **search,
            lm_head=any(module.rpartition(".")[2] == "lm_head" for module in taken),
            dynamic=dynamic or None,
            meta=self.config.meta or {"quantizer": [f"{_NAME}:{version(_NAME)}"]},
        ).to_dict()

    # What the core calls ------------------------------------------------------------------------------------------

    @hookimpl
    def preprocess_model(self, model: nn.Module) -> None:
        for parameter in self.parameters.values():
            old = parameter.owner(model)
            settings, shape = self._settings(parameter), _oriented(parameter)
            bias = old._parameters["bias"]
            new = GPTQLinear(
                shape,
                self.layout_of(parameter).components,
                bits=settings.bits,
                group_size=settings.groups(shape[1])[0],
                less_one=self._less_one,
                bias=bias,
                compute_dtype=self.config.compute_dtype,
            )
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
        size, _ = self._settings(parameter).groups(len(parts["g_idx"]))
        torch.arange(len(parts["g_idx"]), dtype=torch.int32, out=parts["g_idx"]).floor_divide_(size)
        return parts

    def quantize_slice(self, parameter: Parameter, tensor: Tensor, start: int, parts: Mapping[str, Tensor]) -> None:
        rows = tensor if parameter.role == "linear" else tensor.t()
        settings = self._settings(parameter)
        if not rounding.quantize_into(rows, settings, parts, start, less_one=self._less_one):
            raise UnsupportedError(
                f"{parameter.name} has weights that are infinite, not numbers, or too large for a scale in "
                f"{rounding.SCALE_DTYPE}; leave it out, or repair the checkpoint"
            )

    def calibration(self) -> Calibration | None:
        return self._data

    def calibrate(self, block: CalibrationBlock) -> Iterator[tuple[Parameter, Mapping[str, Tensor]]]:
        for parameter, found in calibrating.quantize_block(block, self.config, less_one=self._less_one):
            components = self.quantize_param(parameter, block.weight(parameter)) if found is None else found
            assert components is not None, "it is one of this quantizer's"
            yield parameter, components

    def calibration_bytes(self, parameters: Sequence[Parameter], rows: int) -> int:
        sequential = self.config.true_sequential is not False
        return calibrating.calibration_bytes(parameters, rows, sequential=sequential)

    def install(self, model: nn.Module, parameter: Parameter, components: Mapping[str, Tensor]) -> None:
        index, groups = components.get("g_idx"), len(components["scales"])
        if index is not None and (int(index.min()) < 0 or int(index.max()) >= groups):
            raise UnsupportedError(
                f"{parameter.name}: g_idx names the groups {int(index.min())} to {int(index.max())}, but there are "
                f"scales for 0 to {groups - 1}; the file is damaged"
            )
        super().install(model, parameter, components)

    def dequantize(self, components: Mapping[str, Tensor], parameter: Parameter) -> Tensor:
        settings, (outputs, inputs) = self._settings(parameter), _oriented(parameter)
        weight = GPTQWeight(
            bits=settings.bits,
            inputs=inputs,
            outputs=outputs,
            group_size=settings.groups(inputs)[0],
            less_one=self._less_one,
            qweight=components["qweight"],
            qzeros=components["qzeros"],
            group_scales=components["scales"],
            g_idx=components.get("g_idx"),
        )
        result = linears.dequantize(weight, parameter.spec.dtype)
        return result if parameter.role == "linear" else result.t().contiguous()

    def restore_module(self, module: nn.Module, parameter: Parameter) -> nn.Module:
        original: nn.Module = module.__dict__["_original"]
        return original

    def _of(self, module: str) -> Settings | None:
        if module not in self._by_module:
            self._by_module[module] = self.config.of(module)
        return self._by_module[module]

    def _settings(self, parameter: Parameter) -> Settings:
        found = self._of(parameter.module)
        assert found is not None, "refusal() leaves it alone"
        return found

    def _components(
        self, parameter: Parameter, settings: Settings, dtype: torch.dtype, *, indexed: bool
    ) -> dict[str, TensorSpec]:
        """The stored tensors of a parameter.

        Raises:
            UnsupportedError: its codes or zero points don't fill whole words.
        """
        outputs, inputs = _oriented(parameter)
        bits, (_, groups) = settings.bits, settings.groups(inputs)
        if inputs * bits % 32 or outputs * bits % 32:
            raise UnsupportedError(
                f"{parameter.name}: {outputs} outputs and {inputs} inputs of {bits} bits don't fill whole words of 32; "
                "GPTQ has no form for it, so leave this parameter out"
            )
        specs = {
            "qweight": TensorSpec(dtype=torch.int32, shape=(inputs * bits // 32, outputs)),
            "qzeros": TensorSpec(dtype=torch.int32, shape=(groups, outputs * bits // 32)),
            "scales": TensorSpec(dtype=dtype, shape=(groups, outputs)),
        }
        return specs | ({"g_idx": TensorSpec(dtype=torch.int32, shape=(inputs,))} if indexed else {})


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


def _named(module: str, lists: Any) -> bool:
    """Whether ``modules_in_block_to_quantize`` has a module; it has all when it isn't given."""
    names = [name for part in lists or () for name in ([part] if isinstance(part, str) else part)]
    return not names or any(f".{module}".endswith(f".{name}") for name in names)


def _oriented(parameter: Parameter) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    first, second = parameter.spec.shape
    return (first, second) if parameter.role == "linear" else (second, first)
