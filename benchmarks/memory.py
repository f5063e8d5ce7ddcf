"""Whether the peak of a load stays at the model and the budget when the checkpoint is many times the budget.

Everything is over the level before the load, in MiB. `peak` is the kernel's high-water mark until every page of the
model has been read, `beyond model` what is left of it without the model's tensors, `passing` what was resident at the
peak of the load itself and no longer at its end. `own` and `mapped` are the sampled peaks of the process's own memory
and of mapped files, which the kernel can take back when memory gets tight.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from benchmarks import contenders
from benchmarks.cases import CASES
from benchmarks.jobs import Job, Outcome
from benchmarks.machine import Machine
from benchmarks.options import add_shared, checkpoints, prepare_page_cache, write_json
from benchmarks.tables import mib, table

CONTENDERS = ("quantdock", "transformers")
LEAST_MULTIPLE = 20
"""The checkpoint has to be so many times the budget for the result to say anything."""
ALLOWANCE = 0.10
"""Of model and budget together: allocator slack, thread stacks, Python's own objects."""
_MIB = 2**20
_HEADER = ("case", "contender", "model", "peak", "beyond model", "passing", "own", "mapped", "start")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``memory``."""
    add_shared(parser, preset="1b", runs=1)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["nf4"], help="default: nf4")


def run(options: argparse.Namespace) -> int:
    """Measure, print the table and the verdict; 1 if a contender failed or quantdock exceeded its word."""
    with checkpoints(options) as (checkpoint, tiny):
        budget = _budget(options.budget, checkpoint.nbytes)
        worst: dict[tuple[str, str], Outcome] = {}
        for case in options.cases:
            for number in range(options.runs):
                for contender in contenders.in_turns(list(CONTENDERS), number):
                    prepare_page_cache(options, checkpoint)
                    job = Job(
                        contender=contender,
                        case=case,
                        folder=str(checkpoint.folder),
                        warm_up=str(tiny.folder),
                        memory_budget=str(budget),
                        workers=options.workers,
                        sample=True,
                    )
                    try:
                        outcome = contenders.run(job, threads=options.threads)
                    except contenders.ContenderError as error:
                        print(f"failed: {error}", file=sys.stderr)
                        return 1
                    known = worst.setdefault((case, contender), outcome)
                    if outcome.growth > known.growth:
                        worst[case, contender] = outcome
        stored = checkpoint.nbytes
    first = next(iter(worst.values()))
    print(Machine.here().header(first.versions, first.threads))
    print(f"files     {options.page_cache} page cache; the worst of {options.runs} runs")
    print(f"budget    {mib(budget)} MiB; the checkpoint's {mib(stored)} MiB are {stored / budget:.1f} times that\n")
    print(table(_HEADER, [_row(case, contender, outcome) for (case, contender), outcome in worst.items()]), "\n")
    verdicts = {case: worst[case, "quantdock"] for case in options.cases}
    for case, outcome in verdicts.items():
        print(_verdict(case, outcome, budget))
    write_json(options, _as_data(worst, budget, stored, options))
    return 0 if all(within(outcome, budget) for outcome in verdicts.values()) else 1


def limit(outcome: Outcome, budget: int) -> int:
    """Bytes that quantdock's peak may reach: model, budget and the allowance."""
    return int((outcome.model_nbytes + budget) * (1 + ALLOWANCE))


def within(outcome: Outcome, budget: int) -> bool:
    """Whether it stayed there, and passing memory within the budget and its share of the allowance."""
    return outcome.growth <= limit(outcome, budget) and outcome.passing <= budget * (1 + ALLOWANCE)


def _verdict(case: str, outcome: Outcome, budget: int) -> str:
    words = "within" if within(outcome, budget) else "NOT WITHIN"
    return (
        f"{case}: {words} model + budget + {ALLOWANCE:.0%} = {mib(limit(outcome, budget))} MiB: quantdock's peak is "
        f"{mib(outcome.growth)} MiB, and {mib(outcome.passing)} MiB were passing, "
        f"{outcome.passing / budget:.0%} of the budget"
    )


def _budget(text: str | None, stored: int) -> int:
    """Bytes of ``--budget``; by default a whole number of MiB that the checkpoint is 25 times as large as."""
    from quantdock.options import parse_bytes

    budget = max(1, stored // 25 // _MIB) * _MIB if text is None else parse_bytes(text, option="--budget")
    if stored < LEAST_MULTIPLE * budget:
        raise SystemExit(
            f"--budget {mib(budget)} MiB: the checkpoint has {mib(stored)} MiB, less than {LEAST_MULTIPLE} times that; "
            "take a smaller budget or a larger --preset"
        )
    return budget


def _row(case: str, contender: str, outcome: Outcome) -> list[str]:
    return [
        case,
        contender,
        mib(outcome.model_nbytes),
        mib(outcome.growth),
        mib(outcome.overhead),
        mib(outcome.passing),
        mib(outcome.peak_anonymous or 0),
        mib(outcome.peak_file or 0),
        mib(outcome.level),
    ]


def _as_data(
    worst: dict[tuple[str, str], Outcome], budget: int, stored: int, options: argparse.Namespace
) -> dict[str, object]:
    return {
        "benchmark": "memory",
        "machine": dataclasses.asdict(Machine.here()),
        "preset": options.preset,
        "stored_nbytes": stored,
        "memory_budget": budget,
        "page_cache": options.page_cache,
        "cases": {
            case: {
                "within": within(worst[case, "quantdock"], budget),
                "contenders": {name: dataclasses.asdict(worst[case, name]) for name in CONTENDERS},
            }
            for case in options.cases
        },
    }
