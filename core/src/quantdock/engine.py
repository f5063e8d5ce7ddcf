"""The engine executes a plan's units: read, convert, quantize, place; in parallel, within a budget of bytes per device.

One thread (the caller's) hands out the work in file order, each piece after its bytes have been taken from the budget;
worker threads do it and give the bytes back. What needs more than the whole budget runs alone. The first error stops
everything: what is running finishes its piece, nothing new starts, and the error names what was being made.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from quantdock.budget import Budget
from quantdock.progress import Notify, Progress
from quantdock.running import Runner
from quantdock.slicing import SlicedUnit
from quantdock.staging import Staging
from quantdock.threads import worker_threads
from quantdock.units import Cut, InFlight, Unit

Device = torch.device | str
NOTHING = InFlight()


class Budgets:
    """A budget of the same size for the host and for every CUDA device that a load places something on."""

    def __init__(self, limit: int, devices: Iterable[Device]) -> None:
        self.host = Budget(limit)
        self.devices: dict[Device, Budget] = {
            device: Budget(limit)
            for device in sorted(set(devices), key=str)
            if isinstance(device, torch.device) and device.type != "cpu"
        }

    @property
    def taken(self) -> int:
        """Bytes in flight on all of them."""
        return sum(budget.taken for budget in self._all())

    @property
    def peak(self) -> int:
        """Most bytes that were in flight at once on any one of them."""
        return max(budget.peak for budget in self._all())

    def take(
        self, amount: InFlight, device: Device, stopped: Callable[[], bool], *, beside: InFlight = NOTHING
    ) -> bool:
        """Take from the host and from ``device`` (see ``Budget.take``); nothing is kept when it returns False."""
        if not self.host.take(amount.host, stopped, beside=beside.host):
            return False
        if amount.device and not self.devices[device].take(amount.device, stopped, beside=beside.device):
            self.host.give(amount.host)
            return False
        return True

    def give(self, amount: InFlight, device: Device) -> None:
        """Give back what ``take`` took; ``wake`` is to follow."""
        self.host.give(amount.host, wake=False)
        if amount.device:
            self.devices[device].give(amount.device, wake=False)

    def wake(self) -> None:
        """Let a waiting ``take`` look again, whichever budget it waits for."""
        for budget in self._all():
            budget.wake()

    def _all(self) -> list[Budget]:
        return [self.host, *self.devices.values()]


def amounts(units: Sequence[Unit]) -> tuple[int, int]:
    """Stored bytes and parameters."""
    return sum(unit.stored_nbytes for unit in units), sum(len(unit.targets) for unit in units)


@dataclass(frozen=True, slots=True)
class _Task:
    """A piece of work for a worker, and what to give back afterwards."""

    unit: Unit
    work: Callable[[Staging], bool]
    """Returns whether the unit is finished."""
    takes: InFlight


@dataclass(kw_only=True)
class Engine:
    """Runs units into a model."""

    runner: Runner
    budgets: Budgets
    workers: int
    notify: Notify | None = None
    expected: tuple[int, int] | None = None
    """Stored bytes and parameters of all runs together, for progress; ``None`` for a single run."""
    _failure: BaseException | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _callers: int = field(default_factory=torch.get_num_threads)
    _done_nbytes: int = 0
    _done_parameters: int = 0
    _total: tuple[int, int] = (0, 0)
    _tasks: queue.SimpleQueue[_Task | None] = field(default_factory=queue.SimpleQueue)

    def run(self, units: Sequence[Unit]) -> None:
        """Execute all units.

        Raises:
            LoadError: a unit failed; names file, stored tensors, parameter and plugin.
        """
        self.runner.recorder.watch(lambda: self.budgets.taken)
        self._total = self.expected or amounts(units)
        count = sum(1 if unit.cut is None else unit.cut.count for unit in units if unit.in_flight)
        threads = [
            threading.Thread(target=self._work, name=f"quantdock-{index}", daemon=True)
            for index in range(min(self.workers, count))
        ]
        for thread in threads:
            thread.start()
        interrupted = True
        try:
            with torch.no_grad(), Staging() as staging:
                for unit in units:
                    if not self._hand_out(unit, staging):
                        break
            interrupted = False
        finally:
            if interrupted:  # Ctrl-C: stop handing out, and don't wait for daemon threads
                self._fail(KeyboardInterrupt())
            for _ in threads:
                self._tasks.put(None)
            if not interrupted:
                for thread in threads:
                    thread.join()
            torch.set_num_threads(self._callers)  # what threads that start from now on get
        if self._failure is not None:
            raise self._failure

    def _hand_out(self, unit: Unit, staging: Staging) -> bool:
        """Queue the tasks of a unit as the budgets have room for them; False when the load has failed."""
        if not unit.in_flight:  # mapped: nothing to read or to wait for, and nothing for another thread to do
            self._perform(_Task(unit, partial(self._run_whole, unit), NOTHING), staging)
            return not self._stopped()
        with self.runner.recorder.span("wait", unit.targets[0].parameter.name):
            if not self.budgets.take(unit.own, unit.device, self._stopped):
                return False
        if unit.cut is not None:
            return self._hand_out_slices(unit, unit.cut)
        task = _Task(unit, partial(self._run_whole, unit), unit.own)
        for source in unit.sources:
            source.reader.will_need(source)
        self._tasks.put(task)
        return True

    def _hand_out_slices(self, unit: Unit, cut: Cut) -> bool:
        sliced = SlicedUnit(unit, self.runner)
        for start, stop in cut:
            with self.runner.recorder.span("wait", unit.targets[0].parameter.name):
                if not self.budgets.take(cut.each, unit.device, self._stopped, beside=unit.own):
                    return False
            sliced.will_need(start, stop)
            self._tasks.put(_Task(unit, partial(self._run_slice, sliced, start, stop), cut.each))
        return True

    def _run_whole(self, unit: Unit, staging: Staging) -> bool:
        self.runner.run(unit, staging)
        return True

    def _run_slice(self, sliced: SlicedUnit, start: int, stop: int, staging: Staging) -> bool:
        finished = sliced.run(start, stop, staging)
        if finished:
            self.budgets.give(sliced.unit.own, sliced.unit.device)
        return finished

    def _stopped(self) -> bool:
        return self._failure is not None

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
        self.budgets.wake()

    def _work(self) -> None:
        with worker_threads(self._callers), torch.no_grad(), Staging() as staging:
            while (task := self._tasks.get()) is not None:
                self._perform(task, staging)

    def _perform(self, task: _Task, staging: Staging) -> None:
        try:
            if not self._stopped() and task.work(staging):
                self._report(task.unit)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller's thread raises it
            self._fail(error)
        finally:
            if task.takes != NOTHING:
                self.budgets.give(task.takes, task.unit.device)
                # The thread that hands out work sleeps until the others are about to run out of it: if every piece woke
                # it up, it would be in their way.
                if self._tasks.qsize() <= self.workers:
                    self.budgets.wake()

    def _report(self, unit: Unit) -> None:
        if self.notify is None:
            return
        with self._lock:
            self._done_nbytes += unit.stored_nbytes
            self._done_parameters += len(unit.targets)
            self.notify(
                Progress(
                    stored_nbytes=self._done_nbytes,
                    total_nbytes=self._total[0],
                    parameters=self._done_parameters,
                    total_parameters=self._total[1],
                    in_flight=self.budgets.taken,
                )
            )
