"""Whether the peak of a load stays at the model and the budget when the checkpoint is many times the budget.

Everything is over the level before the load, in MiB. `peak` is the kernel's high-water mark until every page of the
model has been read, `beyond model` what is left of it without the model's tensors, `passing` what was resident at the
peak of the load itself and no longer at its end. `own` and `mapped` are the sampled peaks of the process's own memory
and of mapped files, which the kernel can take back when memory gets tight. `planned` is what the model takes by
quantdock's plan, `model` what it takes in fact.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator

from benchmarks import processes
from benchmarks.cases import ALONE, CASES, METHODS, left_out
from benchmarks.checkpoints import Checkpoint
from benchmarks.contenders import QUANTDOCK, TRANSFORMERS, chosen, in_turns
from benchmarks.jobs import Job, Outcome
from benchmarks.machine import Machine
from benchmarks.options import (
    add_common,
    add_contenders,
    add_loading,
    checkpoints,
    kept,
    prepare_page_cache,
    surroundings,
    write_json,
)
from benchmarks.tables import mib, table

TELLING = 5
"""The checkpoint has to be so many times the budget for a verdict to say much."""
ALLOWANCE = 0.05
"""Of the budget: allocator slack, thread stacks, Python's own objects."""
_ROOM = 0.8
"""Of the machine's memory: what a checkpoint may have for transformers to be tried."""
_AMONG = (QUANTDOCK, TRANSFORMERS)
_HEADER = ("case", "contender", "budget", "planned", "model", "peak", "beyond model", "passing", "own", "mapped")

Worst = dict[tuple[str, str, int | None], Outcome]
"""Case, contender and budget -> the run with the highest peak; other contenders know no budget."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``memory``."""
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=[case for case in CASES if not CASES[case].cached],
        default=[*METHODS, *ALONE],
        help=f"default: {' '.join([*METHODS, *ALONE])}",
    )
    parser.add_argument(
        "--budget", nargs="+", default=["256MiB"], help="quantdock's memory_budget; several are compared"
    )
    add_contenders(parser, among=_AMONG, default=_AMONG)
    add_common(parser, runs=1)
    add_loading(parser, preset="1b")


def run(options: argparse.Namespace) -> int:
    """Measure, print the table and the verdicts; 1 if a contender failed or quantdock exceeded its word."""
    from quantdock.options import parse_bytes

    budgets = sorted((parse_bytes(text, option="--budget") for text in options.budget), reverse=True)
    with kept(options) as cache:
        checkpoint, tiny = checkpoints(options, cache)
        print(checkpoint, flush=True)
        if (reason := _no_room(checkpoint)) is not None:
            print(f"{TRANSFORMERS} left out: {reason}")
            options.contenders = [QUANTDOCK]
        worst: Worst = {}
        failures: dict[str, str] = {}
        absent = left_out(options.cases)
        for case, reason in absent.items():
            print(f"{case} left out: {reason}")
        for case in [case for case in options.cases if case not in absent]:
            try:
                worst |= _measure(case, checkpoint, tiny, budgets, options)
            except processes.ProcessError as error:
                failures[case] = str(error)
                print(f"failed: {error}", file=sys.stderr)
        stored = checkpoint.nbytes
    write_json(options, _as_data(worst, failures, budgets, stored, options))
    if not worst:
        return 1
    _show(worst, budgets, stored, options)
    kept_all = all(budget is None or kept_word(outcome, budget) for (*_, budget), outcome in worst.items())
    return 1 if failures or not kept_all else 0


def _show(worst: Worst, budgets: list[int], stored: int, options: argparse.Namespace) -> None:
    first = next(iter(worst.values()))
    print(Machine.here().header(first.versions, first.threads))
    print(f"files     {options.page_cache} page cache; the worst of {options.runs} runs\n")
    print(table(_HEADER, [_row(*key, outcome) for key, outcome in worst.items()]), "\n")
    for (case, _, budget), outcome in worst.items():
        if budget is not None:
            print(_verdict(case, outcome, budget, stored))
    print("\n".join(_sweep(worst, budgets, stored)))


def _no_room(checkpoint: Checkpoint) -> str | None:
    memory = Machine.here().memory_nbytes
    if checkpoint.nbytes <= _ROOM * memory:
        return None
    return f"a checkpoint of {mib(checkpoint.nbytes)} MiB is too large for {mib(memory)} MiB of memory"


