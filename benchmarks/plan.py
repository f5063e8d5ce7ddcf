"""How long planning takes when the checkpoint has a trillion parameters, and what it keeps in memory.

100,000 tensors in 1,000 files, of which only the headers are real: a mixture of experts that transformers builds, and
plain linear layers that come from a factory. Each plan has a process of its own, after imports and a tiny plan.
`growth` is the kernel's high-water mark over the level before, `held` what is still resident with the plan made;
`model alone` builds the model on the meta device and plans nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from statistics import median

from benchmarks import processes
from benchmarks.checkpoints import Checkpoint, make
from benchmarks.contenders import in_turns
from benchmarks.giants import GIANTS
from benchmarks.jobs import PlanJob, PlanOutcome
from benchmarks.machine import Machine
from benchmarks.options import add_common, kept, surroundings, write_json
from benchmarks.tables import Spread, mib, table

SECONDS = 3.0
GROWTH = 300 * 10**6
_ALONE = "model alone"
_ASKED = {_ALONE: None, "as it is": None, "bnb-nf4": "bnb-nf4"}
"""What is planned, and the preset."""
_HEADER = ("model", "plan", "tensors", "start s", "plan s", "growth MB", "held MB")
_SLOWEST = 4

Key = tuple[str, str]
"""Family, and what is planned."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``plan``."""
    parser.add_argument("--size", choices=GIANTS, default="trillion", help="of the checkpoints (default: %(default)s)")
    families = list(GIANTS["trillion"])
    parser.add_argument("--models", nargs="+", choices=families, default=families, help="default: all")
    add_common(parser, runs=3)


def run(options: argparse.Namespace) -> int:
    """Measure, print the table and the verdicts; 1 if a plan failed or exceeds the target."""
    presets = {family: GIANTS[options.size][family] for family in options.models}
    tensors = {family: sum(1 for _ in preset.shapes()) for family, preset in presets.items()}
    measured: dict[Key, list[PlanOutcome]] = {}
    failures: dict[str, str] = {}
    with kept(options) as cache:
        for family, preset in presets.items():
            giant = make(options.size, preset, cache, sparse=True)
            tiny = make("tiny", GIANTS["tiny"][family], cache, sparse=True)
            print(giant, flush=True)
            try:
                measured |= _measure(family, giant, tiny, options)
            except processes.ProcessError as error:
                failures[family] = str(error)
                print(f"failed: {error}", file=sys.stderr)
    write_json(options, _as_data(measured, failures, tensors, options))
    if not measured:
        return 1
    first = next(iter(measured.values()))[0]
    print(Machine.here().header(first.versions))
    print(f"runs      {options.runs} each\n")
    print(table(_HEADER, [_row(key, tensors[key[0]], runs) for key, runs in measured.items()]), "\n")
    plans = {key: runs for key, runs in measured.items() if key[1] != _ALONE}
    for key, runs in plans.items():
        print(_verdict(key, runs, measured[key[0], _ALONE]))
    return 1 if failures or not all(map(within, plans.values())) else 0


def _measure(
    family: str, giant: Checkpoint, tiny: Checkpoint, options: argparse.Namespace
) -> dict[Key, list[PlanOutcome]]:
    result: dict[Key, list[PlanOutcome]] = {(family, asked): [] for asked in _ASKED}
    for number in range(options.runs):
        for asked in in_turns(list(_ASKED), number):
            job = PlanJob(
                family=family,
                folder=str(giant.folder),
                warm_up=str(tiny.folder),
                quantize=_ASKED[asked],
                build_only=asked == _ALONE,
            )
            answer, _ = processes.ask("planning", job, surroundings(options))
            result[family, asked].append(PlanOutcome(**answer))
    return result


def within(runs: list[PlanOutcome]) -> bool:
    """Whether planning takes less time and memory than the target; by the medians."""
    return median(one.seconds for one in runs) < SECONDS and median(one.growth for one in runs) < GROWTH


def _verdict(key: Key, runs: list[PlanOutcome], alone: list[PlanOutcome]) -> str:
    seconds, growth = (median(one.seconds for one in runs), median(one.growth for one in runs))
    own_seconds = seconds - median(one.seconds for one in alone)
    own_growth = growth - median(one.growth for one in alone)
    words = "within" if within(runs) else "NOT WITHIN"
    slowest = sorted(runs[0].stages.items(), key=lambda item: -item[1])[:_SLOWEST]
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in slowest)
    return (
        f"{key[0]}, {key[1]}: {words} {SECONDS:.0f} s and {GROWTH / 1e6:.0f} MB: "
        f"{seconds:.2f} s, {growth / 1e6:.0f} MB, of which {own_seconds:.2f} s and {own_growth / 1e6:.0f} MB beyond "
        f"the model alone; the loaded model would take {mib(runs[0].planned_nbytes or 0)} MiB; slowest stages: {stages}"
    )


def _row(key: Key, tensors: int, runs: list[PlanOutcome]) -> list[str]:
    return [
        *key,
        str(tensors),
        str(Spread.of([one.start_seconds for one in runs])),
        str(Spread.of([one.seconds for one in runs])),
        f"{median(one.growth for one in runs) / 1e6:.1f}",
        f"{median(one.held for one in runs) / 1e6:.1f}",
    ]


def _as_data(
    measured: dict[Key, list[PlanOutcome]],
    failures: dict[str, str],
    tensors: dict[str, int],
    options: argparse.Namespace,
) -> dict[str, object]:
    return {
        "benchmark": "plan",
        "machine": dataclasses.asdict(Machine.here()),
        "size": options.size,
        "lines": [
            {
                "model": family,
                "plan": asked,
                "tensors": tensors[family],
                "within": None if asked == _ALONE else within(runs),
                "outcomes": [dataclasses.asdict(one) for one in runs],
            }
            for (family, asked), runs in measured.items()
        ],
        "failures": failures,
    }
