"""Calibrate a model block by block, while it loads.

Everything else is in place by now. For each block in turn: its swapped modules make way for the originals, the engine
reads their weights in full precision, the quantizers look at what flows through the block and quantize, the swapped
modules come back with the result. What the block then makes of its inputs, with dequantized weights, is the next
block's input. So a single block is in full precision at a time.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantdock.calibration.block import CalibrationBlock
from quantdock.calibration.capturing import Call, Captured, capture
from quantdock.calibration.preparing import Calibrating
from quantdock.deciding import Decision
from quantdock.engine import Engine, amounts
from quantdock.errors import CalibrationError, PluginError, QuantdockError
from quantdock.ledger import Ledger
from quantdock.pagecache import release
from quantdock.registry import Chosen
from quantdock.running import check_components, install_plain
from quantdock.tensors import Parameter
from quantdock.units import Target, Unit, make_units

if TYPE_CHECKING:
    from quantdock.planning import Plan

logger = logging.getLogger("quantdock")

Components = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What a calibration did, for the report."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> what its quantizer had to say of it."""


def units_before(plan: Plan, engine: Engine) -> Sequence[Unit]:
    """What the engine runs before the calibration: everything that isn't calibrated."""
    units, calibrating = plan.cached.units(plan.units), plan.calibrating
    if calibrating is None:
        return units
    before = _only(units, lambda name: name not in calibrating.names)
    nbytes, parameters = amounts(plain_units(plan, calibrating))
    engine.expected = (amounts(before)[0] + nbytes, amounts(before)[1] + parameters)
    return before


def _only(units: Sequence[Unit], wanted: Callable[[str], bool]) -> list[Unit]:
    """Units with those of their targets that are wanted."""
    result = []
    for unit in units:
        targets = tuple(target for target in unit.targets if wanted(target.parameter.name))
        if targets:
            result.append(unit if len(targets) == len(unit.targets) else dataclasses.replace(unit, targets=targets))
    return result


def plain_units(plan: Plan, calibrating: Calibrating) -> list[Unit]:
    """Units that put the calibrated parameters into the model in full precision."""
    decisions = {
        name: Decision() if name in calibrating.names else decision for name, decision in plan.match.decisions.items()
    }
    made = make_units(dataclasses.replace(plan.match, decisions=decisions), plan.checkpoint, plan.placement)
    return _only(made, lambda name: name in calibrating.names)


@torch.no_grad()
def calibrate(plan: Plan, engine: Engine) -> Calibrated:
    """Run the calibration of a plan, if it has one, when all other parameters are in place.

    Args:
        plan: the load; it is finished here, as the model has to run.
        engine: reads weights.

    Raises:
        CalibrationError, LoadError: names block and parameter.
    """
    calibrating = plan.calibrating
    if calibrating is None:
        return Calibrated()
    plan.finish()
    model = plan.skeleton.model.eval()
    device = plan.placement.single
    assert device is not None, "check_placement has seen to it"
    captured = capture(model, calibrating.blocks, calibrating.batches.inputs, device)
    kept = captured.nbytes
    logger.info("calibration: %s bytes of inputs for %s blocks", kept, len(calibrating.blocks.paths))
    run = _Run(plan=plan, calibrating=calibrating, engine=engine, captured=captured)
    for path in calibrating.blocks.paths:
        run.block(path)
    facts = calibrating.to_dict()
    return Calibrated(facts=facts | {"input_nbytes": kept}, notes=run.notes)


