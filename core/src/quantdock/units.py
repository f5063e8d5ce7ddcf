"""Units: the smallest pieces of work that yield finished parameters, and the bytes each has in flight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quantdock.checkpoint import Checkpoint
from quantdock.conversion import Assembly, Conversion
from quantdock.deciding import Decision
from quantdock.ledger import Action
from quantdock.matching import Match
from quantdock.placement import DISK, Placement
from quantdock.tensors import Parameter, StoredTensor

SLICE = 8 << 20
"""Bytes copied at a time when a tensor is cast or moved into place."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One parameter that a unit finishes."""

    parameter: Parameter
    action: Action
    decision: Decision
    device: torch.device | str
    """A device, or ``"disk"``."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Stored tensors in, finished parameters out."""

    sources: tuple[StoredTensor, ...]
    targets: tuple[Target, ...]
    conversion: Conversion | None
    """``None`` when ``sources`` are the components of one parameter that is stored quantized."""
    components: tuple[str, ...] = ()
    """Component names of ``sources``, in their order."""
    in_flight: int
    """Bytes that are neither in the file nor in the model while the unit runs, at the most."""

    @property
    def stored_nbytes(self) -> int:
        """Bytes read from files."""
        return sum(source.stored_nbytes for source in self.sources)


def make_units(match: Match, checkpoint: Checkpoint, placement: Placement) -> list[Unit]:
    """All units of a load, in file order."""
    order = {file: index for index, file in enumerate(checkpoint.files)}
    units = [_conversion_unit(conversion, match, checkpoint, placement) for conversion in match.conversions]
    units += [_stored_unit(name, parts, match, placement) for name, parts in match.components.items()]
    return sorted(units, key=lambda unit: min((order[source.file], source.offset) for source in unit.sources))


def _stored_unit(name: str, parts: Mapping[str, StoredTensor], match: Match, placement: Placement) -> Unit:
    target = Target(
        parameter=match.parameters[name],
        action="stored",
        decision=match.decisions[name],
        device=placement.device_of(name),
    )
    sources = tuple(parts.values())
    moved = target.device != torch.device("cpu")
    in_flight = sum(source.reader.working_bytes(source) for source in sources if moved or not source.reader.maps)
    return Unit(sources=sources, targets=(target,), conversion=None, components=tuple(parts), in_flight=in_flight)


def _conversion_unit(conversion: Conversion, match: Match, checkpoint: Checkpoint, placement: Placement) -> Unit:
    sources = tuple(checkpoint.tensors[name] for name in conversion.sources)
    targets = tuple(
        _target(match.parameters[name], match.decisions[name], conversion, sources, placement.device_of(name))
        for name in conversion.targets
    )
    return Unit(
        sources=sources, targets=targets, conversion=conversion, in_flight=_in_flight(conversion, sources, targets)
    )


def _target(
    parameter: Parameter,
    decision: Decision,
    conversion: Conversion,
    sources: Sequence[StoredTensor],
    device: torch.device | str,
) -> Target:
    action: Action = "copy"
    if decision.chosen is not None:
        action = "quantize"
    elif not conversion.is_rename:
        action = "convert"
    elif sources[0].reader.maps and sources[0].spec == parameter.spec and device == torch.device("cpu"):
        action = "map"
    return Target(parameter=parameter, action=action, decision=decision, device=device)


def _in_flight(conversion: Conversion, sources: Sequence[StoredTensor], targets: Sequence[Target]) -> int:
    """Upper bound of the unit's bytes outside of the model; what is copied in slices counts a slice."""
    by_name = {source.name: source for source in sources}
    if conversion.function is not None:
        # Everything at once: all sources, the function's results, and room for what it makes on the way.
        whole = sum(source.reader.working_bytes(source) for source in sources)
        results = sum(target.parameter.spec.numel * _widest(sources) for target in targets)
        return whole + 2 * results + _finishing(targets)
    assert conversion.assemblies is not None
    total = 0
    for target in targets:
        reading = _reading(conversion.assemblies[target.parameter.name], by_name)
        total = max(total, reading + _extra(target, conversion, by_name))
    return total


def _widest(sources: Sequence[StoredTensor]) -> int:
    return max((source.spec.dtype.itemsize for source in sources), default=4)


def _reading(assembly: Assembly, sources: Mapping[str, StoredTensor]) -> int:
    pieces = [sources[piece.source] for piece in assembly.pieces]
    # Mapped sources are touched a slice at a time and let go of; others are read whole, one after the other.
    return max((SLICE if s.reader.maps else s.reader.working_bytes(s) for s in pieces), default=0)


def _extra(target: Target, conversion: Conversion, sources: Mapping[str, StoredTensor]) -> int:
    spec = target.parameter.spec
    if target.action == "map":
        return -SLICE  # nothing is touched
    if target.device == DISK:
        return spec.nbytes
    if target.action != "quantize":
        return 0
    assert target.decision.layout is not None
    # The full-precision tensor: a view of the map, or assembled and cast.
    return spec.nbytes + target.decision.layout.working_bytes


def _finishing(targets: Sequence[Target]) -> int:
    return max(
        (target.decision.layout.working_bytes for target in targets if target.decision.layout is not None), default=0
    )
