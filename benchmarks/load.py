"""How long loads take, unquantized and quantized on the way, beside transformers and others.

Seconds are medians (least-most). `start` is every import and a tiny load, `load` the load itself, `ready` the load and
reading one byte of each page of the model: a loader that maps its files leaves that to the first use. `times` says how
many times as long as quantdock a contender takes until ready, `/ floor` how many times as long as a program that only
does the quantizing, `cpu` the processor time of all threads until then. MiB are the resident peak over the level before
the load, with every page of the model in memory. `process` is measured apart, from outside: from the start of a process
until its model is ready.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path

from benchmarks import comparison, processes, series
from benchmarks.cases import CASES, left_out
from benchmarks.checkpoints import Checkpoint
from benchmarks.contenders import CONTENDERS, QUANTDOCK, chosen
from benchmarks.options import add_common, add_contenders, add_loading, checkpoints, kept, surroundings, write_json
from benchmarks.series import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``load``."""
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    add_contenders(parser, among=list(CONTENDERS))
    add_timing(parser)


def add_timing(parser: argparse.ArgumentParser) -> None:
    """What ``load`` and ``reload`` have in common."""
    add_common(parser, runs=5)
    add_loading(parser, preset="1b")
    parser.add_argument("--budget", help="quantdock's memory_budget, such as 96MiB")
    parser.add_argument(
        "--whole-process", action="store_true", help="measure from the start of the process, too, in as many runs"
    )


def run(options: argparse.Namespace) -> int:
    """Measure all cases, print the table; 1 if a contender failed. Ctrl-C ends it with the cases that are done."""
    with kept(options) as cache:
        checkpoint, tiny = checkpoints(options, cache)
        print(checkpoint, flush=True)
        absent = left_out(options.cases)
        cases = [case for case in options.cases if case not in absent]
        requests = {case: partial(_request, case, checkpoint, tiny, cache, options) for case in cases}
        measured = series.run(requests, options)
        write_json(options, comparison.as_data("load", measured, checkpoint, options))
    comparison.show(measured, options)
    for case, reason in absent.items():
        print(f"{case} left out: {reason}")
    return 1 if measured.failures else 0


def _request(case: str, checkpoint: Checkpoint, tiny: Checkpoint, cache: Path, options: argparse.Namespace) -> Request:
    request = Request(
        case=case,
        folder=checkpoint.folder,
        warm_up=tiny.folder,
        contenders=chosen(options.contenders, case),
        files=checkpoint.shards,
    )
    return _primed(request, cache / "quantdock-cache", options) if CASES[case].cached else request


def _primed(request: Request, place: Path, options: argparse.Namespace) -> Request:
    """The same request, after quantdock has put its result into its cache in an earlier process."""
    request = dataclasses.replace(request, variables={"QUANTDOCK_CACHE_DIR": str(place)})
    processes.measure(request.job(QUANTDOCK, options), surroundings(options, request.variables))
    cached = sorted(place.rglob("*.safetensors"))
    return dataclasses.replace(request, files=[*request.files, *cached])