@dataclass(kw_only=True)
class _Run:
    plan: Plan
    calibrating: Calibrating
    engine: Engine
    captured: Captured
    notes: dict[str, str] = field(default_factory=dict)
    _plain: dict[str, list[Unit]] = field(init=False)
    """Path of a block -> the units of its calibrated parameters, in full precision."""
    _targets: dict[str, Target] = field(init=False)

    def __post_init__(self) -> None:
        units = plain_units(self.plan, self.calibrating)
        self._plain = {path: _only(units, found.__contains__) for path, found in self.calibrating.parameters.items()}
        self._targets = {target.parameter.name: target for unit in self.plan.units for target in unit.targets}

    def block(self, path: str) -> None:
        """Calibrate one block, and compute the next one's inputs."""
        parameters = self.calibrating.parameters[path]
        calls = self.captured.calls.pop(path)
        with _in_full_precision(self.plan.skeleton.model, self._owners(parameters)):
            mapped = self._read(path)
            made = self._quantized(path, parameters, calls)
            if self.captured.calls:  # there is a next one
                module = self.plan.skeleton.model.get_submodule(path)
                hidden = self.captured.hidden
                for batch, call in enumerate(calls):
                    hidden[batch] = call.run(module, hidden[batch])
        for tensor in mapped:
            release(tensor)
        for name, components in made.items():
            self.engine.runner.install(self._targets[name], components)

    def _read(self, path: str) -> list[torch.Tensor]:
        """Put a block's weights in place; returns those that are views of mapped files."""
        self.engine.run(self._plain[path])
        model = self.plan.skeleton.model
        return [
            model.get_parameter(target.parameter.name).detach()
            for unit in self._plain[path]
            for target in unit.targets
            if target.action == "map"
        ]

    def _owners(self, parameters: Mapping[str, Parameter]) -> dict[str, tuple[Chosen, list[Parameter]]]:
        """Path of a module -> who swapped it, and its calibrated parameters."""
        owners: dict[str, tuple[Chosen, list[Parameter]]] = {}
        for parameter in parameters.values():
            chosen = self._targets[parameter.name].decision.chosen
            assert chosen is not None
            owners.setdefault(parameter.module, (chosen, []))[1].append(parameter)
        return owners

    def _quantized(
        self, path: str, parameters: Mapping[str, Parameter], calls: Sequence[Call]
    ) -> dict[str, Components]:
        made: dict[str, Components] = {}
        for chosen in self.calibrating.chosen:
            mine = {name: one for name, one in parameters.items() if name in chosen.quantizer.parameters}
            if not mine:
                continue
            block = CalibrationBlock(
                name=path,
                module=self.plan.skeleton.model.get_submodule(path),
                parameters=mine,
                hidden=self.captured.hidden,
                calls=calls,
            )
            with _located(path, chosen), self.engine.runner.recorder.span("calibrate", path):
                for parameter, components in chosen.quantizer.calibrate(block):
                    if parameter.name not in mine or parameter.name in made:
                        raise PluginError(
                            f"calibrate yields {parameter.name!r}, which isn't its own or was there before"
                        )
                    made[parameter.name] = components
                    self._replace(chosen, block, parameter, components)
            left = mine.keys() - made.keys()
            if left:
                raise PluginError(f"{type(chosen.quantizer).__name__}.calibrate left out {', '.join(sorted(left))}")
            self.notes |= block.notes
        return made

    def _replace(self, chosen: Chosen, block: CalibrationBlock, parameter: Parameter, components: Components) -> None:
        """Put the dequantized weight in the place of the original."""
        check_components(chosen.quantizer, parameter, components)
        value = chosen.quantizer.dequantize(components, parameter).to(block.weight(parameter).dtype)
        install_plain(self.plan.skeleton.model, parameter, value)


@contextmanager
def _in_full_precision(model: nn.Module, owners: Mapping[str, tuple[Chosen, list[Parameter]]]) -> Iterator[None]:
    """The original modules in the place of the swapped ones, which get them back at the end.

    What isn't quantized of a module (its bias) goes along both ways. The originals keep nothing: they are on the meta
    device before and after.
    """
    swapped = {path: model.get_submodule(path) for path in owners}
    meta: dict[str, dict[str, nn.Parameter | None]] = {}
    for path, (chosen, parameters) in owners.items():
        original = _copied(swapped[path])
        for parameter in parameters:
            original = chosen.quantizer.restore_module(original, parameter)
        meta[path] = dict(original._parameters)
        _hand_over(swapped[path], original, {parameter.leaf for parameter in parameters})
        model.set_submodule(path, original.eval())
    yield
    for path, (_, parameters) in owners.items():
        original = model.get_submodule(path)
        _hand_over(original, swapped[path], {parameter.leaf for parameter in parameters})
        original._parameters.update(meta[path])
        model.set_submodule(path, swapped[path])


def _copied(module: nn.Module) -> nn.Module:
    """A module with the same tensors and children, which may be turned into something else."""
    copied: nn.Module = module.__class__.__new__(module.__class__)
    copied.__dict__ = {name: dict(value) if type(value) is dict else value for name, value in module.__dict__.items()}
    return copied


def _hand_over(source: nn.Module, target: nn.Module, quantized: set[str]) -> None:
    for name, parameter in source._parameters.items():
        if name not in quantized and parameter is not None and name in target._parameters:
            target.register_parameter(name, parameter)


@contextmanager
def _located(path: str, chosen: Chosen) -> Iterator[None]:
    """Raise what goes wrong in a quantizer as a ``CalibrationError`` that says where."""
    try:
        yield
    except CalibrationError as error:
        if error.block is not None:
            raise
        raise CalibrationError(str(error), block=path, parameter=error.parameter) from error
    except QuantdockError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"calibration with {chosen.label} ({chosen.offer.origin}) stopped: {type(error).__name__}: {error}",
            block=path,
        ) from error


def noted(ledger: Ledger, notes: Mapping[str, str]) -> Ledger:
    """The ledger with what was noted of parameters."""
    entries = tuple(
        dataclasses.replace(entry, note=notes[entry.parameter]) if entry.parameter in notes else entry
        for entry in ledger.entries
    )
    return dataclasses.replace(ledger, entries=entries)
