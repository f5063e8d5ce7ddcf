"""torchao as a quantizer of quantdock: its own tensors, made parameter by parameter."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

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
from quantdock_torchao import tensors, upstream
from quantdock_torchao.arithmetic import WORKING_PER_SCALE, Arithmetic, arithmetic_of
from quantdock_torchao.choice import Choice
from quantdock_torchao.config import INSTEAD, TorchAoConfig

_WORKING = {"Int8Tensor": 8, "IntxUnpackedToInt8Tensor": 8, "Float8Tensor": 13}
"""Bytes per element that torchao allocates on the way at the most, its result not counted; measured."""

_WORKING_PER_SCALE = 32

_PIECE, _PIECE_ON_DEVICE = 1 << 18, 1 << 20
"""Elements that torchao is given at a time on CPU and elsewhere, if its groups are within rows: each call takes a
millisecond, and several times their memory, of which malloc keeps the more, the larger they are."""

_PROBE = (1024, 1024 * 945)
"""A shape that the sizes of blocks divide; its rows are taken as many times as a group has elements."""


class TorchAoQuantizer(Quantizer[TorchAoConfig]):
    """Weights as torchao's tensor subclasses, in modules that stay what they are."""

    config_class: ClassVar[type[QuantizationConfig]] = TorchAoConfig
    capabilities: ClassVar[Capabilities] = Capabilities(
        quantize=True, load=True, dequantize=True, save=True, train=False, compile=True
    )

    def __init__(self, config: TorchAoConfig, *, prequantized: bool = False) -> None:
        super().__init__(config, prequantized=prequantized)
        self._skipped = SkipList(config.modules_to_not_convert or ())
        method = config.method()
        self._choice = Choice(method)
        self._made: dict[tuple[object, ...], tensors.Described] = {}
        self._tried: dict[tuple[object, ...], Arithmetic | None] = {}
        if prequantized:
            return
        if config.include_input_output_embeddings or config.untie_embedding_weights:
            raise UnsupportedError(
                "include_input_output_embeddings and untie_embedding_weights are for checkpoints that are quantized "
                "already; to quantize an embedding while loading, untie it with config_overrides and name it in "
                "FqnToConfig"
            )
        for one in self._choice.all():
            _require_runnable(one)

    # What the core asks -------------------------------------------------------------------------------------------

    def refusal(self, parameter: Parameter) -> str | None:
        if not parameter.module:
            return "it belongs to the model itself: torchao's files can't name it"
        if self.prequantized:  # what is stored quantized is loaded quantized, whatever the config says
            return None
        if not parameter.spec.numel:
            return "it has no elements"
        config, reason = self._choice.of(parameter)
        if config is None:
            return reason
        if len(parameter.spec.shape) < 2 or not parameter.spec.dtype.is_floating_point or parameter.is_buffer:
            return "no matrix of floats: torchao quantizes weights"
        skipped = self._skipped.match(parameter.name)
        return None if skipped is None else f"modules_to_not_convert={skipped!r}"

    def layout(self, parameter: Parameter) -> Layout:
        made, spec = self._described(parameter), parameter.spec
        scales = sum(part.numel for name, part in made.components.items() if name.endswith("_scale"))
        per_element = _WORKING[made.kind] + _WORKING_PER_SCALE * scales / spec.numel
        if made.block[0] != 1:
            return Layout(components=made.components, working_bytes=int(per_element * spec.numel))
        # A piece is quantized beside its parts, and then copied to where they belong.
        piece = min(spec.numel, max(_PIECE_ON_DEVICE, spec.numel // spec.shape[0]))
        working = max(ops.working_bytes(spec.shape[-1]), int((per_element + 2) * piece))
        copies = -(-WORKING_PER_SCALE * scales // spec.nbytes)
        return Layout(
            components=made.components,
            working_bytes=working + copies * spec.nbytes,
            slices=Slices(dim=0, working_bytes=working, working_copies=copies),
        )

    def companions(self) -> Mapping[str, str]:
        parts = ("qdata", "scale", "zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")
        leaves = {"weight"} | {
            name.rpartition(".")[2] for name, text in self.metadata.items() if '"_tensor_data_names"' in text
        }
        return {tensors.component(leaf, part): leaf for leaf in leaves for part in parts}

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        return Layout(components=self._read(parameter, found).components)

    def saved_metadata(self, model: nn.Module) -> Mapping[str, str]:
        """A description of every tensor by its name in the model, as transformers writes and expects it."""
        # torchao can't read names without a dot.
        result = {name: tensors.PLAIN for name in model.state_dict() if "." in name}
        result |= {name: tensors.describe(model.get_parameter(name)) for name in self.parameters}
        return result | {"tensor_names": json.dumps(list(result))}

    # What the core calls ------------------------------------------------------------------------------------------

    @hookimpl
    def preprocess_model(self, model: nn.Module) -> None:
        """Nothing to swap: torchao changes the tensors inside of modules."""
        if not self.parameters and not self.prequantized:
            self._choice.require_match([name for name, _ in model.named_parameters()])

    @hookimpl
    def quantize_param(self, parameter: Parameter, tensor: Tensor) -> Mapping[str, Tensor] | None:
        if parameter.name not in self.parameters:
            return None
        if self._described(parameter).block[0] != 1:
            return tensors.parts_of(parameter.leaf, self._quantized(parameter, tensor))
        parts = self.begin_slices(parameter, tensor.device)
        self.quantize_slice(parameter, tensor, 0, parts)
        return parts

    def quantize_slice(self, parameter: Parameter, tensor: Tensor, start: int, parts: Mapping[str, Tensor]) -> None:
        mine = {name: part[start : start + len(tensor)] for name, part in parts.items()}
        made = self._described(parameter)
        arithmetic = self._arithmetic(parameter, made)
        if arithmetic is not None and tensor.device.type == "cpu" and tensor.is_contiguous():
            matrices = {name: part.flatten(0, -2) for name, part in tensors.by_part(parameter.leaf, mine).items()}
            if arithmetic(tensor.flatten(0, -2), made.block[-1], matrices):
                return
        piece = _PIECE if tensor.device.type == "cpu" else _PIECE_ON_DEVICE
        step = max(1, piece * len(tensor) // tensor.numel())
        for first in range(0, len(tensor), step):
            rows = slice(first, first + step)
            found = tensors.parts_of(parameter.leaf, self._quantized(parameter, tensor[rows]))
            for name, part in found.items():
                mine[name][rows].copy_(part)

    def install(self, model: nn.Module, parameter: Parameter, components: Mapping[str, Tensor]) -> None:
        found = self.stored.get(parameter.name)
        made = self._described(parameter) if found is None else self._read(parameter, found)
        tensor = tensors.build(parameter.leaf, made.description, components)
        module = parameter.owner(model)
        module.register_parameter(parameter.leaf, nn.Parameter(tensor, requires_grad=False))

    def components(self, model: nn.Module, parameter: Parameter) -> Mapping[str, Tensor]:
        return tensors.parts_of(parameter.leaf, model.get_parameter(parameter.name))

    def dequantize(self, components: Mapping[str, Tensor], parameter: Parameter) -> Tensor:
        found = self.stored.get(parameter.name)
        made = self._described(parameter) if found is None else self._read(parameter, found)
        tensor: Tensor = tensors.build(parameter.leaf, made.description, components).dequantize()
        return tensor.to(parameter.spec.dtype)

    def restore_module(self, module: nn.Module, parameter: Parameter) -> nn.Module:
        return module

    # torchao ------------------------------------------------------------------------------------------------------

    def _described(self, parameter: Parameter) -> tensors.Described:
        """What a parameter becomes, found out by quantizing one without values; once for all of a shape."""
        config, _ = self._choice.of(parameter)
        kind = (id(config), parameter.leaf, parameter.spec, parameter.role)
        if kind not in self._made:
            empty = torch.empty(parameter.spec.shape, dtype=parameter.spec.dtype, device="meta")
            try:
                made = self._quantized(parameter, empty)
            except Exception as error:  # torchao raises all kinds of them
                raise UnsupportedError(
                    f"{parameter.name}: torchao's {type(config).__name__} doesn't take {parameter.spec} ({error}). "
                    f"Choose a granularity that fits the shape, or leave it out: skip=[{parameter.name!r}]"
                ) from error
            misfit = tensors.misfit(made)
            if misfit is not None:
                raise UnsupportedError(
                    f"{parameter.name}: torchao's {type(config).__name__} doesn't take {parameter.spec}: it {misfit}. "
                    f"Leave it out: skip=[{parameter.name!r}]"
                )
            self._made[kind] = tensors.described(parameter.leaf, made)
        return self._made[kind]

    def _quantized(self, parameter: Parameter, tensor: Tensor) -> Any:
        config, _ = self._choice.of(parameter)
        return _quantize(config, parameter.leaf, tensor, linear=parameter.role == "linear")

    def _arithmetic(self, parameter: Parameter, made: tensors.Described) -> Arithmetic | None:
        """What quantizes a parameter on CPU instead of torchao, if there is something that gives the same bits."""
        if any(size != 1 for size in made.block[:-1]):
            return None
        config, _ = self._choice.of(parameter)
        kind = (id(config), made.block[-1], parameter.spec.dtype)
        if kind not in self._tried:

            def reference(matrix: Tensor) -> Mapping[str, Tensor]:
                found = _quantize(config, "weight", matrix, linear=True)
                return tensors.by_part("weight", tensors.parts_of("weight", found))

            self._tried[kind] = arithmetic_of(made.kind, made.block[-1], parameter.spec.dtype, reference)
        return self._tried[kind]

    def _read(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> tensors.Described:
        # transformers describes a tensor under its name in the model, which isn't always that in the file.
        name = self.stored_as.get(parameter.name, parameter.name)
        description = self.metadata.get(parameter.name, self.metadata.get(name))
        if description is None:
            raise UnsupportedError(
                f"{parameter.name}: the metadata of the weight files doesn't describe {name!r}, so its class and block "
                "size are unknown; torchao, transformers and quantdock write a description when they save"
            )
        kind = (description, parameter.leaf, parameter.spec, *sorted(found.items(), key=lambda item: item[0]))
        if kind not in self._made:
            self._made[kind] = tensors.read(parameter, description, found)
        return self._made[kind]


def _quantize(config: Any, leaf: str, tensor: Tensor, *, linear: bool) -> Any:
    """What ``quantize_`` makes of a parameter, in a module that holds nothing else."""
    quantization = upstream.module("torchao.quantization")
    weight = nn.Parameter(tensor, requires_grad=False)
    if linear:
        holder: nn.Module = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
        holder.register_parameter(leaf, weight)
        quantization.quantize_(holder, config, filter_fn=lambda module, name: True)
    else:
        holder = nn.Module()
        holder.register_parameter(leaf, weight)
        quantization.quantize_(holder, quantization.FqnToConfig(OrderedDict({leaf: config})), filter_fn=None)
    made = holder.get_parameter(leaf)
    # torchao makes the module refer to itself: it lives on until garbage is collected, and shall hold nothing by then.
    holder.register_parameter(leaf, None)
    return made


def _require_runnable(config: Any) -> None:
    """Raise once, and not for each parameter, when a config can't be used here, whatever it is used for.

    Raises:
        ConfigError: its group size is no size.
        UnsupportedError: torchao says what is missing, or makes what can't be used.
    """
    what = f"torchao's {type(config).__name__} can't be used"
    if getattr(config, "act_quant_scale", _ABSENT) is None:
        raise UnsupportedError(
            f"{what}: it quantizes activations by scales that are found in a calibration, which isn't a part of "
            f"loading. {INSTEAD}"
        )
    shape = _PROBE[0], _PROBE[1] * _group_size(config)
    try:
        made = _quantize(config, "weight", torch.empty(shape, dtype=torch.bfloat16, device="meta"), linear=True)
    except (ImportError, AssertionError) as error:  # what torchao checks of the machine, and torch of its build
        raise UnsupportedError(f"{what} on this machine: {str(error).rstrip('.')}. {INSTEAD}") from error
    except Exception as error:  # torchao raises all kinds of them; as the shape fits, it would for any weight
        raise UnsupportedError(
            f"{what}: tried out on a tensor without values, it raises {type(error).__name__} "
            f"({str(error).rstrip('.')}). {INSTEAD}"
        ) from error
    misfit = tensors.misfit(made)
    if misfit is not None:
        raise UnsupportedError(f"{what}: it {misfit}. {INSTEAD}")


_ABSENT = object()


def _group_size(config: Any) -> int:
    """The elements that share a scale, if a config says so; else 1."""
    for holder in (config, getattr(config, "granularity", None), getattr(config, "weight_granularity", None)):
        size = getattr(holder, "group_size", None)
        if size is None:
            continue
        if type(size) is not int or size < 1:
            raise ConfigError(
                f"torchao's {type(config).__name__} has group_size={size!r}, expected a whole number of at least 1 "
                "that divides the rows of the weights"
            )
        return size
    return 1
