"""Whether calibrating a model while it loads keeps at most two of its blocks in full precision.

Everything is over the level before the load, in MiB. `beyond` is the kernel's high-water mark without the model's own
tensors; `samples` and `method` are what the plan says is kept of the samples, and what the method allocates for one
block (Hessians, temporaries). `in blocks` is what is left of `beyond` without these two, in full-precision blocks: at
most, because a method may declare more than it takes. `seen` is the most weights of blocks in full precision that were
there at any of several looks a second, in blocks, too.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from benchmarks import processes
from benchmarks.calibrating import CalibrationJob, CalibrationOutcome
from benchmarks.machine import Machine
from benchmarks.options import add_common, add_loading, checkpoints, kept, positive, surroundings, write_json
from benchmarks.tables import mib, table

BLOCKS = 2
"""In full precision, at the most."""
CASES: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
}
_HEADER = ("case", "seconds", "model", "one block", "beyond", "samples", "method", "in blocks", "seen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``calibrate``."""
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--samples", type=positive, default=8, help="of random tokens (default: %(default)s)")
    parser.add_argument("--length", type=positive, default=128, help="tokens of each sample (default: %(default)s)")
    add_common(parser, runs=1)
    add_loading(parser, preset="1b")


def run(options: argparse.Namespace) -> int:
    """Measure, print the table and the verdicts; 1 if one isn't kept."""
    with kept(options) as cache:
        checkpoint, tiny = checkpoints(options, cache)
        print(checkpoint, flush=True)
        measured = {
            case: _worst(CASES[case], str(checkpoint.folder), str(tiny.folder), options) for case in options.cases
        }
    write_json(options, {case: dataclasses.asdict(outcome) for case, outcome in measured.items()})
    print(Machine.here().header(next(iter(measured.values())).versions))
    print(f"data      {options.samples} samples of {options.length} tokens; the worst of {options.runs} runs\n")
    print(table(_HEADER, [_row(case, outcome) for case, outcome in measured.items()]), "\n")
    for case, outcome in measured.items():
        print(_verdict(case, outcome))
    return 0 if all(map(holds, measured.values())) else 1


def _worst(config: dict[str, Any], folder: str, warm_up: str, options: argparse.Namespace) -> CalibrationOutcome:
    job = CalibrationJob(folder=folder, warm_up=warm_up, config=config, samples=options.samples, length=options.length)
    runs = [
        CalibrationOutcome(**processes.ask("calibrating", job, surroundings(options))[0]) for _ in range(options.runs)
    ]
    return max(runs, key=lambda outcome: outcome.growth)


def in_blocks(outcome: CalibrationOutcome) -> float:
    """What is resident beyond the model, the samples and the method's own memory, in full-precision blocks."""
    return (outcome.beyond - outcome.input_nbytes - outcome.working_nbytes) / outcome.largest_block_nbytes


def seen(outcome: CalibrationOutcome) -> float:
    """The most weights of blocks that there were in full precision, in blocks."""
    return outcome.seen_nbytes / outcome.largest_block_nbytes


def holds(outcome: CalibrationOutcome) -> bool:
    """Whether both are at most two, the peak is within the plan's bound, and the model takes what the plan says."""
    return (
        max(in_blocks(outcome), seen(outcome)) <= BLOCKS
        and outcome.growth <= outcome.peak_nbytes
        and outcome.model_nbytes == outcome.predicted_nbytes
    )


def _verdict(case: str, outcome: CalibrationOutcome) -> str:
    words = "holds" if holds(outcome) else "DOES NOT HOLD"
    return (
        f"{case}: {words}: at most {BLOCKS} blocks in full precision ({in_blocks(outcome):.2f} by the peak, "
        f"{seen(outcome):.2f} seen in {outcome.looks} looks), the peak "
        f"({outcome.growth} bytes) within the plan's bound ({outcome.peak_nbytes}), the model as planned "
        f"({outcome.predicted_nbytes} bytes planned, {outcome.model_nbytes} measured)"
    )


def _row(case: str, outcome: CalibrationOutcome) -> list[str]:
    return [
        case,
        f"{outcome.seconds:.1f}",
        mib(outcome.model_nbytes),
        mib(outcome.largest_block_nbytes),
        mib(outcome.beyond),
        mib(outcome.input_nbytes),
        mib(outcome.working_nbytes),
        f"{in_blocks(outcome):.2f}",
        f"{seen(outcome):.2f}",
    ]
