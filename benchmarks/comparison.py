"""How a series of loads is told: a table with ratios, what follows from it, and the same as data."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from statistics import median

from benchmarks.checkpoints import Checkpoint
from benchmarks.contenders import CONTENDERS, FLOOR, QUANTDOCK, TRANSFORMERS
from benchmarks.jobs import Outcome
from benchmarks.machine import Machine
from benchmarks.series import Measured, Series
from benchmarks.tables import Spread, mib, table

_HEADER = (
    "case",
    "contender",
    "start s",
    "load s",
    "ready s",
    "times",
    "/ floor",
    "process s",
    "cpu s",
    "peak MiB",
    "model MiB",
    "same tensors",
)


def show(series: Series, options: argparse.Namespace) -> None:
    """Print machine, table and what follows."""
    if not series.measured:
        return
    first = next(iter(series.measured.values())).outcomes[QUANTDOCK][0]
    print(Machine.here().header(first.versions, first.threads))
    print(f"files     {options.page_cache} page cache, {options.runs} runs each\n")
    print(table(_HEADER, [row for label, measured in series.measured.items() for row in _rows(label, measured)]))
    remarks = [line for label, measured in series.measured.items() for line in _remarks(label, measured)]
    print("\n".join(["", *_legend(series), *remarks]))


def _rows(label: str, measured: Measured) -> Iterator[list[str]]:
    for contender, runs in measured.outcomes.items():
        ours = contender == QUANTDOCK
        yield [
            label,
            contender,
            str(Spread.of([one.start_seconds for one in runs])),
            str(Spread.of([one.load_seconds for one in runs])),
            str(Spread.of([one.ready_seconds for one in runs])),
            "" if ours else _times(measured.ratio(contender)),
            _times(measured.ratio(contender, FLOOR)),
            str(Spread.of(measured.from_start[contender])) if measured.from_start else "",
            f"{median(one.cpu_seconds for one in runs):.2f}",
            mib(median(one.growth for one in runs)),
            mib(runs[0].model_nbytes),
            "" if ours else _sameness(measured.differing(contender)),
        ]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _sameness(names: Sequence[str] | None) -> str:
    if names is None:
        return ""
    return f"{len(names)} differ" if names else "yes"


def _legend(series: Series) -> Iterator[str]:
    """One line for each contender whose name doesn't say what it does."""
    seen = {name for measured in series.measured.values() for name in measured.outcomes}
    for name, contender in CONTENDERS.items():
        if name in seen and not contender.required:
            yield f"{name}: {contender.about}"


def _remarks(label: str, measured: Measured) -> Iterator[str]:
    for name, reason in measured.left_out.items():
        yield f"{label}: {name} left out: {reason}"
    if (over := measured.ratio(QUANTDOCK, FLOOR)) is not None:
        yield f"{label}: quantdock / floor = {over:.2f}"
    if (verdict := from_start_verdict(measured)) is not None:
        words = "within" if verdict["within"] else "NOT WITHIN"
        yield (
            f"{label}: from the start of the process to a ready model {verdict['seconds']:.2f} s, {words} "
            f"transformers' {verdict['transformers']:.2f} s less the {verdict['saved']:.2f} s that the load saves "
            f"= {verdict['limit']:.2f} s"
        )


def from_start_verdict(measured: Measured) -> dict[str, float] | None:
    """Whether everything around quantdock's load takes no longer than around transformers'; seconds, and 0 or 1 for
    ``within``. ``None`` if processes weren't measured as a whole."""
    if not {QUANTDOCK, TRANSFORMERS} <= measured.from_start.keys():
        return None
    ours, theirs = (median(measured.from_start[name]) for name in (QUANTDOCK, TRANSFORMERS))
    saved = measured.ready(TRANSFORMERS) - measured.ready(QUANTDOCK)
    return {
        "seconds": ours,
        "transformers": theirs,
        "saved": saved,
        "limit": theirs - saved,
        "within": ours <= theirs - saved,
    }


def as_data(benchmark: str, series: Series, checkpoint: Checkpoint, options: argparse.Namespace) -> dict[str, object]:
    """Everything that was measured, and what follows, JSON-ready."""
    return {
        "benchmark": benchmark,
        "machine": dataclasses.asdict(Machine.here()),
        "preset": checkpoint.preset,
        "stored_nbytes": checkpoint.nbytes,
        "page_cache": options.page_cache,
        "runs": options.runs,
        "cases": {label: _case(measured) for label, measured in series.measured.items()},
        "failures": series.failures,
    }


def _case(measured: Measured) -> dict[str, object]:
    others = [name for name in measured.outcomes if name != QUANTDOCK]
    return {
        "ratios": {name: measured.ratio(name) for name in others},
        "over_floor": measured.ratio(QUANTDOCK, FLOOR),
        "differing": {name: measured.differing(name) for name in others},
        "left_out": measured.left_out,
        "contenders": {name: [_plain(one) for one in runs] for name, runs in measured.outcomes.items()},
        "from_start_seconds": measured.from_start,
        "from_start": from_start_verdict(measured),
    }


def _plain(outcome: Outcome) -> dict[str, object]:
    data = dataclasses.asdict(outcome)
    del data["checksums"]
    return data | {"ready_seconds": outcome.ready_seconds}
