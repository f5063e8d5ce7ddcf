"""The process of one measured plan: takes a ``PlanJob`` as JSON and answers with a ``PlanOutcome``."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import residency
from benchmarks.giants import FACTORIES
from benchmarks.jobs import PlanJob, PlanOutcome
from benchmarks.machine import versions


def measure(job: PlanJob) -> PlanOutcome:
    """Import, plan something tiny, plan."""
    start = time.perf_counter()
    act = _build if job.build_only else _plan
    act(job, job.warm_up)
    gc.collect()
    started = time.perf_counter()

    residency.reset_peak()
    level = residency.level()
    begin = time.perf_counter()
    made = act(job, job.folder)
    seconds = time.perf_counter() - begin
    peak, after = residency.peak(), residency.level()
    before = level.anonymous + level.file
    return PlanOutcome(
        start_seconds=started - start,
        seconds=seconds,
        growth=peak - before,
        held=after.anonymous + after.file - before,
        planned_nbytes=None if job.build_only else made.resident_nbytes,
        stages={} if job.build_only else dict(made.stopwatch.seconds),
        versions=versions(),
    )


def _plan(job: PlanJob, folder: str) -> Any:
    import quantdock

    return quantdock.plan(folder, quantize=job.quantize, model=FACTORIES.get(job.family))


def _build(job: PlanJob, folder: str) -> Any:
    """The model alone on the meta device, as far as any plan needs it and as its own library builds it."""
    import torch

    with torch.device("meta"):
        if (factory := FACTORIES.get(job.family)) is not None:
            return factory(json.loads(Path(folder, "config.json").read_text()))
        from transformers import AutoConfig, AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # what a library prints isn't the answer
    outcome = measure(PlanJob(**json.load(sys.stdin)))
    print(json.dumps(dataclasses.asdict(outcome)), file=answer, flush=True)
