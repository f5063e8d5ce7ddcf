"""How long checkpoints take that are stored quantized, beside transformers, which reads the same files.

They are made once with quantdock.save. The columns are those of `load`.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path

from benchmarks import comparison, processes, series
from benchmarks.cases import AS_STORED, METHODS
from benchmarks.checkpoints import Checkpoint
from benchmarks.contenders import QUANTDOCK, TRANSFORMERS, chosen
from benchmarks.jobs import SaveJob
from benchmarks.load import add_timing
from benchmarks.options import add_contenders, checkpoints, kept, surroundings, write_json
from benchmarks.series import Request

_AMONG = (QUANTDOCK, TRANSFORMERS, "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``reload``."""
    default = ["nf4", "nf4-dq", "int8"]
    parser.add_argument(
        "--cases", nargs="+", choices=METHODS, default=default, help=f"how it is stored (default: {' '.join(default)})"
    )
    add_contenders(parser, among=_AMONG, default=(QUANTDOCK, TRANSFORMERS))
    add_timing(parser)


def run(options: argparse.Namespace) -> int:
    """Measure all cases, print the table; 1 if a contender failed. Ctrl-C ends it with the cases that are done."""
    with kept(options) as cache:
        checkpoint, tiny = checkpoints(options, cache)
        print(checkpoint, flush=True)
        requests = {case: partial(_request, case, checkpoint, tiny, options) for case in options.cases}
        measured = series.run(requests, options)
        write_json(options, comparison.as_data("reload", measured, checkpoint, options))
    comparison.show(measured, options)
    return 1 if measured.failures else 0


def _request(case: str, checkpoint: Checkpoint, tiny: Checkpoint, options: argparse.Namespace) -> Request:
    stored = saved(case, checkpoint, options)
    names = [name for name in chosen(options.contenders, AS_STORED) if name in _AMONG]
    return Request(
        case=AS_STORED,
        folder=stored.folder,
        warm_up=saved(case, tiny, options).folder,
        contenders=names,
        files=stored.shards,
    )


def saved(case: str, checkpoint: Checkpoint, options: argparse.Namespace) -> Checkpoint:
    """The checkpoint as quantdock saves it, quantized, beside the original; made now if it isn't there.

    Raises:
        ProcessError: it couldn't be made.
    """
    folder: Path = checkpoint.folder.with_name(f"{checkpoint.folder.name}-{case}")
    if not folder.is_dir():
        job = SaveJob(folder=str(checkpoint.folder), quantize=str(METHODS[case].preset), target=str(folder))
        processes.ask("saving", job, surroundings(options))
    return dataclasses.replace(checkpoint, folder=folder)
