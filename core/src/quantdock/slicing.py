"""Run one unit slice by slice: what is quantized never exists in full precision as a whole."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from quantdock.conversion import Index, Piece
from quantdock.pagecache import release
from quantdock.running import Runner, located
from quantdock.staging import Staging
from quantdock.units import Unit


class SlicedUnit:
    """A unit that is cut; its slices run in any order, several at once."""

    def __init__(self, unit: Unit, runner: Runner) -> None:
        assert unit.cut is not None
        assert unit.conversion is not None
        assert unit.conversion.assemblies is not None
        self.unit = unit
        (self._target,) = unit.targets
        assert self._target.decision.chosen is not None
        assert isinstance(self._target.device, torch.device), "what goes to the disk isn't cut"
        self._device = self._target.device
        self._quantizer = self._target.decision.chosen.quantizer
        self._pieces = unit.conversion.assemblies[self._target.parameter.name].pieces
        self._sources = {source.name: source for source in unit.sources}
        self._cut = unit.cut
        self._runner = runner
        self._lock = threading.Lock()
        self._left = unit.cut.count
        self._parts: dict[str, torch.Tensor] | None = None

    def will_need(self, start: int, stop: int) -> None:
        """Start reading what a slice is made from."""
        for piece in self._pieces:
            source = self._sources[piece.source]
            if self._cut.dim == 0 and piece.whole:
                row = source.stored_nbytes // max(1, self._cut.size)
                source.reader.will_need(source, start * row, (stop - start) * row)
            elif start <= _first(piece, self._cut.dim) < stop:
                source.reader.will_need(source)

    def run(self, start: int, stop: int, staging: Staging) -> bool:
        """Quantize a slice; the last one to be finished finishes the parameter.

        Returns:
            Whether this was the last one.

        Raises:
            LoadError: names file, stored tensors, parameter and plugin.
        """
        with located(self.unit, self._target), staging.on(self._device):
            parts = self._begun()
            name, recorder = self._target.parameter.name, self._runner.recorder
            stored, size = self.unit.stored_nbytes, self._cut.size
            share = stored * stop // size - stored * start // size
            mapped = self._cut.mapped
            with recorder.span("read", name, 0 if mapped else share):
                tensor = self._read(start, stop, staging)
            # Of a view of a mapped file, the pages are read here.
            with recorder.span("read", name, share if mapped else 0), recorder.span("quantize", name, tensor.nbytes):
                self._quantizer.quantize_slice(self._target.parameter, tensor, start, parts)
            if self._cut.mapped:
                release(tensor)
        with self._lock:
            self._left -= 1
            if self._left:
                return False
        with located(self.unit, self._target), staging.on(self._device):
            self._runner.install(self._target, self._quantizer.finish_slices(self._target.parameter, parts))
            self._parts = None
        return True

    def _begun(self) -> dict[str, torch.Tensor]:
        with self._lock:
            if self._parts is None:
                self._parts = self._quantizer.begin_slices(self._target.parameter, self._device)
            return self._parts

    def _read(self, start: int, stop: int, staging: Staging) -> torch.Tensor:
        """A slice in full precision, in the parameter's dtype and on its device."""
        spec, dim = self._target.parameter.spec, self._cut.dim
        if self._cut.mapped:
            return self._sources[self._pieces[0].source].read().narrow(dim, start, stop - start)
        shape = (*spec.shape[:dim], stop - start, *spec.shape[dim + 1 :])
        result = staging.empty(shape, spec.dtype, self._device)
        for piece in self._pieces:
            source = self._sources[piece.source]
            part = part_of(piece, dim, self._cut.size, start, stop)
            if part is not None:
                view = part.of(piece.of(source.read()))
                staging.copy(view, result[part.into], drop=source.reader.maps)
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a piece has of a slice: ``slice[into] = part.of(piece.of(source))``."""

    rows: Index
    """Of the piece."""
    into: Index

    def of(self, piece: torch.Tensor) -> torch.Tensor:
        """The part as a view of its piece."""
        return piece[self.rows]


def part_of(piece: Piece, dim: int, size: int, start: int, stop: int) -> Part | None:
    """What a piece has of the rows from ``start`` to ``stop`` of a target with ``size`` rows, if anything."""
    into = (*piece.into, *[slice(None)] * (dim + 1 - len(piece.into)))
    item = into[dim]
    if isinstance(item, int):  # the piece is a single row, and has no dimension for it
        inside = start <= item < stop
        return Part(rows=(), into=(*into[:dim], item - start, *into[dim + 1 :])) if inside else None
    first, last, _ = item.indices(size)
    begin, end = max(first, start), min(last, stop)
    if begin >= end:
        return None
    kept = sum(isinstance(other, slice) for other in into[:dim])  # the piece lacks the dimensions that integers pick
    return Part(
        rows=(*[slice(None)] * kept, slice(begin - first, end - first)),
        into=(*into[:dim], slice(begin - start, end - start), *into[dim + 1 :]),
    )


def _first(piece: Piece, dim: int) -> int:
    """The piece's first row in the target."""
    item = piece.into[dim] if dim < len(piece.into) else 0
    return item if isinstance(item, int) else (item.start or 0)
