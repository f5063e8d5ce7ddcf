"""How long loads take, unquantized and quantized on the way, beside transformers with the same backend.

Seconds are medians (least-most). `start` is every import and a tiny load, `load` the load itself, `ready` the load and
reading one byte of each page of the model: a loader that maps its files leaves that to the first use. `times` says how
many times as long transformers takes until ready, `cpu` the processor time of all threads until then. MiB are the
resident peak over the level before the load, with every page of the model in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from statistics import median

from benchmarks import contenders
from benchmarks.cases import CASES
from benchmarks.checkpoints import Checkpoint
from benchmarks.jobs import Job, Outcome
from benchmarks.machine import Machine
from benchmarks.options import add_shared, checkpoints, prepare_page_cache, write_json
from benchmarks.tables import Spread, mib, table

CONTENDERS = ("quantdock", "transformers")
_HEADER = (
    "case",
    "contender",
    "start s",
    "load s",
    "ready s",
    "times",
    "cpu s",
    "peak MiB",
    "model MiB",
    "same tensors",
)

Outcomes = dict[str, list[Outcome]]
"""Contender -> its runs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``load``."""
    add_shared(parser, preset="1b", runs=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")


def run(options: argparse.Namespace) -> int:
    """Measure all cases, print the table; 1 if a contender failed. Ctrl-C ends it with the cases that are done."""
    measured: dict[str, Outcomes] = {}
    failures: dict[str, str] = {}
    with checkpoints(options) as (checkpoint, tiny):
        print(f"{checkpoint.preset}: {checkpoint.nbytes / 1e9:.2f} GB in {len(checkpoint.shards)} files", flush=True)
        for case in options.cases:
            try:
                measured[case] = _measure(case, checkpoint, tiny, options)
            except contenders.ContenderError as error:
                failures[case] = str(error)
                print(f"failed: {error}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                failures[case] = "interrupted"
                break
            else:
                print(f"{case}: ready after {_summary(measured[case])}", file=sys.stderr, flush=True)
        write_json(options, _as_data(measured, failures, checkpoint, options))
    if measured:
        first = next(iter(measured.values()))["transformers"][0]
        print(Machine.here().header(first.versions, first.threads))
        print(f"files     {options.page_cache} page cache, {options.runs} runs each\n")
        print(table(_HEADER, [row for case, outcomes in measured.items() for row in _rows(case, outcomes)]))
    return 1 if failures else 0


def _summary(outcomes: Outcomes) -> str:
    seconds = {name: Spread.of([one.ready_seconds for one in runs]) for name, runs in outcomes.items()}
    return ", ".join(f"{name} {spread} s" for name, spread in seconds.items())


def _measure(case: str, checkpoint: Checkpoint, tiny: Checkpoint, options: argparse.Namespace) -> Outcomes:
    outcomes: Outcomes = {contender: [] for contender in CONTENDERS}
    for number in range(options.runs):
        for contender in contenders.in_turns(list(CONTENDERS), number):
            prepare_page_cache(options, checkpoint)
            job = Job(
                contender=contender,
                case=case,
                folder=str(checkpoint.folder),
                warm_up=str(tiny.folder),
                memory_budget=options.budget,
                workers=options.workers,
                checksums=number == 0,
            )
            outcomes[contender].append(contenders.run(job, threads=options.threads))
    return outcomes


def ratio(outcomes: Outcomes, contender: str) -> float:
    """How many times quantdock's seconds a contender takes until its model is ready."""
    ready = {name: median(one.ready_seconds for one in runs) for name, runs in outcomes.items()}
    return ready[contender] / ready["quantdock"]


def differing(outcomes: Outcomes, contender: str) -> list[str]:
    """Names of the state dict that aren't there, or not the same bits, in both models."""
    ours, theirs = outcomes["quantdock"][0].checksums, outcomes[contender][0].checksums
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _rows(case: str, outcomes: Outcomes) -> list[list[str]]:
    return [
        [
            case,
            contender,
            str(Spread.of([one.start_seconds for one in runs])),
            str(Spread.of([one.load_seconds for one in runs])),
            str(Spread.of([one.ready_seconds for one in runs])),
            "" if contender == "quantdock" else f"{ratio(outcomes, contender):.2f}",
            f"{median(one.cpu_seconds for one in runs):.2f}",
            mib(median(one.growth for one in runs)),
            mib(runs[0].model_nbytes),
            "" if contender == "quantdock" else _sameness(differing(outcomes, contender)),
        ]
        for contender, runs in outcomes.items()
    ]


def _sameness(names: Sequence[str]) -> str:
    return f"{len(names)} differ" if names else "yes"


def _as_data(
    measured: dict[str, Outcomes], failures: dict[str, str], checkpoint: Checkpoint, options: argparse.Namespace
) -> dict[str, object]:
    return {
        "benchmark": "load",
        "machine": dataclasses.asdict(Machine.here()),
        "preset": checkpoint.preset,
        "stored_nbytes": checkpoint.nbytes,
        "page_cache": options.page_cache,
        "runs": options.runs,
        "cases": {
            case: {
                "ratio": ratio(outcomes, "transformers"),
                "differing": differing(outcomes, "transformers"),
                "contenders": {name: [_plain(one) for one in runs] for name, runs in outcomes.items()},
            }
            for case, outcomes in measured.items()
        },
        "failures": failures,
    }


def _plain(outcome: Outcome) -> dict[str, object]:
    data = dataclasses.asdict(outcome)
    del data["checksums"]
    return data | {"ready_seconds": outcome.ready_seconds}
