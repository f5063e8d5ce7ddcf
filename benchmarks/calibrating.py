"""The process of one measured calibration: takes a ``CalibrationJob`` as JSON; answers with its outcome."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks import residency
from benchmarks.machine import versions


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationJob:
    """Load one checkpoint, calibrated on random tokens."""

    folder: str
    warm_up: str
    config: Mapping[str, Any]
    samples: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationOutcome:
    """What it took; memory in bytes."""

    seconds: float
    growth: int
    """Peak over the level before, until every page of the model had been read."""
    model_nbytes: int
    predicted_nbytes: int
    """What the plan said the model would take."""
    peak_nbytes: int
    """The plan's upper bound for model and load."""
    input_nbytes: int
    """What the plan says is kept of the samples."""
    working_nbytes: int
    """What the plan says the method allocates for one block: statistics and temporaries."""
    largest_block_nbytes: int
    """Weights of the largest block in full precision."""
    seen_nbytes: int
    """The most that weights of blocks took in full precision, of all looks at what there is."""
    looks: int
    versions: Mapping[str, str]

    @property
    def beyond(self) -> int:
        """Peak beyond the model's own bytes."""
        return self.growth - self.model_nbytes


def measure(job: CalibrationJob) -> CalibrationOutcome:
    """Import, calibrate something tiny, plan, calibrate."""
    import quantdock
    from benchmarks import contents
    from benchmarks.alive import Alive

    config = {**job.config, "dataset": _tokens(job), "batch_size": 1}
    quantdock.load(job.warm_up, quantize=config, progress=False)
    plan = quantdock.plan(job.folder, quantize=config)
    calibrating = plan.calibrating
    assert calibrating is not None, "the config has a dataset"
    blocks = [list(found.values()) for found in calibrating.parameters.values()]
    working = max(
        chosen.quantizer.calibration_bytes(block, calibrating.batches.largest)
        for chosen in calibrating.chosen
        for block in blocks
    )
    shapes = {parameter.spec.shape for block in blocks for parameter in block}
    (dtype,) = {parameter.spec.dtype for block in blocks for parameter in block}
    facts = {
        "predicted_nbytes": plan.resident_nbytes,
        "peak_nbytes": plan.peak_nbytes,
        "input_nbytes": calibrating.input_nbytes,
        "working_nbytes": working,
        "largest_block_nbytes": max(sum(parameter.spec.nbytes for parameter in block) for block in blocks),
    }
    del plan, calibrating, blocks
    gc.collect()

    residency.reset_peak()
    level = residency.level()
    start = time.perf_counter()
    with Alive(shapes, dtype) as alive:
        model = quantdock.load(job.folder, quantize=config, progress=False)
    seconds = time.perf_counter() - start
    contents.touch(model)
    return CalibrationOutcome(
        seconds=seconds,
        growth=residency.peak() - level.anonymous - level.file,
        model_nbytes=quantdock.report(model).measured_nbytes,
        seen_nbytes=alive.most,
        looks=alive.looks,
        versions=versions(),
        **facts,
    )


def _tokens(job: CalibrationJob) -> list[list[int]]:
    import torch

    made = torch.Generator().manual_seed(0)
    return torch.randint(1, 250, (job.samples, job.length), generator=made).tolist()  # type: ignore[no-any-return]


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # what a library prints isn't the answer
    outcome = measure(CalibrationJob(**json.load(sys.stdin)))
    print(json.dumps(dataclasses.asdict(outcome)), file=answer, flush=True)
