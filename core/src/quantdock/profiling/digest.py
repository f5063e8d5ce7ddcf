"""What a recording amounts to: sums per stage, thread, kind and parameter, and the curves of the page."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from quantdock import __version__
from quantdock.profiling import facts
from quantdock.profiling.sampler import Sample

BINS = 600
"""Intervals for which rates are given."""
BRIEF_SPANS, BRIEF_PARAMETERS, BRIEF_SAMPLES, BRIEF_LABEL = 3000, 100, 600, 160
"""What a page takes at most: spans with their details, parameters, samples of memory, characters of a name."""
RATES = ("read", "quantize")
"""Kinds whose bytes per second are shown."""
LOAD_STAGE = "load"
"""The stage in which the engine runs."""


class Span(NamedTuple):
    """A block of work that was timed; times on the clock of ``time.perf_counter_ns``."""

    kind: str
    label: str
    thread: tuple[str, int]
    """Name and ident."""
    start: int
    end: int
    nbytes: int
    failed: bool


class Segment(NamedTuple):
    """A stretch of a thread's time, and the innermost span that it belongs to."""

    start: int
    end: int
    span: Span


@dataclass(frozen=True, kw_only=True)
class Material:
    """A recording, as it was recorded."""

    started: float
    """Seconds since the epoch."""
    start: int
    end: int
    spans: Sequence[Span]
    stages: Sequence[Span]
    samples: Sequence[Sample]
    sampled: str
    plan: Mapping[str, Any] | None
    report: Mapping[str, Any] | None
    error: Mapping[str, str] | None

    @cached_property
    def worked(self) -> Mapping[tuple[str, int], Sequence[Segment]]:
        """What each thread did; threads are sorted by name, numbers in names by value."""
        threads: dict[tuple[str, int], list[Span]] = {}
        for span in self.spans:
            threads.setdefault(span.thread, []).append(span)
        return {thread: segments(threads[thread]) for thread in sorted(threads, key=_natural)}


def _natural(thread: tuple[str, int]) -> tuple[list[tuple[int, str]], int]:
    parts = re.findall(r"\d+|\D+", thread[0])
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], thread[1]


def segments(spans: Iterable[Span]) -> list[Segment]:
    """The spans of one thread as stretches that don't overlap, in order; each belongs to the innermost span."""
    result: list[Segment] = []
    stack: list[Span] = []
    reached = 0

    def advance(until: int) -> None:
        nonlocal reached
        while stack:
            end = min(stack[-1].end, until)
            if end > reached:
                result.append(Segment(reached, end, stack[-1]))
                reached = end
            if stack[-1].end > until:
                break
            stack.pop()
        reached = max(reached, until)

    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        advance(span.start)
        stack.append(span)
    advance(max((span.end for span in stack), default=0))
    return result


def digest(material: Material, *, brief: bool = False) -> dict[str, Any]:
    """A recording as JSON-ready data; ``brief`` for a page, which takes only so much of it."""
    worked = material.worked
    outcome = "failed" if material.error is not None else "unfinished" if material.report is None else "loaded"
    plan = material.plan or {}
    return {
        "quantdock": __version__,
        "recorded": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(material.started)),
        "outcome": outcome,
        "error": material.error,
        "seconds": _seconds(material.end - material.start),
        "stages": _stages(material),
        "kinds": _kinds(material.spans, worked.values()),
        "threads": [_thread(name, worked[name, ident]) for name, ident in worked],
        "parameters": _parameters(material.spans, worked.values(), brief=brief),
        "memory": _memory(material, brief=brief),
        "rates": _rates(material),
        "timeline": _timeline(material, brief=brief),
        "plan": material.plan,
        "report": material.report,
        "machine": facts.machine(),
        "versions": facts.versions(plan.get("plugins", {})),
    }


def _seconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1e9, 7)


def _stages(material: Material) -> list[dict[str, Any]]:
    return [
        {
            "name": stage.label,
            "start": _seconds(stage.start - material.start),
            "seconds": _seconds(stage.end - stage.start),
            "failed": stage.failed,
        }
        for stage in sorted(material.stages, key=lambda stage: stage.start)
    ]


def _summed(worked: Iterable[Segment], key: Callable[[Segment], str]) -> dict[str, float]:
    """Seconds under ``key``."""
    total: dict[str, int] = defaultdict(int)
    for segment in worked:
        total[key(segment)] += segment.end - segment.start
    return {name: _seconds(amount) for name, amount in total.items()}


def _kinds(spans: Sequence[Span], worked: Iterable[Sequence[Segment]]) -> list[dict[str, Any]]:
    """Totals per kind: a nested span's ``seconds`` aren't those of the one around it; ``within`` has them, too."""
    seconds = _summed((one for many in worked for one in many), lambda segment: segment.span.kind)
    totals: dict[str, dict[str, Any]] = {}
    for span in spans:
        fresh = {"kind": span.kind, "spans": 0, "seconds": seconds.get(span.kind, 0.0), "within": 0.0, "nbytes": 0}
        total = totals.setdefault(span.kind, fresh)
        total["within"] += _seconds(span.end - span.start)
        total["spans"] += 1
        total["nbytes"] += span.nbytes
    return sorted(totals.values(), key=lambda total: -float(total["seconds"]))


