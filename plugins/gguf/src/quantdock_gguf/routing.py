"""Where the tensors of a GGUF file go in a transformers model, and what has to be undone on the way.

llama.cpp's converters rearrange some tensors and store others with an offset. For most architectures transformers
undoes that in a *tensor processor*, numpy code that sees one tensor after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantdock import Assembly, CheckpointError, Conversion, Piece, Routing, TensorSpec, rename

if TYPE_CHECKING:
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor

_EXPERTS = re.compile(r"(?P<name>blk\.\d+\.ffn_(?P<part>gate|up|down)_exps)\.weight")


@dataclass(frozen=True, kw_only=True)
class ProcessorRouting:
    """Routes by a tensor processor, so that each parameter gets the bits that transformers would give it."""

    processor: TensorProcessor
    names: Mapping[str, str]
    """GGUF name -> parameter (see ``naming``)."""

    def route(self, stored: Mapping[str, TensorSpec], slots: Mapping[str, TensorSpec]) -> Routing:
        """Match stored tensors with parameters; what transformers would drop without a word is unmatched."""
        conversions: list[Conversion] = []
        unmatched: dict[str, str] = {}
        for name, spec in stored.items():
            expert = _EXPERTS.fullmatch(name) if self._fuses_experts else None
            target = self.names.get(expert["name"] if expert else name)
            if target is None or target not in slots:
                unmatched[name] = target or name
            elif expert is None:
                conversions.append(self._single(name, spec, target, slots[target]))
            elif expert["part"] == "down":
                conversions.append(rename(name, target, spec))
            elif stored.get(other := _other_half(name)) is None or stored[other].shape != spec.shape:
                unmatched[name] = target  # half of a parameter; transformers would leave zeros in the other half
            elif expert["part"] == "gate":
                conversions.append(
                    _fused(name, other, target, spec, torch.promote_types(spec.dtype, stored[other].dtype))
                )
        return Routing(conversions=conversions, unmatched=unmatched)

    @property
    def _fuses_experts(self) -> bool:
        """Whether the processor joins the stacked gate and up projections of a layer in one parameter."""
        return hasattr(self.processor, "GGUF_MOE_WEIGHTS_PATTERN") and hasattr(self.processor, "HF_MOE_W13_PATTERN")

    def _single(self, name: str, spec: TensorSpec, target: str, slot: TensorSpec) -> Conversion:
        if self._leaves_alone(name, spec):
            return rename(name, target, spec)
        # The processor may turn the shape round. What has another number of values fits in no way, and is shown with
        # the shape it has.
        shape = slot.shape if slot.numel == spec.numel else spec.shape
        return Conversion(
            sources=(name,),
            targets={target: TensorSpec(dtype=torch.float32, shape=shape)},
            function=self._function(name, target, shape),
            label=type(self.processor).__name__,
        )

    def _leaves_alone(self, name: str, spec: TensorSpec) -> bool:
        """Whether the processor hands this tensor back as it is, found by handing it something it can't work on."""
        token = _Token(shape=spec.shape, ndim=len(spec.shape))
        try:
            result = self.processor.process(
                weights=token, name=name, tensor_key_mapping=self.names, parsed_parameters={"tensors": {}}
            )
        except (TypeError, AttributeError, LookupError, ValueError):
            return False
        return result.weights is token and result.name == name

    def _function(
        self, name: str, target: str, shape: tuple[int, ...]
    ) -> Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]:
        def process(sources: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            kept: dict[str, Any] = {"tensors": {}}
            # A processor takes logarithms; what a damaged file makes of that is NaN, as in transformers.
            with np.errstate(all="ignore"):
                result = self.processor.process(
                    weights=sources[name].to(torch.float32).numpy(),
                    name=name,
                    tensor_key_mapping=self.names,
                    parsed_parameters=kept,
                )
            # A processor that has put the tensor in its place itself returns no name.
            value = kept["tensors"].get(target) if result.name is None else result.weights
            value = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
                found = list(value.shape) if isinstance(value, torch.Tensor) else "nothing"
                raise CheckpointError(
                    f"as {target!r} it comes out of {type(self.processor).__name__} as {found}, expected {list(shape)}",
                    tensor=name,
                )
            return {target: value}

        return process


@dataclass(frozen=True, kw_only=True)
class _Token:
    """Stands for an array that has a shape and can't be computed with."""

    shape: tuple[int, ...]
    ndim: int


def _other_half(name: str) -> str:
    """The up projection that a gate projection is joined with, and the other way round."""
    return name.replace("_gate_", "_up_") if "_gate_" in name else name.replace("_up_", "_gate_")


def _fused(gate: str, up: str, target: str, spec: TensorSpec, dtype: torch.dtype) -> Conversion:
    """``[experts, rows, columns]`` twice, joined along the rows, the gates first."""
    experts, rows, *columns = (*spec.shape, 0, 0)[: max(2, len(spec.shape))]
    shape = (experts, 2 * rows, *columns)
    pieces = (
        Piece(source=gate, into=(slice(None), slice(0, rows))),
        Piece(source=up, into=(slice(None), slice(rows, 2 * rows))),
    )
    return Conversion(
        sources=(gate, up),
        targets={target: TensorSpec(dtype=dtype, shape=shape)},
        assemblies={target: Assembly(shape=shape, pieces=pieces)},
        label="concatenate",
    )