def _measure(
    case: str, checkpoint: Checkpoint, tiny: Checkpoint, budgets: list[int], options: argparse.Namespace
) -> Worst:
    worst: Worst = {}
    names = [name for name in chosen(options.contenders, case) if name in _AMONG]
    asked = [(name, budget) for name in names for budget in (budgets if name == QUANTDOCK else [None])]
    for number in range(options.runs):
        for contender, budget in in_turns(asked, number):
            prepare_page_cache(options, checkpoint.shards)
            job = Job(
                contender=contender,
                case=case,
                folder=str(checkpoint.folder),
                warm_up=str(tiny.folder),
                memory_budget=None if budget is None else str(budget),
                workers=options.workers,
                sample=True,
            )
            outcome = processes.measure(job, surroundings(options))
            known = worst.setdefault((case, contender, budget), outcome)
            if outcome.growth > known.growth:
                worst[case, contender, budget] = outcome
    return worst


def limit(budget: int) -> int:
    """Bytes that may be resident beside the model: the budget and the allowance."""
    return int(budget * (1 + ALLOWANCE))


def within(outcome: Outcome, budget: int) -> bool:
    """Whether the peak beyond the model stayed there, and passing memory, too."""
    return outcome.beyond <= limit(budget)


def kept_word(outcome: Outcome, budget: int) -> bool:
    """Whether it stayed there, and the model takes what the plan said."""
    return within(outcome, budget) and outcome.predicted_nbytes == outcome.model_nbytes


def _verdict(case: str, outcome: Outcome, budget: int, stored: int) -> str:
    words = "within" if within(outcome, budget) else "NOT WITHIN"
    planned = "as planned" if outcome.predicted_nbytes == outcome.model_nbytes else "NOT AS PLANNED"
    little = "" if stored >= TELLING * budget else " (says little)"
    return (
        f"{case}: {words} budget + {ALLOWANCE:.0%} = {mib(limit(budget))} MiB: {mib(outcome.overhead)} MiB beyond the "
        f"model, {mib(outcome.passing)} MiB passing; planned {outcome.predicted_nbytes} bytes, measured "
        f"{outcome.model_nbytes}: {planned}; the checkpoint is {stored / budget:.1f} times the budget{little}"
    )


def _sweep(worst: Worst, budgets: list[int], stored: int) -> Iterator[str]:
    """Whether a smaller budget lowers what is taken beside the model."""
    cases = dict.fromkeys(case for case, *_ in worst)
    for case in cases if len(budgets) > 1 else ():
        taken = [worst[case, QUANTDOCK, budget].beyond for budget in budgets]
        words = "lowers" if taken[-1] < taken[0] else "DOES NOT LOWER"
        if max(taken) <= budgets[-1]:  # whatever the difference is, it isn't the budget's
            words = "doesn't have to lower"
        little = "" if stored >= TELLING * budgets[-1] else " (says little)"
        listed = ", ".join(f"{mib(budget)}: {mib(beyond)}" for budget, beyond in zip(budgets, taken, strict=True))
        yield f"{case}: the smallest budget {words} what is taken beside the model, in MiB: {listed}{little}"


def _row(case: str, contender: str, budget: int | None, outcome: Outcome) -> list[str]:
    return [
        case,
        contender,
        "" if budget is None else mib(budget),
        "" if outcome.predicted_nbytes is None else mib(outcome.predicted_nbytes),
        mib(outcome.model_nbytes),
        mib(outcome.growth),
        mib(outcome.overhead),
        mib(outcome.passing),
        mib(outcome.peak_anonymous or 0),
        mib(outcome.peak_file or 0),
    ]


def _as_data(
    worst: Worst, failures: dict[str, str], budgets: list[int], stored: int, options: argparse.Namespace
) -> dict[str, object]:
    return {
        "benchmark": "memory",
        "machine": dataclasses.asdict(Machine.here()),
        "preset": options.preset,
        "stored_nbytes": stored,
        "memory_budgets": budgets,
        "page_cache": options.page_cache,
        "lines": [
            {
                "case": case,
                "contender": contender,
                "memory_budget": budget,
                "within": None if budget is None else within(outcome, budget),
                "beyond": outcome.beyond,
                "outcome": dataclasses.asdict(outcome),
            }
            for (case, contender, budget), outcome in worst.items()
        ],
        "failures": failures,
    }
