"""How stored tensors become parameters: rename, stack, concatenate, split, transpose, or a function of a plugin's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from quantdock.tensors import TensorSpec

Index = tuple[slice | int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a parameter that is a part of one stored tensor, moved but not computed with.

    ``target[into] = source[part].permute(permute)``
    """

    source: str
    part: Index = ()
    into: Index = ()
    permute: tuple[int, ...] | None = None

    def of(self, source: torch.Tensor) -> torch.Tensor:
        """The piece as a view of its source."""
        view = source[self.part] if self.part else source
        return view if self.permute is None else view.permute(self.permute)

    @property
    def whole(self) -> bool:
        """Whether it is all of the source, untouched."""
        return not self.part and not self.into and self.permute is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """A parameter put together from pieces, each of which can be copied on its own."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How the stored tensors ``sources`` become the parameters ``targets``.

    Either ``assemblies`` says it as data, parameter by parameter, or ``function`` computes all targets at once from
    all sources as they are stored; the core then casts each result to its parameter's dtype.
    """

    sources: tuple[str, ...]
    targets: Mapping[str, TensorSpec]
    """Parameter -> the dtype and shape that the conversion yields."""
    assemblies: Mapping[str, Assembly] | None = None
    function: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None
    label: str
    """For the plan: ``rename``, ``stack``, ``concatenate``, ..."""

    @property
    def is_rename(self) -> bool:
        """Whether one stored tensor is one parameter as it is."""
        return self.assemblies is not None and all(
            len(assembly.pieces) == 1 and assembly.pieces[0].whole for assembly in self.assemblies.values()
        )


def rename(stored: str, parameter: str, spec: TensorSpec) -> Conversion:
    """One stored tensor, described by ``spec``, is one parameter."""
    return Conversion(
        sources=(stored,),
        targets={parameter: spec},
        assemblies={parameter: Assembly(shape=spec.shape, pieces=(Piece(source=stored),))},
        label="rename",
    )
