"""The recorder that keeps what it is told."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from quantdock.errors import QuantdockError
from quantdock.profiling import facts, page
from quantdock.profiling.digest import Material, Span, digest
from quantdock.profiling.recorder import Recorder, telling
from quantdock.profiling.sampler import Sampler

if TYPE_CHECKING:
    from pathlib import Path

    from quantdock.planning import Plan
    from quantdock.reporting import Report

STAGE = ""
"""The kind under which stages are kept; no span has it."""


class _Running:
    """A block that is being timed."""

    __slots__ = ("_keep", "_kind", "_label", "_nbytes", "_start")

    def __init__(self, keep: Callable[[Span], None], kind: str, label: str, nbytes: int) -> None:
        self._keep, self._kind, self._label, self._nbytes = keep, kind, label, nbytes

    def __enter__(self) -> None:
        self._start = time.perf_counter_ns()

    def __exit__(self, error: object, *_: object) -> None:
        end, thread = time.perf_counter_ns(), threading.current_thread()
        where = (thread.name, thread.ident or 0)
        self._keep(Span(self._kind, self._label, where, self._start, end, self._nbytes, error is not None))


class _Error(NamedTuple):
    type: str
    message: str


class Recording(Recorder):
    """One load, recorded; made by ``record()``."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self.started = time.time()
        self._start = time.perf_counter_ns()
        self._end: int | None = None
        # Appending to a list is atomic, so the threads of a load don't wait for one another here.
        self._spans: list[Span] = []
        self._stages: list[Span] = []
        self._sampler = sampler or Sampler()
        self._plan: dict[str, Any] | None = None
        self._report: dict[str, Any] | None = None
        self._error: _Error | None = None

    def span(self, kind: str, label: str, nbytes: int = 0) -> _Running:
        return _Running(self._spans.append, kind, label, nbytes)

    def stage(self, name: str) -> _Running:
        return _Running(self._stages.append, STAGE, name, 0)

    def watch(self, taken: Callable[[], int]) -> None:
        self._sampler.watch(taken)

    def planned(self, plan: Plan) -> None:
        self._plan = facts.of_plan(plan)

    def loaded(self, report: Report) -> None:
        self._report = report.to_dict()

    def begin(self) -> None:
        """Start to sample memory."""
        self._sampler.start()

    def end(self, error: BaseException | None = None) -> None:
        """Stop; ``error`` is why the load failed, if it did."""
        if error is not None:
            self._error = _Error(type(error).__name__, str(error))
        self._sampler.stop()
        self._end = time.perf_counter_ns()

    def to_dict(self) -> dict[str, Any]:
        """Everything that was recorded, as JSON-ready data; times are in seconds from the start."""
        return digest(self._material())

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the recording as one page that needs nothing but a browser: the file appears whole, or not at all.

        Works for a load that has failed, too. Parameters are sampled down, so that the page stays below a MiB.

        Returns:
            The path.

        Raises:
            QuantdockError: the file can't be written.
        """
        return page.write(self._material(), path)

    def _material(self) -> Material:
        return Material(
            started=self.started,
            start=self._start,
            end=self._end if self._end is not None else time.perf_counter_ns(),
            spans=self._spans.copy(),
            stages=self._stages.copy(),
            samples=self._sampler.samples,
            sampled=self._sampler.explained,
            plan=self._plan,
            report=self._report,
            error=None if self._error is None else self._error._asdict(),
        )


@contextmanager
def record(path: str | os.PathLike[str] | None = None) -> Iterator[Recording]:
    """Record the load inside the block, and write the page to ``path`` at its end, if one is given.

    It covers loads that are called in the thread that runs the block, with all the threads that they start. One
    recording is for one load: with several in it, their times lie one after the other, and what was predicted is the
    last one's.

    An error of the block goes on when it was noted and the page was written. If that fails as well, the error gets a
    note that says so.

    Raises:
        QuantdockError: the load went well, but the page can't be written.
    """
    recording = Recording()
    recording.begin()
    try:
        with telling(recording):
            yield recording
    except BaseException as error:
        recording.end(error)
        if path is not None:
            try:
                recording.write(path)
            except QuantdockError as unwritten:
                error.add_note(str(unwritten))
        raise
    recording.end()
    if path is not None:
        recording.write(path)
