"""Checkpoints of compressed-tensors, whose weights are floats."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from torch import Tensor, nn

from quantdock import Assembly, Layout, Parameter, QuantizationConfig, StoredTensor, TensorSpec, UnsupportedError
from quantdock_fp8.compressed_config import CompressedTensorsConfig, Group
from quantdock_fp8.quantizer import LOADS, FloatQuantizer
from quantdock_fp8.scheme import Scheme
from quantdock_fp8.targets import first_match

_OF_ATTENTION = {"k_scale": "k_proj.weight", "v_scale": "v_proj.weight"}
"""Scales of the cache, which stand beside the layers that make what is cached -> the weight they are kept with."""


class CompressedTensorsQuantizer(FloatQuantizer[CompressedTensorsConfig]):
    """Loads what llm-compressor writes, if weights are floats; which group a module belongs to, names decide."""

    config_class: ClassVar[type[QuantizationConfig]] = CompressedTensorsConfig
    capabilities = LOADS

    def __init__(self, config: CompressedTensorsConfig, *, prequantized: bool = False) -> None:
        super().__init__(config, prequantized=prequantized)
        self._groups = {target: group for group in config.groups for target in group.targets}
        self._found: dict[str, Group | None] = {}

    # What the core asks -------------------------------------------------------------------------------------------

    def refusal(self, parameter: Parameter) -> str | None:
        reason = super().refusal(parameter)
        if reason is not None:
            return reason
        ignored = first_match(self.config.ignore or (), self._names(parameter), _classes(parameter))
        if ignored is not None:
            return f"the checkpoint's config says that it isn't, with ignore={ignored!r}"
        if self._group(parameter) is None:
            targets = ", ".join(map(repr, self._groups))
            return f"no group of the checkpoint's config is meant for it; the groups' targets: {targets}"
        return None

    def scheme_of(self, parameter: Parameter) -> Scheme:
        group = self._group(parameter)
        return self._scheme if group is None else group.scheme

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        of_cache = sorted(_OF_ATTENTION.keys() & found.keys())
        if of_cache and found.keys() <= {parameter.leaf, *of_cache}:
            raise UnsupportedError(
                f"{parameter.name}: {of_cache[0]!r} of the cache is kept with this layer, which has to be quantized "
                "for that, and isn't"
            )
        return super().stored_layout(parameter, found)

    def stands_for(self, name: str, found: Mapping[str, TensorSpec]) -> TensorSpec | None:
        schemes = [group.scheme for group in self._groups.values()]
        decoded = (scheme.decoded(found[scheme.codes_name]) for scheme in schemes if scheme.codes_name in found)
        return next((spec for spec in decoded if spec is not None), None)

    def companions(self) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for group in self._groups.values():
            found |= self.companions_of(group.scheme)
        of_attention = {} if self.config.kv_cache_scheme is None else _OF_ATTENTION
        return {name: leaf for name, leaf in found.items() if name not in _OF_ATTENTION} | of_attention

    def assemble(
        self, parameter: Parameter, pieces: Mapping[str, Mapping[str, StoredTensor]]
    ) -> Mapping[str, Assembly]:
        first = self._group(parameter)
        for name in pieces:
            group = self._group_of([name.rpartition(".")[0]], _classes(parameter))
            if group is not first:
                raise UnsupportedError(
                    f"{name!r} belongs to {_label(group)}, but another part of {parameter.name!r} to {_label(first)}; "
                    "parts of one parameter have to belong to the same"
                )
        return super().assemble(parameter, pieces)

    def stored_in_pieces(self, parameter: Parameter) -> bool:
        return super().stored_in_pieces(parameter) or not _OF_ATTENTION.keys().isdisjoint(
            self.layout_of(parameter).components
        )

    def disassemble(self, parameter: Parameter, exported: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        if len(parameter.spec.shape) == 3:
            return super().disassemble(parameter, exported)
        result = {}
        for component, tensors in exported.items():
            for weight, tensor in tensors.items():
                owner = weight.removesuffix(_OF_ATTENTION.get(component, parameter.leaf))
                result[owner + component] = tensor
        return result

    # Which group --------------------------------------------------------------------------------------------------

    def _group(self, parameter: Parameter) -> Group | None:
        if parameter.name not in self._found:
            self._found[parameter.name] = self._group_of(self._names(parameter), _classes(parameter))
        return self._found[parameter.name]

    def _group_of(self, names: Collection[str], classes: Collection[str]) -> Group | None:
        target = first_match(self._groups, names, classes)
        return None if target is None else self._groups[target]

    def _names(self, parameter: Parameter) -> list[str]:
        """What the modules are called that a parameter belongs to, in the model and in the checkpoint."""
        stored = [self.stored_as[parameter.name]] if parameter.name in self.stored_as else []
        if parameter.name in self.assemblies:
            stored += [piece.source for piece in self.assemblies[parameter.name].pieces]
        return [parameter.module, *(name.rpartition(".")[0] for name in stored)]


def _classes(parameter: Parameter) -> list[str]:
    """Names of the classes that a target may name."""
    # Each expert's matrix was a linear layer to those who wrote the checkpoint.
    kind = parameter.module_type if len(parameter.spec.shape) == 2 else nn.Linear
    return [each.__name__ for each in kind.__mro__]


def _label(group: Group | None) -> str:
    return "no group" if group is None else f"the group {group.name!r}"
