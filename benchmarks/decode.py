"""How fast loaded models generate, one token at a time, beside the same model loaded by transformers.

Tokens per second, the best of all repeats. `prefill` is the whole prompt at once, `decode` what follows, always the
likeliest token and always as many. `times` says how many times as long as quantdock's model a contender's takes. The
tokens are compared with quantdock's of the same case. Before that come single layers beside bfloat16 (layers.py),
and checkpoints of GPTQ and AWQ beside transformers with gptqmodel (generation.py), each with limits to keep.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import generation, layers, packed, processes
from benchmarks.cases import AS_STORED, METHODS
from benchmarks.contenders import LLAMA_CPP, QUANTDOCK, TRANSFORMERS, in_turns
from benchmarks.jobs import DecodeJob, DecodeOutcome, Job
from benchmarks.machine import Machine, versions
from benchmarks.options import add_common, add_loading, checkpoints, kept, positive, surroundings, write_json
from benchmarks.tables import table

PARTS = ("layers", "packed", "models")
_DEFAULT = (AS_STORED, "nf4", "int8")
_HEADER = ("case", "contender", "prefill tok/s", "times", "decode tok/s", "times", "same tokens")

Runs = dict[tuple[str, str], list[DecodeOutcome]]
"""Case and contender -> its processes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``decode``."""
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured (default: all of it)"
    )
    parser.add_argument(
        "--cases", nargs="+", choices=[AS_STORED, *METHODS], default=list(_DEFAULT), help="how it is loaded"
    )
    parser.add_argument(
        "--reference-python",
        type=Path,
        metavar="PATH",
        help="an interpreter whose environment has transformers and gptqmodel, if this one's hasn't",
    )
    parser.add_argument(
        "--packed", choices=packed.SHAPES, default="wide", help="checkpoints of GPTQ and AWQ (default: %(default)s)"
    )
    parser.add_argument(
        "--layers",
        type=_shape,
        nargs="+",
        default=list(layers.SHAPES),
        metavar="OUTxIN",
        help="shapes of single layers",
    )
    parser.add_argument("--copies", type=positive, default=8, help="of each layer, in turns (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="a checkpoint of your own instead of --preset's")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama.cpp, if it is installed")
    parser.add_argument("--prompt", type=positive, default=256, help="tokens to read (default: %(default)s)")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--repeats", type=positive, default=3, help="in each process (default: %(default)s)")
    add_common(parser, runs=1)
    add_loading(parser, preset="1b")


def run(options: argparse.Namespace) -> int:
    """Measure, print the tables; 1 if a contender failed, two models of one case say different things, or a limit
    isn't kept."""
    single: list[layers.Layers] = []
    stored: list[generation.Generation] = []
    runs: Runs = {}
    failures: dict[str, str] = {}
    why_not = "no --gguf was given"
    print(Machine.here().header(versions()), flush=True)
    with kept(options) as cache:
        with _failing("layers", failures):
            if "layers" in options.parts:
                single = layers.measure(options.layers, options.repeats * 3, options.copies, surroundings(options))
                print(f"threads   {single[0].outcome.threads}\n\n{layers.report(single)}", flush=True)
        for method in packed.CONFIGS if "packed" in options.parts else ():
            with _failing(method, failures):
                stored.append(generation.measure(method, cache, options))
        if stored:
            print(f"\n{generation.report(stored, options)}", flush=True)
        if "models" in options.parts:
            why_not = _models(options, cache, runs, failures)
    write_json(options, _as_data(runs, failures, why_not, options) | _limited(single, stored))
    within = layers.kept(single) and all(one.reached for one in stored)
    return 1 if failures or not within or not all(_sameness(runs, options).values()) else 0


