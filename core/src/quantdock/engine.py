"""The engine executes a plan's units: read, convert, quantize, place; in parallel, within a budget of bytes.

One thread (the caller's) hands out the units in file order, each after it has taken the unit's bytes from the budget;
worker threads run them and give the bytes back. A unit larger than the whole budget runs alone. The first error stops
everything: what is running finishes its unit, nothing new starts, and the error names what was being made.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quantdock.conversion import Assembly
from quantdock.errors import LoadError, PluginError, QuantdockError
from quantdock.pagecache import release
from quantdock.placement import DISK
from quantdock.progress import Notify, Progress
from quantdock.quantizer import Quantizer
from quantdock.tensors import Parameter, StoredTensor, TensorSpec
from quantdock.threads import worker_threads
from quantdock.units import SLICE, Target, Unit

QuantizeHook = Callable[[Parameter, torch.Tensor], Mapping[str, torch.Tensor] | None]


class Budget:
    """Bytes in flight; taken in order, given back in any."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.peak = 0
        self.taken = 0
        self._changed = threading.Condition()

    def take(self, amount: int, stopped: Callable[[], bool]) -> bool:
        """Wait until ``amount`` bytes are free, or everything is when it is more than the limit.

        Returns:
            False when ``stopped`` turned true while waiting; nothing is taken then.
        """
        with self._changed:
            while not stopped() and self.taken and self.taken + amount > self.limit:
                self._changed.wait()
            if stopped():
                return False
            self.taken += amount
            self.peak = max(self.peak, self.taken)
            return True

    def give(self, amount: int) -> None:
        """Give ``amount`` bytes back."""
        with self._changed:
            self.taken -= amount
            self._changed.notify_all()

    def wake(self) -> None:
        """Let a waiting ``take`` look at ``stopped`` again."""
        with self._changed:
            self._changed.notify_all()


@dataclass(kw_only=True)
class Engine:
    """Runs units into a model."""

    model: torch.nn.Module
    quantize_hooks: Mapping[int, QuantizeHook]
    """id of a quantizer -> the ``quantize_param`` hook that asks it and the stage plugins, nobody else."""
    budget: Budget
    workers: int
    offload_dir: str | None = None
    notify: Notify | None = None
    offload_index: dict[str, Any] = field(default_factory=dict)
    _failure: BaseException | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _callers: int = field(default_factory=torch.get_num_threads)
    _done_nbytes: int = 0
    _done_parameters: int = 0

    def run(self, units: Sequence[Unit]) -> None:
        """Execute all units.

        Raises:
            LoadError: a unit failed; names file, stored tensors, parameter and plugin.
        """
        tasks: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
        total = (sum(unit.stored_nbytes for unit in units), sum(len(unit.targets) for unit in units))
        threads = [
            threading.Thread(target=self._work, args=(tasks, total), name=f"quantdock-{index}", daemon=True)
            for index in range(min(self.workers, max(1, len(units))))
        ]
        for thread in threads:
            thread.start()
        interrupted = True
        try:
            for unit in units:
                if not self.budget.take(unit.in_flight, self._stopped):
                    break
                if not unit.in_flight:  # mapped: there is nothing to read, and nothing for another thread to do
                    self._perform(unit, total)
                    continue
                for source in unit.sources:
                    source.reader.will_need(source)
                tasks.put(unit)
            interrupted = False
        finally:
            if interrupted:  # Ctrl-C: stop handing out, and don't wait for daemon threads
                self._fail(KeyboardInterrupt())
            for _ in threads:
                tasks.put(None)
            if not interrupted:
                for thread in threads:
                    thread.join()
            torch.set_num_threads(self._callers)  # what threads that start from now on get
        if self._failure is not None:
            raise self._failure

    def _stopped(self) -> bool:
        return self._failure is not None

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
        self.budget.wake()

    def _work(self, tasks: queue.SimpleQueue[Unit | None], total: tuple[int, int]) -> None:
        with worker_threads(self._callers):
            while (unit := tasks.get()) is not None:
                self._perform(unit, total)

    @torch.no_grad()
    def _perform(self, unit: Unit, total: tuple[int, int]) -> None:
        try:
            if not self._stopped():
                self._run_unit(unit)
                self._report(unit, total)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller's thread raises it
            self._fail(error)
        finally:
            self.budget.give(unit.in_flight)

    def _report(self, unit: Unit, total: tuple[int, int]) -> None:
        if self.notify is None:
            return
        with self._lock:
            self._done_nbytes += unit.stored_nbytes
            self._done_parameters += len(unit.targets)
            self.notify(
                Progress(
                    stored_nbytes=self._done_nbytes,
                    total_nbytes=total[0],
                    parameters=self._done_parameters,
                    total_parameters=total[1],
                    in_flight=self.budget.taken,
                )
            )

    # One unit -----------------------------------------------------------------------------------------------------

    def _run_unit(self, unit: Unit) -> None:
        target = unit.targets[0]
        try:
            if unit.conversion is None:
                self._install_stored(unit)
            elif unit.conversion.function is not None:
                results = unit.conversion.function({source.name: source.read() for source in unit.sources})
                for target in unit.targets:
                    self._finish(target, _result(results, target))
            else:
                assert unit.conversion.assemblies is not None
                by_name = {source.name: source for source in unit.sources}
                for target in unit.targets:
                    self._assemble(target, unit.conversion.assemblies[target.parameter.name], by_name)
        except QuantdockError as error:
            raise self._located(unit, target, error, str(error)) from error
        except Exception as error:
            raise self._located(unit, target, error, f"{type(error).__name__}: {error}") from error

    @staticmethod
    def _located(unit: Unit, target: Target, error: Exception, message: str) -> LoadError:
        chosen = target.decision.chosen
        return LoadError(
            f"loading stopped: {message}",
            parameter=target.parameter.name,
            stored=[source.name for source in unit.sources],
            file=unit.sources[0].file if unit.sources else None,
            plugin=None if chosen is None else f"{chosen.label} ({chosen.offer.origin})",
        )

    def _install_stored(self, unit: Unit) -> None:
        (target,) = unit.targets
        assert target.decision.chosen is not None
        tensors = {
            name: source.read().to(target.device) for name, source in zip(unit.components, unit.sources, strict=True)
        }
        target.decision.chosen.quantizer.install(self.model, target.parameter, tensors)

    def _assemble(self, target: Target, assembly: Assembly, sources: Mapping[str, StoredTensor]) -> None:
        spec = target.parameter.spec
        first = assembly.pieces[0]
        if len(assembly.pieces) == 1 and first.whole and sources[first.source].spec == spec:
            source = sources[first.source]
            tensor = source.read()
            self._finish(target, tensor)
            if source.reader.maps and target.action != "map":
                release(tensor)
            return
        staging = target.device if target.device != DISK else "cpu"
        result = torch.empty(spec.shape, dtype=spec.dtype, device=staging)
        for piece in assembly.pieces:
            source = sources[piece.source]
            view = piece.of(source.read())
            _copy_in_slices(view, result[piece.into] if piece.into else result, drop=source.reader.maps)
        self._finish(target, result)

    def _finish(self, target: Target, tensor: torch.Tensor) -> None:
        parameter = target.parameter
        if target.device == DISK:
            self._offload(parameter, tensor.to(parameter.spec.dtype))
            return
        tensor = tensor.to(device=target.device, dtype=parameter.spec.dtype)
        chosen = target.decision.chosen
        if chosen is None:
            install_plain(self.model, parameter, tensor)
            return
        components = self.quantize_hooks[id(chosen.quantizer)](parameter, tensor)
        _check_components(chosen.quantizer, parameter, components)
        assert components is not None
        chosen.quantizer.install(self.model, parameter, components)

    def _offload(self, parameter: Parameter, tensor: torch.Tensor) -> None:
        from accelerate.utils import offload_weight

        assert self.offload_dir is not None
        with self._lock:
            offload_weight(tensor, parameter.name, self.offload_dir, index=self.offload_index)


