"""What the formats of bitsandbytes have in common: what each stores, makes of a tensor, and puts into a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantdock import Layout, Parameter, TensorSpec, UnsupportedError
from quantdock_bnb.config import BitsAndBytesConfig


class Format(ABC):
    """One way of bitsandbytes to store the weight of a linear layer."""

    def __init__(self, config: BitsAndBytesConfig) -> None:
        self.config = config

    @abstractmethod
    def companions(self) -> frozenset[str]:
        """Components beside the weight, named after it."""

    @abstractmethod
    def layout(self, parameter: Parameter) -> Layout:
        """See ``Quantizer.layout``."""

    @abstractmethod
    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        """See ``Quantizer.stored_layout``."""

    @abstractmethod
    def quantize(self, parameter: Parameter, matrix: Tensor) -> dict[str, Tensor]:
        """Components of ``matrix``, ``[out, in]`` with any strides."""

    @abstractmethod
    def begin_slices(self, parameter: Parameter, device: torch.device) -> dict[str, Tensor]:
        """See ``Quantizer.begin_slices``."""

    @abstractmethod
    def quantize_slice(self, parameter: Parameter, rows: Tensor, start: int, parts: Mapping[str, Tensor]) -> None:
        """Quantize some rows of the matrix, ``[count, in]`` with any strides; ``start`` is the first one's index."""

    @abstractmethod
    def finish_slices(self, parameter: Parameter, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``Quantizer.finish_slices``."""

    @abstractmethod
    def dequantize(self, parameter: Parameter, components: Mapping[str, Tensor]) -> Tensor:
        """The matrix ``[out, in]`` again, in the format's own dtype."""

    @abstractmethod
    def new_module(self, out_features: int, in_features: int, *, bias: bool) -> nn.Module:
        """An empty layer on the meta device."""

    @abstractmethod
    def install(self, module: nn.Module, parameter: Parameter, components: Mapping[str, Tensor]) -> None:
        """Give ``module`` its weight."""

    @abstractmethod
    def components(self, module: nn.Module, parameter: Parameter) -> dict[str, Tensor]:
        """The stored tensors of ``module``'s weight; the reverse of ``install``."""


def require_components(
    parameter: Parameter, expected: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec], *, but: str = ""
) -> None:
    """Raise unless ``found`` is ``expected``, the component ``but`` aside.

    Raises:
        UnsupportedError: names the parameter and every component that is missing, surplus or different.
    """
    problems = [f"component {name!r} is missing, expected {expected[name]}" for name in expected.keys() - found.keys()]
    problems += [f"component {name!r} is not part of the format" for name in found.keys() - expected.keys()]
    problems += [
        f"component {name!r} is {found[name]}, expected {spec}"
        for name, spec in expected.items()
        if name in found and name != but and found[name] != spec
    ]
    if problems:
        raise UnsupportedError(f"{parameter.name}: " + "; ".join(sorted(problems)))
