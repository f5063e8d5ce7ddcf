"""Parameters that a checkpoint holds in several quantized pieces: the experts of a layer, stored one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantdock.conversion import Assembly, Conversion
from quantdock.errors import PluginError, UnsupportedError
from quantdock.quantizer import Quantizer
from quantdock.tensors import Parameter, StoredTensor, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What one parameter is put together from, as the checkpoint stores it."""

    conversion: Conversion
    stored: Mapping[str, Mapping[str, StoredTensor]]
    """Name of a piece, as if it were stored in full precision -> component -> stored tensor."""

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every stored tensor of every piece, by name."""
        return {tensor.name: tensor for parts in self.stored.values() for tensor in parts.values()}


@dataclass(frozen=True, kw_only=True)
class Joined:
    """How stored tensors become the components of one parameter."""

    assemblies: Mapping[str, Assembly]
    specs: Mapping[str, TensorSpec]
    """Component -> dtype and shape."""


def join(quantizer: Quantizer[Any], parameter: Parameter, pieces: Pieces) -> Joined:
    """Ask a quantizer to put the components of a parameter together, and hold it to what it says.

    Raises:
        UnsupportedError: it can't, or tensors of one component differ in their dtype; names them.
        PluginError: it leaves out a stored tensor, takes one twice, or leaves a part of a component unwritten.
    """
    assemblies = quantizer.assemble(parameter, pieces.stored)
    left = pieces.tensors
    specs = {}
    for component, assembly in assemblies.items():
        filled = 0
        dtype = None
        for piece in assembly.pieces:
            tensor = left.pop(piece.source, None)
            if tensor is None:
                raise PluginError(
                    f"{type(quantizer).__name__}.assemble takes {piece.source!r} twice, or from another parameter"
                )
            dtype = dtype or tensor.spec.dtype
            if tensor.spec.dtype != dtype:
                raise UnsupportedError(
                    f"{piece.source!r} is {tensor.spec}, but {assembly.pieces[0].source!r} is stored as "
                    f"{str(dtype).removeprefix('torch.')}; pieces of one parameter need the same dtype"
                )
            filled += tensor.spec.numel
        if dtype is None or filled != math.prod(assembly.shape):
            raise PluginError(
                f"{type(quantizer).__name__}.assemble fills {filled} elements of {component!r}, which has the shape "
                f"{list(assembly.shape)}"
            )
        specs[component] = TensorSpec(dtype=dtype, shape=assembly.shape)
    if left:
        raise PluginError(f"{type(quantizer).__name__}.assemble leaves out {next(iter(left))!r}")
    return Joined(assemblies=assemblies, specs=specs)
