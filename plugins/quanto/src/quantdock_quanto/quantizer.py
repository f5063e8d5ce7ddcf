"""optimum-quanto as a quantizer of quantdock: its own linear layers, with frozen 8-bit weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantdock import (
    Capabilities,
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
from quantdock_quanto.arithmetic import WORKING_PER_ROW, Arithmetic, arithmetic_of
from quantdock_quanto.config import QuantoConfig

_WORKING = 12
"""Bytes per element that quanto allocates on the way at the most, its result not counted; measured."""

_PIECE, _PIECE_ON_DEVICE = 1 << 18, 1 << 20
"""Elements that quanto is given at a time on CPU and elsewhere: it takes several times their memory, of which malloc
keeps the more, the larger they are."""

_ALIGNMENT = 64
"""Bytes; that of torch's own memory, so what was quantized here isn't copied again."""

_EIGHT_BITS = ("int8", "float8")
_SCALES = ("input_scale", "output_scale")
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _quanto() -> Any:
    return importlib.import_module("optimum.quanto")


class QuantoQuantizer(Quantizer[QuantoConfig]):
    """Weights of linear layers in 8 bits, one scale per row."""

    config_class: ClassVar[type[QuantizationConfig]] = QuantoConfig
    capabilities: ClassVar[Capabilities] = Capabilities(
        quantize=True, load=True, dequantize=True, save=True, train=True, compile=False
    )

    def __init__(self, config: QuantoConfig, *, prequantized: bool = False) -> None:
        super().__init__(config, prequantized=prequantized)
        self._skipped = SkipList(config.modules_to_not_convert or ())
        if config.activations is not None:
            raise UnsupportedError(
                f"activations={config.activations!r}: quanto quantizes activations after calibrating a model with "
                "data, which isn't a part of loading one; leave it out"
            )
        if config.weights not in _EIGHT_BITS:
            raise UnsupportedError(
                f"weights={config.weights!r} can't be used: quanto unpacks such weights with a kernel that it has "
                "compiled by a C++ compiler when it is first needed, into the installed package; nothing is compiled "
                f"here. Use weights={' or '.join(map(repr, _EIGHT_BITS))}, or another method's 4-bit preset"
            )
        self._layouts: dict[tuple[str, TensorSpec], Layout] = {}
        self._tried: dict[torch.dtype, Arithmetic | None] = {}

    # What the core asks -------------------------------------------------------------------------------------------

    def refusal(self, parameter: Parameter) -> str | None:
        if parameter.role != "linear":
            return f"in {parameter.module_type.__name__}: quanto quantizes the weights of linear layers"
        if not parameter.module:
            return "the model is a linear layer itself: quanto swaps layers inside of a model"
        if not parameter.spec.numel:
            return "it has no elements"
        if self.prequantized:  # what is stored quantized is loaded quantized, whatever the list says
            return None
        skipped = self._skipped.match(parameter.module)
        return None if skipped is None else f"modules_to_not_convert={skipped!r}"

    def layout(self, parameter: Parameter) -> Layout:
        kind = (parameter.leaf, parameter.spec)
        if kind not in self._layouts:
            spec = parameter.spec
            if not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
                raise UnsupportedError(f"{parameter.name}: {spec} has no values that quanto could quantize")
            codes = self._qtype().dtype
            leaf = parameter.leaf
            scalar = TensorSpec(dtype=spec.dtype, shape=())
            components = {
                f"{leaf}._data": TensorSpec(dtype=codes, shape=spec.shape),
                f"{leaf}._scale": TensorSpec(dtype=spec.dtype, shape=(spec.shape[0], 1)),
                **dict.fromkeys(_SCALES, scalar),
            }
            working, slices = self._working(spec)
            self._layouts[kind] = Layout(components=components, working_bytes=working, slices=slices)
        return self._layouts[kind]

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        scale = found.get(f"{parameter.leaf}._scale")
        if scale is not None and scale.dtype != parameter.spec.dtype and scale.dtype in _SCALE_DTYPES:
            raise UnsupportedError(
                f"{parameter.name}: stored to be used in {scale.dtype}, but the model is loaded in "
                f"{parameter.spec.dtype}; pass dtype={str(scale.dtype).removeprefix('torch.')!r}"
            )
        try:
            return super().stored_layout(parameter, found)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"{error} (weights={self.config.weights!r} says the config); fetch or save the files again, or "
                "quantize the original weights"
            ) from error

    def _working(self, spec: TensorSpec) -> tuple[int, Slices | None]:
        """What quantizing takes, as a whole and in slices."""
        rows, columns = spec.shape
        if rows == 1:
            return _WORKING * spec.numel + 1024, None
        # A piece is quantized beside its parts, and then copied to where they belong.
        working = max(ops.working_bytes(columns), (_WORKING + 2) * min(spec.numel, max(_PIECE_ON_DEVICE, columns)))
        copies = -(-WORKING_PER_ROW * rows // spec.nbytes)
        slices = Slices(dim=0, working_bytes=working, working_copies=copies)
        return working + copies * spec.nbytes, slices

    def companions(self) -> Mapping[str, str]:
        return dict.fromkeys(("weight._data", "weight._scale", *_SCALES), "weight")

    # What the core calls ------------------------------------------------------------------------------------------

    @hookimpl
    def preprocess_model(self, model: nn.Module) -> None:
        from quantdock_quanto.modules import Linear

        for parameter in self.parameters.values():
            old = parameter.owner(model)
            assert isinstance(old, nn.Linear), "its role is linear"
            new = Linear(
                old.in_features,
                old.out_features,
                old.bias is not None,
                dtype=parameter.spec.dtype,
                device="meta",
                weights=self._qtype(),
            )
            new.bias = old.bias
            model.set_submodule(parameter.module, new.train(old.training))

    @hookimpl
    def quantize_param(self, parameter: Parameter, tensor: Tensor) -> Mapping[str, Tensor] | None:
        if parameter.name not in self.parameters:
            return None
        parts = self.begin_slices(parameter, tensor.device)
        self.quantize_slice(parameter, tensor, 0, parts)
        return self.finish_slices(parameter, parts)

    def quantize_slice(self, parameter: Parameter, tensor: Tensor, start: int, parts: Mapping[str, Tensor]) -> None:
        data, scale = (parts[f"{parameter.leaf}.{name}"][start : start + len(tensor)] for name in ("_data", "_scale"))
        on_cpu, whole = tensor.device.type == "cpu", parameter.spec.shape[0] == 1
        arithmetic = self._arithmetic(tensor.dtype) if on_cpu and not whole else None
        if arithmetic is not None and arithmetic(tensor, data, scale):
            return
        step = max(1, (_PIECE if on_cpu else _PIECE_ON_DEVICE) // tensor.shape[1])
        for first in range(0, len(tensor), step):
            rows = slice(first, first + step)
            data[rows], scale[rows] = self._quantized(tensor[rows])

    def finish_slices(self, parameter: Parameter, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        for name in _SCALES:
            parts[name].fill_(1)
        return parts

    def install(self, model: nn.Module, parameter: Parameter, components: Mapping[str, Tensor]) -> None:
        module = parameter.owner(model)
        module.register_parameter(parameter.leaf, nn.Parameter(self._built(parameter, components), requires_grad=False))
        for name in _SCALES:
            module.register_buffer(name, components[name])

    def components(self, model: nn.Module, parameter: Parameter) -> Mapping[str, Tensor]:
        module = parameter.owner(model)
        weight: Any = module.get_parameter(parameter.leaf)
        parts = {f"{parameter.leaf}._data": weight._data, f"{parameter.leaf}._scale": weight._scale}
        return parts | {name: module.get_buffer(name) for name in _SCALES}

    def dequantize(self, components: Mapping[str, Tensor], parameter: Parameter) -> Tensor:
        return self._built(parameter, components).dequantize()  # type: ignore[no-any-return]

    # quanto -------------------------------------------------------------------------------------------------------

    def _qtype(self) -> Any:
        return _quanto().qtypes[f"q{self.config.weights}"]

    def _quantized(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """What ``QLinear.freeze`` makes of a weight: codes and scales, each row for itself."""
        quanto, qtype = _quanto(), self._qtype()
        scale = quanto.AbsmaxOptimizer()(tensor, qtype=qtype, axis=0)
        made = quanto.quantize_weight(tensor, qtype=qtype, axis=0, scale=scale, optimized=False)
        return made._data, made._scale.reshape(len(tensor), 1)

    def _arithmetic(self, dtype: torch.dtype) -> Arithmetic | None:
        """What quantizes on CPU instead of quanto, if there is something that gives the same bits."""
        if dtype not in self._tried:
            self._tried[dtype] = arithmetic_of(self._qtype().dtype, dtype, self._quantized)
        return self._tried[dtype]

    def _built(self, parameter: Parameter, components: Mapping[str, Tensor]) -> Any:
        """quanto's tensor from its components. It is always the plain one: the others need a compiler."""
        data, scale = (_aligned(components[f"{parameter.leaf}.{name}"]) for name in ("_data", "_scale"))
        rows = parameter.spec.shape[0]
        return _quanto().WeightQBytesTensor(
            self._qtype(),
            axis=0 if rows > 1 else None,  # as quanto has it, one row is quantized as a whole
            size=data.size(),
            stride=data.stride(),
            data=data,
            scale=scale,
            activation_qtype=None,
        )


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it lies in a mapped file where torch's kernel for it, ``_weight_int8pack_mm``, can't read:
    it crashes on codes that don't start at a multiple of 16 bytes."""
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT else tensor