def _thread(name: str, worked: Sequence[Segment]) -> dict[str, Any]:
    return {"name": name, "kinds": _summed(worked, lambda segment: segment.span.kind)}


def _parameters(spans: Sequence[Span], worked: Iterable[Sequence[Segment]], *, brief: bool) -> list[dict[str, Any]]:
    """Time per parameter, the slowest first; bytes are those of its largest kind."""
    seconds: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for segment in (one for many in worked for one in many):
        seconds[segment.span.label][segment.span.kind] += segment.end - segment.start
    nbytes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for span in spans:
        nbytes[span.label][span.kind] += span.nbytes
    slowest = sorted(nbytes, key=lambda name: -sum(seconds[name].values()))
    return [
        {
            "name": shortened(name) if brief else name,
            "seconds": _seconds(sum(seconds[name].values())),
            "nbytes": max(nbytes[name].values()),
            "kinds": {kind: _seconds(amount) for kind, amount in seconds[name].items()},
        }
        for name in (slowest[:BRIEF_PARAMETERS] if brief else slowest)
    ]


def _memory(material: Material, *, brief: bool) -> dict[str, Any]:
    samples = thinned(material.samples, BRIEF_SAMPLES) if brief else material.samples
    plan = material.plan
    began = next((stage.start for stage in material.stages if stage.label == LOAD_STAGE), None)
    before = [sample for sample in material.samples if began is not None and sample.at <= began]
    known = material.samples and max(sample.own for sample in material.samples) > 0
    baseline = before[-1].own + before[-1].mapped if before and known else None
    predicted = None
    if plan is not None and baseline is not None:
        predicted = {
            "loaded": baseline + plan["host_nbytes"],
            "peak": baseline + plan["host_nbytes"] + plan["peak_nbytes"] - plan["resident_nbytes"],
        }
    return {
        "sampled": material.sampled,
        "known": bool(known),
        "baseline": baseline,
        "predicted": predicted,
        "peak": max((sample.own + sample.mapped for sample in material.samples), default=0),
        "in_flight_peak": max((sample.in_flight for sample in material.samples), default=0),
        "at": [_seconds(sample.at - material.start) for sample in samples],
        "own": [sample.own for sample in samples],
        "mapped": [sample.mapped for sample in samples],
        "in_flight": [sample.in_flight for sample in samples],
    }


def thinned(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most ``most`` samples: of neighbours, the highest of each value."""
    step = -(-len(samples) // most) if samples else 1
    groups = [samples[start : start + step] for start in range(0, len(samples), step)]
    return [Sample(group[0].at, *(max(column) for column in list(zip(*group, strict=True))[1:])) for group in groups]


def _rates(material: Material) -> dict[str, Any]:
    """Bytes per second in ``BINS`` intervals of the recording; a span's bytes are spread evenly over its time."""
    width = max(1, -(-(material.end - material.start) // BINS))
    rates: dict[str, Any] = {"interval": width / 1e9}
    for kind in RATES:
        bins = [0.0] * BINS
        for span in material.spans:
            if span.kind == kind:
                _spread(span, material.start, width, bins)
        rates[kind] = [round(amount * 1e9 / width) for amount in bins]
    return rates


def _spread(span: Span, origin: int, width: int, bins: list[float]) -> None:
    start, end = span.start - origin, max(span.end, span.start + 1) - origin
    for index in range(max(0, start // width), min(len(bins), (end - 1) // width + 1)):
        shared = min(end, (index + 1) * width) - max(start, index * width)
        bins[index] += span.nbytes * shared / (end - start)


def _timeline(material: Material, *, brief: bool) -> dict[str, Any]:
    """Spans as rows of numbers; ``brief`` keeps the longest."""
    threads = {thread: index for index, thread in enumerate(material.worked)}
    chosen: Sequence[Span] = material.spans
    if brief and len(chosen) > BRIEF_SPANS:
        chosen = sorted(chosen, key=lambda span: span.start - span.end)[:BRIEF_SPANS]
    kinds: dict[str, int] = {}
    labels: dict[str, int] = {}
    rows = [
        (
            kinds.setdefault(span.kind, len(kinds)),
            labels.setdefault(shortened(span.label) if brief else span.label, len(labels)),
            threads[span.thread],
            (span.start - material.start) // 1000,
            (span.end - span.start) // 1000,
            span.nbytes,
            int(span.failed),
        )
        for span in sorted(chosen, key=lambda span: span.start)
    ]
    return {
        "columns": ["kind", "label", "thread", "start_us", "us", "nbytes", "failed"],
        "kinds": list(kinds),
        "labels": list(labels),
        "threads": [name for name, _ in threads],
        "spans": rows,
        "left_out": len(material.spans) - len(rows),
    }


def shortened(name: str) -> str:
    """A name's beginning and end, if it is too long for a page: it comes from a file and may be of any length."""
    if len(name) <= BRIEF_LABEL:
        return name
    return f"{name[: BRIEF_LABEL // 2]}…{name[-BRIEF_LABEL // 2 :]}"
