"""Experts that checkpoints store one by one, as linear layers, and architectures have in one parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from quantdock.conversion import Assembly, Piece
from quantdock.errors import SaveError, UnsupportedError
from quantdock.tensors import Parameter, StoredTensor, TensorSpec

_LEAF = ".weight"


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Which linear layers make up a parameter ``[experts, outputs, inputs]``.

    Components of the parameter are those of the layers, stacked: ``[experts, parts, ...]``, called by the parameter's
    leaf and the layers' component: ``gate_up_proj_scales``. So no format has to say how its tensors are joined, and
    what is saved is what was read.
    """

    names: tuple[tuple[str, ...], ...]
    """Of each expert, the stored names of its weights, from the first rows on (a gate, then what is beside it)."""
    shape: tuple[int, int]
    """``[outputs, inputs]`` of each."""

    @classmethod
    def of(cls, parameter: Parameter, assembly: Assembly | None) -> Experts | None:
        """
        Args:
            parameter: any.
            assembly: what it is put together from, as ``Quantizer.assemblies`` has it.

        Returns:
            ``None`` when that isn't weights of linear layers as they are, for each expert as many rows from each.
        """
        shape = parameter.spec.shape
        if assembly is None or len(shape) != 3 or not parameter.spec.numel:
            return None
        found: dict[tuple[int, int], str] = {}
        sizes = set()
        for piece in assembly.pieces:
            place = (*piece.into, slice(None)) if len(piece.into) == 1 else piece.into
            if piece.part or piece.permute is not None or len(place) != 2 or not piece.source.endswith(_LEAF):
                return None
            expert, rows = place
            if not isinstance(expert, int) or not isinstance(rows, slice):
                return None
            start, stop, _ = rows.indices(shape[1])
            found[expert, start] = piece.source
            sizes.add(stop - start)
        size = max(sizes, default=0)
        if len(sizes) != 1 or size < 1:
            return None
        starts = range(0, shape[1], size)
        if found.keys() != {(expert, start) for expert in range(shape[0]) for start in starts}:
            return None
        names = tuple(tuple(found[expert, start] for start in starts) for expert in range(shape[0]))
        return cls(names=names, shape=(size, shape[2]))

    @property
    def parts(self) -> int:
        """Layers of each expert."""
        return len(self.names[0])

    @property
    def whole(self) -> tuple[int, int, int]:
        """``[experts, outputs, inputs]`` of the parameter."""
        return len(self.names), self.parts * self.shape[0], self.shape[1]

    @property
    def modules(self) -> list[str]:
        """Paths of the linear layers, as they are stored."""
        return [name.removesuffix(_LEAF) for names in self.names for name in names]

    def stacked(self, leaf: str, components: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The components of the parameter, from those of one layer."""
        lead = (len(self.names), self.parts)
        return {
            f"{leaf}_{name}": TensorSpec(dtype=spec.dtype, shape=(*lead, *spec.shape))
            for name, spec in components.items()
        }

    def room(self, components: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Uninitialised tensors for the components of all layers, from those of one: ``[experts, parts, ...]``."""
        lead = (len(self.names), self.parts)
        return {name: tensor.new_empty((*lead, *tensor.shape)) for name, tensor in components.items()}

    def unstacked(self, leaf: str, components: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """What ``stacked`` undoes."""
        return {
            name.removeprefix(f"{leaf}_"): TensorSpec(dtype=spec.dtype, shape=spec.shape[2:])
            for name, spec in components.items()
        }

    def assemble(
        self,
        leaf: str,
        pieces: Mapping[str, Mapping[str, StoredTensor]],
        check: Callable[[str, Mapping[str, TensorSpec]], object],
    ) -> dict[str, Assembly]:
        """See ``Quantizer.assemble``.

        Args:
            leaf: of the parameter.
            pieces: stored name of a weight -> component -> stored tensor.
            check: called with a weight's name and its components; raises when they don't fit the format.

        Raises:
            UnsupportedError: layers differ in their components, names two that do; or what ``check`` raises.
        """
        first: Mapping[str, TensorSpec] = {}
        made: dict[str, list[Piece]] = {}
        for expert, names in enumerate(self.names):
            for part, name in enumerate(names):
                specs = {component: tensor.spec for component, tensor in pieces[name].items()}
                if specs != first:
                    check(name, specs)
                    if first:
                        raise UnsupportedError(
                            f"{name!r} is stored as {_listed(specs)}, but {self.names[0][0]!r} as {_listed(first)}; "
                            "pieces of one parameter have to be alike"
                        )
                    first = specs
                for component, tensor in pieces[name].items():
                    made.setdefault(component, []).append(Piece(source=tensor.name, into=(expert, part)))
        return {
            stacked: Assembly(shape=spec.shape, pieces=tuple(made[component]))
            for component, (stacked, spec) in zip(first, self.stacked(leaf, first).items(), strict=True)
        }


def disassemble(parameter: Parameter, exported: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """See ``Quantizer.disassemble``; for components that are stacked as ``Experts`` has them.

    Raises:
        SaveError: the architecture doesn't cut up a component as it was put together.
    """
    result = {}
    for component, tensors in exported.items():
        for name, tensor in tensors.items():
            if not name.endswith(_LEAF) or tensor.shape[0] != 1:
                raise SaveError(
                    f"{name!r} can't be saved: it is a part of {parameter.name!r}, and the architecture stores that "
                    "other than one by one; dequantize(model) first"
                )
            result[name.removesuffix("weight") + component.removeprefix(f"{parameter.leaf}_")] = tensor[0]
    return result


def _listed(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{name} {spec}" for name, spec in sorted(specs.items()))
