"""The worker process: does one job, given as JSON on standard input, and prints the outcome as one line of JSON.

Nothing heavy is imported at the top: imports are part of what is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from benchmarks import residency
from benchmarks.jobs import Job, Outcome

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "transformers", "bitsandbytes", "quantdock", "quantdock-bnb", "quantdock-transformers")


def measure(job: Job) -> Outcome:
    """Import, warm up, load, touch."""
    start = time.perf_counter()
    from benchmarks import contents
    from benchmarks.loaders import CONTENDERS

    load = CONTENDERS[job.contender](job)
    load(job.warm_up)
    gc.collect()
    started = time.perf_counter()

    residency.reset_peak()
    level = residency.level()
    sampler = residency.Sampler() if job.sample else None
    with sampler or contextlib.nullcontext():
        begin, cpu = time.perf_counter(), time.process_time()
        model = load(job.folder)
        loaded = time.perf_counter()
        peak, after = residency.peak(), residency.level()
        touching = time.perf_counter()
        contents.touch(model)
        touched, cpu = time.perf_counter(), time.process_time() - cpu
        peak_touched = residency.peak()

    return Outcome(
        start_seconds=started - start,
        load_seconds=loaded - begin,
        touch_seconds=touched - touching,
        cpu_seconds=cpu,
        level=level.anonymous + level.file,
        peak=peak,
        settled=after.anonymous + after.file,
        peak_touched=peak_touched,
        peak_anonymous=None if sampler is None else sampler.peak_anonymous - level.anonymous,
        peak_file=None if sampler is None else sampler.peak_file - level.file,
        model_nbytes=contents.nbytes(model),
        stages=_stages(job, model),
        checksums=contents.checksums(model) if job.checksums else {},
        versions=_versions(),
        threads=_threads(),
    )


def _stages(job: Job, model: torch.nn.Module) -> dict[str, float]:
    if job.contender != "quantdock":
        return {}
    import quantdock

    return dict(quantdock.report(model).seconds)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # what a library prints isn't the answer
    outcome = measure(Job(**json.load(sys.stdin)))
    print(json.dumps(dataclasses.asdict(outcome)), file=answer)
