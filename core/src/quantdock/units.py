"""Units: the smallest pieces of work that yield finished parameters, and the bytes each has in flight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from quantdock.checkpoint import Checkpoint
from quantdock.conversion import Assembly, Conversion
from quantdock.deciding import Decision
from quantdock.joining import Joined, Pieces
from quantdock.layout import Slices
from quantdock.ledger import Action
from quantdock.matching import Match
from quantdock.placement import DISK, Placement
from quantdock.tensors import Parameter, StoredTensor

SLICE = 16 << 20
"""Bytes copied at a time when a tensor is cast or moved into place, and quantized at a time where that can be done in
slices."""

STAGING = 2 * SLICE
"""Pinned bytes through which one worker copies to one CUDA device: one half fills while the other travels."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One parameter that a unit finishes."""

    parameter: Parameter
    action: Action
    decision: Decision
    device: torch.device | str
    """A device, or ``"disk"``."""


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """Bytes that are neither in the file nor in the model, at the most."""

    host: int = 0
    device: int = 0
    """On the target's device, where that isn't the CPU."""

    @property
    def total(self) -> int:
        """On both."""
        return self.host + self.device


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A unit's one parameter, cut along ``dim`` into slices of ``rows`` rows; the last may be shorter."""

    dim: int
    rows: int
    size: int
    """Rows in all."""
    each: InFlight
    """What one slice has in flight."""
    mapped: bool
    """Whether slices are quantized right from the mapped file, without being copied first."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """First row, and the one after the last, of each slice."""
        for start in range(0, self.size, self.rows):
            yield start, min(start + self.rows, self.size)

    @property
    def count(self) -> int:
        """Number of slices."""
        return -(-self.size // self.rows)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Stored tensors in, finished parameters out."""

    sources: tuple[StoredTensor, ...]
    targets: tuple[Target, ...]
    conversion: Conversion | None
    """``None`` when ``sources`` are the components of one parameter that is stored quantized, or parts of them."""
    components: tuple[str, ...] = ()
    """Component names of ``sources``, in their order."""
    joined: Joined | None = None
    """How components are put together from ``sources``, where each isn't one of them."""
    own: InFlight
    """What is in flight from the unit's beginning to its end; of one that is cut, each slice comes on top."""
    cut: Cut | None = None
    """How the unit runs in slices; ``None`` for as a whole."""

    @property
    def device(self) -> torch.device | str:
        """Where all of its targets go."""
        return self.targets[0].device

    @property
    def in_flight(self) -> int:
        """Bytes in flight, at the least that the unit can run with."""
        return self.own.total + (0 if self.cut is None else self.cut.each.total)

    @property
    def most_in_flight(self) -> int:
        """Bytes in flight when all of its slices run at once."""
        return self.own.total + (0 if self.cut is None else self.cut.count * self.cut.each.total)

    @property
    def stored_nbytes(self) -> int:
        """Bytes read from files."""
        return sum(source.stored_nbytes for source in self.sources)


def make_units(match: Match, checkpoint: Checkpoint, placement: Placement, *, whole: bool = False) -> list[Unit]:
    """All units of a load, in file order.

    Args:
        match: what is loaded from what.
        checkpoint: the files.
        placement: the devices.
        whole: cut no unit into slices, because somebody wants to see ``quantize_param`` called for each.
    """
    order = {file: index for index, file in enumerate(checkpoint.files)}
    units = [_conversion_unit(conversion, match, checkpoint, placement, whole) for conversion in match.conversions]
    units += [_stored_unit(name, parts, match, placement) for name, parts in match.components.items()]
    units += [_joined_unit(name, pieces, match, placement) for name, pieces in match.pieces.items()]
    return sorted(units, key=lambda unit: min((order[source.file], source.offset) for source in unit.sources))


def _stored_unit(name: str, parts: Mapping[str, StoredTensor], match: Match, placement: Placement) -> Unit:
    target = _stored_target(name, match, placement)
    sources = tuple(parts.values())
    if target.device in (_CPU, DISK):
        host = sum(source.reader.working_bytes(source) for source in sources if not source.reader.maps)
    else:
        host = STAGING + max((_touched(source) for source in sources), default=0)
    return Unit(sources=sources, targets=(target,), conversion=None, components=tuple(parts), own=InFlight(host=host))


def _joined_unit(name: str, pieces: Pieces, match: Match, placement: Placement) -> Unit:
    target = _stored_target(name, match, placement)
    sources = tuple(pieces.tensors.values())
    host = max(map(_touched, sources)) + (STAGING if target.device not in (_CPU, DISK) else 0)
    joined = target.decision.joined
    assert joined is not None
    return Unit(
        sources=sources,
        targets=(target,),
        conversion=None,
        components=tuple(joined.specs),
        joined=joined,
        own=InFlight(host=host),
    )


def _stored_target(name: str, match: Match, placement: Placement) -> Target:
    return Target(
        parameter=match.parameters[name],
        action="stored",
        decision=match.decisions[name],
        device=placement.device_of(name),
    )


