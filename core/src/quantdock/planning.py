"""The plan: everything that is decided before the first weight byte is read."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pluggy
import torch

from quantdock.architecture import LoadOutcome, Skeleton
from quantdock.caching.results import Cached
from quantdock.calibration.preparing import Calibrating
from quantdock.calibration.running import Calibrated, calibrate, noted, units_before
from quantdock.checkpoint import Checkpoint
from quantdock.config import ModelConfig
from quantdock.discovery import Catalog
from quantdock.dispatching import dispatch, offload_folder
from quantdock.engine import Budgets, Engine
from quantdock.errors import PluginError, QuantdockError
from quantdock.garbage import collected_later
from quantdock.ledger import Action, Entry, Ledger
from quantdock.matching import Match
from quantdock.options import LoadOptions
from quantdock.placement import DISK, Placement
from quantdock.populating import populate_in_background
from quantdock.preparing import own_buffers, resident_nbytes
from quantdock.profiling import current
from quantdock.profiling.sampler import peak_resident
from quantdock.progress import progress_of
from quantdock.registry import MIXED, Selection
from quantdock.reporting import Record, Report, attach, cache_line, measured_nbytes
from quantdock.running import Runner
from quantdock.slots import walk
from quantdock.source import Source
from quantdock.stopwatch import Stopwatch
from quantdock.tables import format_bytes, grouped, groups_table
from quantdock.tensors import qualified
from quantdock.units import Unit


@dataclass(kw_only=True)
class Plan:
    """What a load will do, to the byte. Print it, look into it, or ``execute()`` it, once."""

    source: Source
    options: LoadOptions
    config: ModelConfig
    checkpoint: Checkpoint
    skeleton: Skeleton
    selection: Selection
    match: Match
    placement: Placement
    units: list[Unit]
    hooks: pluggy.PluginManager
    catalog: Catalog
    stopwatch: Stopwatch
    calibrating: Calibrating | None = None
    """What is quantized by its activations, and with what data; ``None`` for nothing."""
    populating: bool = False
    """Whether mapped files are entering the page tables already."""
    cached: Cached = field(default_factory=Cached)
    _executed: bool = field(default=False)

    @cached_property
    def ledger(self) -> Ledger:
        """What becomes of every parameter and every stored tensor."""
        return _ledger(self)

    @property
    def resident_nbytes(self) -> int:
        """Bytes the loaded model will hold: parameters, buffers and what quantization keeps beside them. Exact."""
        on_disk = sum(entry.nbytes for entry in self.ledger.entries if entry.device == DISK)
        shared = sum(chosen.quantizer.shared_nbytes() for chosen in self.selection if chosen.quantizer.parameters)
        return self.ledger.nbytes - on_disk + self.buffer_nbytes + shared

    @cached_property
    def buffer_nbytes(self) -> int:
        """Bytes of the buffers that no checkpoint stores."""
        return sum(own_buffers(self.skeleton.model, self.match).values())

    @property
    def largest_unit_nbytes(self) -> int:
        """Bytes in flight of the unit that needs most; above the budget, it runs alone and sets the peak."""
        return max((unit.in_flight for unit in self.units), default=0)

    @property
    def peak_nbytes(self) -> int:
        """Upper bound of resident bytes while loading: the model and what may be in flight."""
        in_flight = max(min(self.options.budget, self._all_in_flight), self.largest_unit_nbytes)
        return self.resident_nbytes + in_flight + (0 if self.calibrating is None else self.calibrating.nbytes)

    @property
    def _all_in_flight(self) -> int:
        return sum(unit.most_in_flight for unit in self.units)

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """What is saved as ``quantization_config``, in the ecosystem's format."""
        chosen = list(self.selection)
        if not chosen:
            return None
        slots = self.match.parameters
        if len(chosen) == 1:
            return chosen[0].quantizer.saved_config(slots)
        parts = [
            {"patterns": sorted(one.quantizer.parameters), "config": one.quantizer.saved_config(slots)}
            for one in chosen
        ]
        return {"quant_method": MIXED, "parts": parts}

    def execute(self) -> torch.nn.Module:
        """Load the model.

        Raises:
            LoadError: a unit failed; names file, stored tensors, parameter and plugin. Everything is freed.
        """
        if self._executed:
            raise QuantdockError("this plan was executed already; its skeleton became the model. Make a new plan.")
        self._executed = True
        model = self.skeleton.model
        predicted = self.resident_nbytes
        recorder = current()
        recorder.planned(self)
        engine = self._engine()
        with progress_of(self.options.progress) as engine.notify:
            with self.stopwatch.stage("load"):
                if not self.populating and self.calibrating is None:
                    populate_in_background(self.cached.units(self.units))
                engine.run(units_before(self, engine))
            with self.stopwatch.stage("calibrate"):
                calibrated = calibrate(self, engine)
        with self.stopwatch.stage("cache"):
            self.cached.settle(self)
        with self.stopwatch.stage("postprocess_model"):
            if self.calibrating is None:
                self.finish()
            dispatch(
                model,
                self.placement,
                engine.runner.offload_dir,
                engine.runner.offload_index,
                self.skeleton.architecture.dispatch_options(),
            )
            self.hooks.hook.postprocess_model(model=model)
            self._check_complete()
        self.checkpoint.close()
        report = self._report(engine, predicted, calibrated)
        recorder.loaded(report)
        record = Record(
            report=report,
            architecture=self.skeleton.architecture,
            selection=self.selection,
            quantization_config=self.quantization_config,
        )
        attach(model, record)
        return model

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        return {
            "source": dict(self.source.identity),
            "format": self.checkpoint.format,
            "files": [str(file) for file in self.checkpoint.files],
            "dtype": str(self.options.dtype).removeprefix("torch."),
            "built_by": self.skeleton.built_by,
            "device_map": {name: str(device) for name, device in self.placement.device_map.items()},
            "groups": [dataclasses.asdict(group) for group in grouped(self.ledger.entries)],
            "ignored": dict(self.ledger.ignored),
            "allowed": dict(self.ledger.allowed),
            "coverage": self.ledger.coverage,
            "stored_nbytes": self.ledger.stored_nbytes,
            "resident_nbytes": self.resident_nbytes,
            "buffer_nbytes": self.buffer_nbytes,
            "memory_budget": self.options.budget,
            "largest_unit_nbytes": self.largest_unit_nbytes,
            "peak_nbytes": self.peak_nbytes,
            "calibration": None if self.calibrating is None else self.calibrating.to_dict(),
            "plugins": [dataclasses.asdict(decision) for decision in self.catalog.decisions],
            "quantization_config": self.quantization_config,
            "cache": self.cached.facts,
        }

    def __str__(self) -> str:
        ledger = self.ledger
        lines = [
            f"plan for {self.source.name} ({self.checkpoint.format}, {len(self.checkpoint.files)} file(s))",
            groups_table(grouped(ledger.entries)),
            f"stored {format_bytes(ledger.stored_nbytes)}, peak at most {format_bytes(self.peak_nbytes)}",
            f"resident when loaded {format_bytes(self.resident_nbytes)} ({self.resident_nbytes} bytes)",
            "coverage: "
            + ", ".join(
                f"{method or 'full precision'} {amount / max(1, ledger.stored_nbytes):.1%}"
                for method, amount in ledger.coverage.items()
            ),
        ]
        if self.calibrating is not None:
            lines.append(str(self.calibrating))
        if self.cached.state != "off":
            lines.append(f"cache: {cache_line(self.cached.facts)}")
        if self.largest_unit_nbytes > self.options.budget:
            lines.append(
                f"one unit needs {format_bytes(self.largest_unit_nbytes)}, more than the budget of "
                f"{format_bytes(self.options.budget)}; it will run alone"
            )
        lines += [f"ignored {name}: {reason}" for name, reason in ledger.ignored.items()]
        lines += [f"allowed {name}: {reason}" for name, reason in ledger.allowed.items()]
        return "\n".join(lines)

    # Parts of execute ---------------------------------------------------------------------------------------------

    def _engine(self) -> Engine:
        instances = [chosen.quantizer for chosen in self.selection]
        hooks = {
            id(quantizer): self.hooks.subset_hook_caller(
                "quantize_param", [other for other in instances if other is not quantizer]
            )
            for quantizer in instances
        }
        callers = {key: (lambda p, t, hook=hook: hook(parameter=p, tensor=t)) for key, hook in hooks.items()}
        return Engine(
            runner=Runner(
                model=self.skeleton.model,
                quantize_hooks=callers,
                offload_dir=offload_folder(self.placement, self.options),
            ),
            budgets=Budgets(self.options.budget, (unit.device for unit in self.units)),
            workers=self.options.worker_count,
        )

    def finish(self) -> None:
        """Let the architecture initialise, recreate and tie what the checkpoint doesn't have; once."""
        outcome = LoadOutcome(
            loaded=[target.parameter.name for unit in self.units for target in unit.targets],
            missing=list(self.match.missing),
            tied=self.match.tied,
            devices=self.placement.device_map,
            quantizers=[chosen.quantizer for chosen in self.selection],
            quantization_config=self.quantization_config,
        )
        self.skeleton.architecture.finish(outcome)

    def _check_complete(self) -> None:
        """Invariant 1, looked at in the model itself."""
        empty = [
            name
            for path, module in walk(self.skeleton.model)
            for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]
            if tensor is not None and tensor.is_meta
            for name in [qualified(path, leaf)]
            if self.placement.device_of(name) != DISK
        ]
        if empty:
            raise PluginError(
                f"{', '.join(map(repr, empty[:5]))} {'have' if len(empty) > 1 else 'has'} no values after loading; "
                f"{self.skeleton.built_by} should have made them"
            )

    def _report(self, engine: Engine, predicted: int, calibrated: Calibrated) -> Report:
        return Report(
            source=dict(self.source.identity),
            ledger=noted(self.ledger, calibrated.notes),
            predicted_nbytes=predicted,
            measured_nbytes=measured_nbytes(self.skeleton.model),
            memory_budget=self.options.budget,
            in_flight_peak_nbytes=engine.budgets.peak,
            process_peak_nbytes=peak_resident(),
            seconds=dict(self.stopwatch.seconds),
            workers=self.options.worker_count,
            plugins={decision.dist: decision.version for decision in self.catalog.decisions if decision.allowed},
            refused={decision.dist: decision.reason for decision in self.catalog.decisions if not decision.allowed},
            policy=self.catalog.policy_origin,
            broken=dict(self.catalog.broken),
            operations=_operations(),
            cache=self.cached.facts,
            calibration=calibrated.facts,
        )


