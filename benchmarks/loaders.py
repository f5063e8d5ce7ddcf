"""The contenders' own words: one function each, called in that contender's process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import CASES
from benchmarks.jobs import Job


def quantdock(job: Job) -> Callable[[str], torch.nn.Module]:
    """Import quantdock; what comes back loads a folder."""
    import quantdock

    options: dict[str, Any] = {"quantize": CASES[job.case].preset, "device_map": "cpu", "progress": False}
    if job.memory_budget is not None:
        options["memory_budget"] = job.memory_budget
    if job.workers is not None:
        options["workers"] = job.workers
    return lambda folder: quantdock.load(folder, **options)


def transformers(job: Job) -> Callable[[str], torch.nn.Module]:
    """Import transformers; what comes back loads a folder."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": "cpu"}
    if settings := CASES[job.case].bitsandbytes:
        options["quantization_config"] = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.bfloat16)

    def load(folder: str) -> torch.nn.Module:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
        return model

    return load


CONTENDERS: dict[str, Callable[[Job], Callable[[str], torch.nn.Module]]] = {
    "quantdock": quantdock,
    "transformers": transformers,
}
"""quantdock comes first: the others are compared with it."""