def _conversion_unit(
    conversion: Conversion, match: Match, checkpoint: Checkpoint, placement: Placement, whole: bool
) -> Unit:
    sources = tuple(checkpoint.tensors[name] for name in conversion.sources)
    targets = tuple(
        _target(match.parameters[name], match.decisions[name], conversion, sources, placement.device_of(name))
        for name in conversion.targets
    )
    cut = None if whole else _cut(conversion, sources, targets)
    if cut is None:
        own = _in_flight(conversion, sources, targets)
    else:
        own = _on(targets[0].device, _slices(targets[0]).held_bytes)
    return Unit(sources=sources, targets=targets, conversion=conversion, own=own, cut=cut)


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
    elif sources[0].reader.maps and sources[0].spec == parameter.spec and device == _CPU:
        action = "map"
    return Target(parameter=parameter, action=action, decision=decision, device=device)


def _on(device: torch.device | str, nbytes: int) -> InFlight:
    """Bytes beside a parameter, wherever that goes."""
    return InFlight(host=nbytes) if device in (_CPU, DISK) else InFlight(device=nbytes)


def _touched(source: StoredTensor) -> int:
    """Bytes of memory that reading a source takes: mapped ones are let go of slice by slice, others are read whole."""
    return min(SLICE, source.spec.nbytes) if source.reader.maps else source.reader.working_bytes(source)


# In slices ------------------------------------------------------------------------------------------------------------


def _slices(target: Target) -> Slices:
    assert target.decision.layout is not None
    assert target.decision.layout.slices is not None, "only such targets are cut"
    return target.decision.layout.slices


def _cut(conversion: Conversion, sources: Sequence[StoredTensor], targets: Sequence[Target]) -> Cut | None:
    """How to run a unit in slices, if its quantizer can do that and the parameter is large enough for it."""
    target, layout = targets[0], targets[0].decision.layout
    if len(targets) > 1 or conversion.assemblies is None or layout is None or layout.slices is None:
        return None
    if target.device == DISK or not all(source.reader.maps for source in sources):
        return None
    slices, spec = layout.slices, target.parameter.spec
    size = spec.shape[slices.dim]
    row = spec.nbytes // max(1, size)
    rows = max(1, SLICE // max(1, row) // slices.multiple) * slices.multiple
    if rows >= size:
        return None
    (assembly,) = conversion.assemblies.values()
    first = assembly.pieces[0]
    mapped = target.device == _CPU and len(assembly.pieces) == 1 and first.whole and sources[0].spec == spec
    working = slices.working_bytes + slices.working_copies * rows * row
    if target.device != _CPU:
        each = InFlight(host=STAGING + SLICE, device=rows * row + working)
    elif mapped:
        each = InFlight(host=_pages(target.parameter, slices.dim, rows * row) + working)
    else:
        each = InFlight(host=rows * row + SLICE + working)
    return Cut(dim=slices.dim, rows=rows, size=size, each=each, mapped=mapped)


def _pages(parameter: Parameter, dim: int, nbytes: int) -> int:
    """Bytes of the pages that a mapped slice lies in: two more for each run of neighbouring elements."""
    runs = parameter.spec.numel // max(1, torch.Size(parameter.spec.shape[dim:]).numel())
    return min(parameter.spec.nbytes, nbytes + 8192 * runs)


# As a whole -----------------------------------------------------------------------------------------------------------


def _in_flight(conversion: Conversion, sources: Sequence[StoredTensor], targets: Sequence[Target]) -> InFlight:
    """Upper bound of the unit's bytes outside of the model; what is copied in slices counts a slice."""
    by_name = {source.name: source for source in sources}
    if conversion.function is not None:
        # Everything at once: all sources, the function's results, and room for what it makes on the way.
        whole = sum(source.reader.working_bytes(source) for source in sources)
        results = sum(target.parameter.spec.numel * _widest(sources) for target in targets)
        finishing = _on(targets[0].device, max(map(_quantizing, targets)))
        return InFlight(host=whole + 2 * results + finishing.host, device=finishing.device)
    assert conversion.assemblies is not None
    parts = [_one(target, conversion.assemblies[target.parameter.name], by_name) for target in targets]
    return InFlight(host=max(part.host for part in parts), device=max(part.device for part in parts))


def _widest(sources: Sequence[StoredTensor]) -> int:
    return max((source.spec.dtype.itemsize for source in sources), default=4)


def _one(target: Target, assembly: Assembly, sources: Mapping[str, StoredTensor]) -> InFlight:
    """Of one target that is put together from pieces."""
    if target.action == "map":
        return InFlight()
    reading = max((_touched(sources[piece.source]) for piece in assembly.pieces), default=0)
    spec = target.parameter.spec
    if target.device == DISK:
        return InFlight(host=reading + spec.nbytes)
    if target.device != _CPU:
        reading += STAGING
    # The full-precision tensor: a view of the map, or assembled and cast.
    quantizing = _on(target.device, 0 if target.action != "quantize" else spec.nbytes + _quantizing(target))
    return InFlight(host=reading + quantizing.host, device=quantizing.device)


def _quantizing(target: Target) -> int:
    return 0 if target.decision.layout is None else target.decision.layout.working_bytes
