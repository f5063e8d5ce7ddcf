"""Experts that are stored one by one: how their codes and scales make up those of all experts of a layer, and back.

A scale of an expert is put beside those of its siblings along the rows: ``[down, across]`` of each of ``parts`` pieces
of each of ``experts`` becomes ``[experts, parts * down, across]``, and what is one number ``[experts, parts]``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from quantdock import Assembly, Parameter, Piece, SaveError, StoredTensor, TensorSpec, UnsupportedError
from quantdock_fp8.scheme import Scheme, component_of
from quantdock_fp8.tiling import Shape, Tiling

_ONE: tuple[Shape, ...] = ((), (1,))


def parts_of(assembly: Assembly, shape: Shape) -> int | None:
    """How many ranges of rows of each expert's matrix are pieces of their own.

    Args:
        assembly: what the parameter is put together from.
        shape: ``[experts, rows, columns]``, or that of a linear layer.

    Returns:
        0 for a linear layer; ``None`` when the pieces are others than rows of the same number each.
    """
    if len(shape) != 3:
        return 0
    starts = set()
    for piece in assembly.pieces:
        rows = piece.into[1] if len(piece.into) > 1 else slice(None)
        if not isinstance(rows, slice) or piece.into[2:]:
            return None
        start, stop, _ = rows.indices(shape[1])
        starts.add((start, stop))
    size = min(stop - start for start, stop in starts)
    if size < 1 or starts != {(start, start + size) for start in range(0, shape[1], size)}:
        return None
    return len(starts)


def assemble(
    parameter: Parameter, assembly: Assembly, pieces: Mapping[str, Mapping[str, StoredTensor]], scheme: Scheme
) -> dict[str, Assembly]:
    """See ``Quantizer.assemble``."""
    shape = parameter.spec.shape
    parts = parts_of(assembly, shape)
    if len(shape) != 3 or not parts:
        raise UnsupportedError(f"{parameter.name}: only experts that are stored one by one can be put together")
    rows = shape[1] // parts
    first: Mapping[str, TensorSpec] = {}
    made: dict[str, list[Piece]] = {}
    for piece in assembly.pieces:
        found = pieces[piece.source]
        specs = {name: tensor.spec for name, tensor in found.items()}
        if specs != first:
            _check(piece, specs, first, (rows, shape[2]), scheme)
            first = specs
        place = piece.into[1] if len(piece.into) > 1 else slice(0, rows)
        part = (place.start or 0) // rows if isinstance(place, slice) else 0
        for name, spec in specs.items():
            into = piece.into if name == scheme.codes_name else (piece.into[0], _rows(spec, part))
            made.setdefault(name, []).append(Piece(source=found[name].name, into=into))
    return {
        component_of(name, parameter.leaf): Assembly(
            shape=_joined(first[name].shape, shape[0], parts), pieces=tuple(placed)
        )
        for name, placed in made.items()
    }


def _check(
    piece: Piece, specs: Mapping[str, TensorSpec], first: Mapping[str, TensorSpec], shape: Shape, scheme: Scheme
) -> None:
    if piece.part or piece.permute is not None or not (piece.into and isinstance(piece.into[0], int)):
        raise UnsupportedError(f"{piece.source!r} isn't a part of one expert as it is stored")
    weight = TensorSpec(dtype=next(iter(specs.values())).dtype, shape=shape)
    scheme.stored(Parameter(name=piece.source, spec=weight, module_type=nn.Linear), specs)
    if first and specs != first:
        raise UnsupportedError(
            f"{piece.source!r} is stored as {_listed(specs)}, but another piece as {_listed(first)}; pieces of one "
            "parameter have to be alike"
        )


def _listed(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{name} {spec}" for name, spec in specs.items())


def _rows(spec: TensorSpec, part: int) -> slice | int:
    if spec.shape in _ONE:
        return part
    return slice(part * spec.shape[0], (part + 1) * spec.shape[0])


def _joined(shape: Shape, experts: int, parts: int) -> Shape:
    return (experts, parts, *shape) if shape in _ONE else (experts, parts * shape[0], *shape[1:])


def disassemble(
    parameter: Parameter,
    exported: Mapping[str, Mapping[str, Tensor]],
    *,
    codes: str,
    companions: Mapping[str, str],
    tiling: Tiling,
    single: Collection[str],
) -> dict[str, Tensor]:
    """See ``Quantizer.disassemble``.

    Args:
        parameter: which one.
        exported: component -> name of a piece -> its part.
        codes: the component with the codes, which any piece has.
        companions: component -> what it is called beside the ``weight`` of a piece.
        tiling: which elements of an expert's matrix share a scale.
        single: components that are one number for each piece.

    Raises:
        SaveError: the architecture doesn't cut up scales as it does codes.
    """
    weights = exported[codes]
    result = {}
    for component, tensors in exported.items():
        for piece, tensor in tensors.items():
            if piece == parameter.name or not piece.endswith(".weight"):
                result[piece + component.removeprefix(parameter.leaf)] = tensor
                continue
            rows = weights[piece].shape[0] if piece in weights else 0
            if tensors.keys() != weights.keys() or (
                rows % tiling.block[0] and rows != parameter.spec.shape[1] // tiling.parts
            ):
                raise SaveError(
                    f"{piece!r} can't be saved: it is a part of {parameter.name!r}, and has no scales of its own in "
                    f"{component!r}; dequantize(model) first"
                )
            stored = piece.removesuffix("weight") + companions[component]
            result[stored] = tensor.reshape(tensor.shape[1:]) if component in single else tensor
    return result
