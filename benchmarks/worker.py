"""The process of one measured load: does a job, given as JSON on standard input, and prints the outcome as JSON.

Nothing heavy is imported at the top: imports are part of what is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import sys
import time
from typing import Any

from benchmarks import contenders, residency
from benchmarks.jobs import Job, Outcome
from benchmarks.machine import versions


def measure(job: Job) -> Outcome:
    """Import, warm up, load, touch."""
    start = time.perf_counter()
    from benchmarks import contents

    load = contenders.loader(job)
    load(job.warm_up)
    gc.collect()
    started = time.perf_counter()

    residency.reset_peak()
    level = residency.level()
    sampler = residency.Sampler() if job.sample else None
    with sampler or contextlib.nullcontext():
        begin, cpu = time.perf_counter(), time.process_time()
        loaded = load(job.folder)
        done = time.perf_counter()
        peak, after = residency.peak(), residency.level()
        touching = time.perf_counter()
        contents.touch(loaded)
        touched, cpu = time.perf_counter(), time.process_time() - cpu
        peak_touched = residency.peak()

    return Outcome(
        start_seconds=started - start,
        load_seconds=done - begin,
        touch_seconds=touched - touching,
        cpu_seconds=cpu,
        level=level.anonymous + level.file,
        peak=peak,
        settled=after.anonymous + after.file,
        peak_touched=peak_touched,
        peak_anonymous=None if sampler is None else sampler.peak_anonymous - level.anonymous,
        peak_file=None if sampler is None else sampler.peak_file - level.file,
        model_nbytes=contents.nbytes(loaded),
        checksums=contents.checksums(loaded) if job.checksums else {},
        versions=versions(),
        threads=_threads(),
        **_own_account(job, loaded),
    )


def _own_account(job: Job, loaded: contenders.Loaded) -> dict[str, Any]:
    if job.contender != contenders.QUANTDOCK:
        return {}
    import quantdock

    report = quantdock.report(loaded)
    return {"predicted_nbytes": report.predicted_nbytes, "stages": dict(report.seconds)}


def _threads() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # what a library prints isn't the answer
    outcome = measure(Job(**json.load(sys.stdin)))
    print(json.dumps(dataclasses.asdict(outcome)), file=answer, flush=True)