def _operations() -> str:
    """What ``quantdock.ops`` runs on; a load in which nobody imported it has no use for it."""
    choice = sys.modules.get("quantdock.ops.choice")
    return "not used" if choice is None else str(choice.implementation())


@collected_later()
def _ledger(plan: Plan) -> Ledger:
    match = plan.match
    made: dict[str, Entry] = {}
    for unit in plan.units:
        share = unit.stored_nbytes // len(unit.targets)
        for index, target in enumerate(unit.targets):
            chosen = target.decision.chosen
            name = target.parameter.name
            made[name] = Entry(
                parameter=name,
                action=target.action,
                by="quantdock" if chosen is None else chosen.offer.dist,
                method="" if chosen is None else chosen.label,
                sources=tuple(source.name for source in unit.sources),
                stored_nbytes=share if index else unit.stored_nbytes - share * (len(unit.targets) - 1),
                nbytes=resident_nbytes(match, name),
                device=str(target.device),
                note=target.decision.note,
            )
    for name in match.parameters:
        if name not in made:
            action: Action = "tie" if name in match.tied else "initialize"
            made[name] = Entry(
                parameter=name,
                action=action,
                by=plan.skeleton.built_by,
                method="",
                sources=(),
                stored_nbytes=0,
                nbytes=resident_nbytes(match, name),
                device=str(plan.placement.device_of(match.tied.get(name, name))),
                note=match.decisions[name].note,
            )
    entries = tuple(made[name] for name in match.parameters)
    return Ledger(entries=entries, ignored=match.ignored, allowed=match.allowed)