def _result(results: Mapping[str, torch.Tensor], target: Target) -> torch.Tensor:
    name, spec = target.parameter.name, target.parameter.spec
    if name not in results:
        raise PluginError(f"the conversion made {', '.join(results)}, but not {name!r}, which it had announced")
    if tuple(results[name].shape) != spec.shape:
        raise PluginError(f"the conversion made {name!r} as {TensorSpec.of(results[name])}, expected {spec}")
    return results[name]


def _copy_in_slices(source: torch.Tensor, target: torch.Tensor, *, drop: bool) -> None:
    """Copy, cast and move ``SLICE`` bytes at a time; let go of mapped pages behind."""
    if source.dim() == 0 or source.nbytes <= SLICE:
        target.copy_(source)
        if drop:
            release(source)
        return
    rows = max(1, SLICE * source.shape[0] // source.nbytes)
    for start in range(0, source.shape[0], rows):
        piece = source[start : start + rows]
        target[start : start + rows].copy_(piece)
        if drop:
            release(piece)


def _check_components(
    quantizer: Quantizer[Any], parameter: Parameter, components: Mapping[str, torch.Tensor] | None
) -> None:
    """A plugin's declaration is its word: placement and the prediction rely on it."""
    if components is None:
        raise PluginError(
            f"{type(quantizer).__name__}.quantize_param returned None for {parameter.name!r}, which it took"
        )
    layout = quantizer.layout(parameter)
    made = {name: TensorSpec.of(tensor) for name, tensor in components.items()}
    if not layout.fits(made):
        raise PluginError(
            f"{type(quantizer).__name__}.quantize_param made {_listed(made)} for {parameter.name!r}, but its layout "
            f"declares {_listed(layout.components)}"
        )


def _listed(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{name}: {spec}" for name, spec in sorted(specs.items()))


def install_plain(model: torch.nn.Module, parameter: Parameter, tensor: torch.Tensor) -> None:
    """Put a full-precision tensor into its slot."""
    module = model.get_submodule(parameter.module)
    if parameter.leaf in module._buffers:
        module._buffers[parameter.leaf] = tensor
    else:
        value = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        module.register_parameter(parameter.leaf, value)