@contextlib.contextmanager
def _failing(part: str, failures: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except processes.ProcessError as error:
        failures[part] = str(error)
        print(f"failed: {error}", file=sys.stderr)


def _limited(single: list[layers.Layers], stored: list[generation.Generation]) -> dict[str, object]:
    return {"layers": layers.as_data(single), "packed": generation.as_data(stored)}


def _models(options: argparse.Namespace, cache: Path, runs: Runs, failures: dict[str, str]) -> str:
    """Measure whole models into ``runs`` and print them; why llama.cpp is left out, or nothing."""
    folder = options.folder or checkpoints(options, cache)[0].folder
    for case in options.cases:
        with _failing(case, failures):
            runs |= _measure(case, (QUANTDOCK, TRANSFORMERS), folder, options)
    why_not = "no --gguf was given"
    if options.gguf is not None:
        try:
            runs |= _measure(options.gguf.stem, (LLAMA_CPP,), options.gguf.resolve(), options)
            why_not = ""
        except processes.ProcessError as error:
            why_not = error.reason
    if runs:
        print(f"\nmodel     {options.folder or options.preset}; {options.prompt} read, {options.tokens} generated")
        print(f"threads   {next(iter(runs.values()))[0].threads}\n")
        print(table(_HEADER, list(_rows(runs, options))))
    if why_not:
        print(f"\n{LLAMA_CPP} left out: {why_not}")
    return why_not


def _shape(text: str) -> tuple[int, int]:
    outputs, _, inputs = text.partition("x")
    return positive(outputs), positive(inputs)


def _measure(case: str, names: tuple[str, ...], folder: Path, options: argparse.Namespace) -> Runs:
    runs: Runs = {(case, name): [] for name in names}
    for number in range(options.runs):
        for name in in_turns(names, number):
            load = Job(contender=name, case=case, folder=str(folder), warm_up="", workers=options.workers)
            job = DecodeJob(load=load, prompt=options.prompt, tokens=options.tokens, repeats=options.repeats)
            answer, _ = processes.ask("decoding", job, surroundings(options))
            runs[case, name].append(DecodeOutcome(**answer))
        print(f"{case}: run {number + 1} of {options.runs}", file=sys.stderr, flush=True)
    return runs


def prefill(runs: list[DecodeOutcome]) -> float:
    """Least seconds for the prompt."""
    return min(seconds for one in runs for seconds in one.prefill_seconds)


def decode(runs: list[DecodeOutcome]) -> float:
    """Least seconds for the generated tokens."""
    return min(seconds for one in runs for seconds in one.decode_seconds)


def same(runs: Runs, case: str) -> bool:
    """Whether both models of a case generate the same tokens, each time."""
    return len({tuple(one.tokens) for name in (QUANTDOCK, TRANSFORMERS) for one in runs[case, name]}) == 1


def _sameness(runs: Runs, options: argparse.Namespace) -> dict[str, bool]:
    return {case: same(runs, case) for case in options.cases if (case, QUANTDOCK) in runs}


def _rows(runs: Runs, options: argparse.Namespace) -> Iterator[list[str]]:
    for (case, contender), own in runs.items():
        base = runs.get((case, QUANTDOCK))
        other = base is not None and contender != QUANTDOCK
        yield [
            case,
            contender,
            f"{options.prompt / prefill(own):.1f}",
            f"{prefill(own) / prefill(base):.2f}" if base is not None and other else "",
            f"{(options.tokens - 1) / decode(own):.2f}",
            f"{decode(own) / decode(base):.2f}" if base is not None and other else "",
            ("yes" if same(runs, case) else "NO") if other else "",
        ]


def _as_data(runs: Runs, failures: dict[str, str], why_not: str, options: argparse.Namespace) -> dict[str, object]:
    return {
        "benchmark": "decode",
        "machine": dataclasses.asdict(Machine.here()),
        "model": str(options.folder or options.preset),
        "prompt": options.prompt,
        "tokens": options.tokens,
        "left_out": {LLAMA_CPP: why_not} if why_not else {},
        "same": _sameness(runs, options),
        "failures": failures,
        "lines": [
            {
                "case": case,
                "contender": contender,
                "prefill_per_second": options.prompt / prefill(own),
                "decode_per_second": (options.tokens - 1) / decode(own),
                "outcomes": [dataclasses.asdict(one) for one in own],
            }
            for (case, contender), own in runs.items()
        ],
    }
