"""What a load is going to calibrate, decided before a weight is read: which blocks, with what data, in what memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantdock.architecture import Blocks, Skeleton
from quantdock.calibration.data import Batches, make_batches
from quantdock.errors import CalibrationError, ConfigError
from quantdock.matching import Match
from quantdock.placement import Placement
from quantdock.registry import Chosen, Selection
from quantdock.source import Source
from quantdock.tables import format_bytes
from quantdock.tensors import Parameter

logger = logging.getLogger("quantdock")

_WIDEST = 4
"""Bytes per element: parts of a block compute in float32, whatever the model's dtype is."""


@dataclass(frozen=True, kw_only=True)
class Calibrating:
    """The calibration of one load."""

    blocks: Blocks
    batches: Batches
    chosen: Sequence[Chosen]
    """The quantizers that take part."""
    parameters: Mapping[str, Mapping[str, Parameter]]
    """Path of a block -> the parameters in it that are calibrated, by name; every block has an entry."""
    itemsize: int
    """Of the model's dtype."""

    @cached_property
    def names(self) -> frozenset[str]:
        """Of all calibrated parameters."""
        return frozenset(name for found in self.parameters.values() for name in found)

    @property
    def hidden_size(self) -> int:
        """Features of the hidden states; where nobody knows, the most inputs or outputs that a calibrated layer has."""
        return self.blocks.hidden_size or max(
            max(p.spec.shape) for found in self.parameters.values() for p in found.values()
        )

    @property
    def input_nbytes(self) -> int:
        """Bytes of what is kept of the samples: hidden states, masks and position embeddings."""
        shared = sum(
            samples * tokens * (_WIDEST * tokens + 2 * _WIDEST * self.hidden_size)
            for samples, tokens in self.batches.shapes
        )
        return self.batches.rows * self.hidden_size * self.itemsize + shared

    @cached_property
    def block_nbytes(self) -> int:
        """Bytes that one block takes at the most: its weights in full precision, its activations, and what quantizers
        allocate."""
        return max(self._of_block(list(found.values())) for found in self.parameters.values())

    @property
    def nbytes(self) -> int:
        """Bytes beside the model, and beside what the engine has in flight."""
        return self.input_nbytes + self.block_nbytes

    def _of_block(self, parameters: Sequence[Parameter]) -> int:
        weights = sum(parameter.spec.nbytes for parameter in parameters)
        largest = max(
            (parameter.spec.nbytes for parameter in parameters), default=0
        )  # dequantized, beside the original
        features = sum(sum(parameter.spec.shape) for parameter in parameters) + 8 * self.hidden_size
        working = max(
            chosen.quantizer.calibration_bytes(
                [one for one in parameters if one.name in chosen.quantizer.parameters], self.batches.largest
            )
            for chosen in self.chosen
        )
        return weights + 2 * largest + self.batches.largest * features * _WIDEST + working

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "blocks": len(self.blocks.paths),
            "parameters": len(self.names),
            "samples": self.batches.samples,
            "batches": len(self.batches.inputs),
            "tokens": self.batches.rows,
            "input_nbytes": self.input_nbytes,
            "block_nbytes": self.block_nbytes,
        }

    def __str__(self) -> str:
        return (
            f"calibration: {len(self.names)} parameters of {len(self.blocks.paths)} blocks, {self.batches.samples} "
            f"samples of {self.batches.rows} tokens; keeps {format_bytes(self.input_nbytes)} of inputs, and needs "
            f"{format_bytes(self.block_nbytes)} for one block in full precision"
        )


def prepare(skeleton: Skeleton, match: Match, selection: Selection, source: Source) -> Calibrating | None:
    """The calibration that the quantizers of a load ask for; ``None`` if none does.

    Raises:
        ConfigError: what is to be calibrated doesn't lie in a block, or two quantizers want different data.
        CalibrationError: the data doesn't fit the model, or the model has no blocks.
    """
    asked = [
        (chosen, data)
        for chosen in selection
        if chosen.quantizer.parameters and (data := chosen.quantizer.calibration()) is not None
    ]
    if not asked:
        return None
    model = skeleton.model
    blocks = skeleton.architecture.blocks(model)
    if not blocks.paths:
        raise CalibrationError(
            f"{type(model).__name__} has no list of blocks that run one after another, so it can't be calibrated; "
            "use a method that needs no data"
        )
    chosen = [one for one, _ in asked]
    parameters = _by_block(blocks, chosen)
    made = [make_batches(data, skeleton.architecture, blocks, source) for _, data in asked]
    if not all(batches.equals(made[0]) for batches in made[1:]):
        raise ConfigError(
            f"{' and '.join(one.label for one in chosen)} are given different calibration data; give all configs "
            "the same"
        )
    calibrating = Calibrating(
        blocks=blocks,
        batches=made[0],
        chosen=chosen,
        parameters=parameters,
        itemsize=max(match.parameters[name].spec.dtype.itemsize for found in parameters.values() for name in found),
    )
    widest = max(max(p.spec.shape) for found in parameters.values() for p in found.values())
    if calibrating.batches.rows < widest:
        logger.warning(
            "calibration: %s tokens are few for layers of up to %s inputs; take more or longer samples",
            calibrating.batches.rows,
            widest,
        )
    return calibrating


def check_placement(calibrating: Calibrating | None, placement: Placement) -> None:
    """Calibration runs the model before it is dispatched, so on one device.

    Raises:
        CalibrationError: there are several.
    """
    if calibrating is not None and placement.single is None:
        devices = ", ".join(sorted(set(map(str, placement.device_map.values()))))
        raise CalibrationError(
            f"device_map puts the model on {devices}, and calibration runs on one device; calibrate on one, save, and "
            "load the result on several"
        )


def _by_block(blocks: Blocks, chosen: Sequence[Chosen]) -> dict[str, dict[str, Parameter]]:
    found: dict[str, dict[str, Parameter]] = {path: {} for path in blocks.paths}
    outside = []
    for one in chosen:
        for name, parameter in one.quantizer.parameters.items():
            path = _block_of(name, found)
            if path is None:
                outside.append(name)
            else:
                found[path][name] = parameter
    if outside:
        raise ConfigError(
            f"{', '.join(map(repr, outside[:5]))}{', ...' if len(outside) > 5 else ''} can't be calibrated: not in one "
            f"of the blocks {blocks.paths[0]} to {blocks.paths[-1]}, which is where activations are looked at. "
            f"Leave it out (skip={outside[:2]!r}), or give it a config of its own that needs no data, before this one "
            "in quantize="
        )
    return found


def _block_of(name: str, paths: Mapping[str, Any]) -> str | None:
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in paths:
            return path
    return None
