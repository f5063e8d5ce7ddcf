"""Runs requests of the same kind one after the other: every contender in turns, each load in a fresh process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks import processes
from benchmarks.contenders import CONTENDERS, QUANTDOCK, in_turns
from benchmarks.jobs import Job, Outcome
from benchmarks.options import prepare_page_cache, surroundings
from benchmarks.tables import Spread


@dataclass(frozen=True, kw_only=True)
class Request:
    """One thing that all contenders are asked for."""

    case: str
    """How it is put (``cases.CASES``)."""
    folder: Path
    warm_up: Path
    contenders: Sequence[str]
    files: Sequence[Path]
    """Those that are read; ``--page-cache`` is about them."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of the environment."""

    def job(self, contender: str, options: argparse.Namespace, *, checksums: bool = False) -> Job:
        """The request in the form that a process takes."""
        return Job(
            contender=contender,
            case=self.case,
            folder=str(self.folder),
            warm_up=str(self.warm_up),
            memory_budget=options.budget,
            workers=options.workers,
            checksums=checksums,
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of one request."""

    outcomes: dict[str, list[Outcome]]
    """Contender -> its runs; without those that were left out."""
    from_start: dict[str, list[float]]
    """Contender -> seconds from the start of a process to a ready model; empty if not asked for."""
    left_out: dict[str, str]
    """Contender -> why."""

    def ready(self, contender: str) -> float:
        """Median seconds until the contender's weights are in memory."""
        return median(one.ready_seconds for one in self.outcomes[contender])

    def ratio(self, contender: str, base: str = QUANTDOCK) -> float | None:
        """How many times as long as ``base`` a contender takes; ``None`` if either wasn't measured."""
        if not {contender, base} <= self.outcomes.keys():
            return None
        return self.ready(contender) / self.ready(base)

    def differing(self, contender: str) -> list[str] | None:
        """Names that aren't there, or not the same bits, in quantdock's state dict and this one.

        ``None`` of a contender that is to make other bits."""
        ours, theirs = self.outcomes[QUANTDOCK][0].checksums, self.outcomes[contender][0].checksums
        if not CONTENDERS[contender].comparable:
            return None
        names = theirs.keys() if CONTENDERS[contender].partial else ours.keys() | theirs.keys()
        return sorted(name for name in names if ours.get(name) != theirs.get(name))

    def __str__(self) -> str:
        seconds = {name: Spread.of([one.ready_seconds for one in runs]) for name, runs in self.outcomes.items()}
        return ", ".join(f"{name} {spread} s" for name, spread in seconds.items())


@dataclass(frozen=True, kw_only=True)
class Series:
    """What came of all requests."""

    measured: dict[str, Measured]
    failures: dict[str, str]
    """Label -> the error of a contender that it can't do without."""


def run(requests: Mapping[str, Callable[[], Request]], options: argparse.Namespace) -> Series:
    """Prepare and measure all requests, by label; Ctrl-C ends it with those that are done."""
    series = Series(measured={}, failures={})
    for label, prepare in requests.items():
        try:
            measured = _measure(prepare(), options)
        except processes.ProcessError as error:
            series.failures[label] = str(error)
            print(f"failed: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            series.failures[label] = "interrupted"
            break
        else:
            series.measured[label] = measured
            print(f"{label}: ready after {measured}", file=sys.stderr, flush=True)
    return series


def _measure(request: Request, options: argparse.Namespace) -> Measured:
    around = surroundings(options, request.variables)
    result = Measured(outcomes={name: [] for name in request.contenders}, from_start={}, left_out={})
    for number in range(options.runs):
        for name in in_turns(list(result.outcomes), number):
            prepare_page_cache(options, request.files)
            try:
                outcome = processes.measure(request.job(name, options, checksums=number == 0), around)
            except processes.ProcessError as error:
                if CONTENDERS[name].required:
                    raise
                del result.outcomes[name]
                result.left_out[name] = error.reason
            else:
                result.outcomes[name].append(outcome)
    for number in range(options.runs if options.whole_process else 0):
        for name in in_turns(list(result.outcomes), number):
            prepare_page_cache(options, request.files)
            seconds = processes.start_to_ready(request.job(name, options), around)
            result.from_start.setdefault(name, []).append(seconds)
    return result
