"""The contenders that make a model: one function each, called in that contender's process."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases import CASES
from benchmarks.contenders import Load
from benchmarks.jobs import Job


def quantdock(job: Job) -> Load:
    """``quantdock.load``."""
    import quantdock

    case = CASES[job.case]
    options: dict[str, Any] = {
        "quantize": case.preset,
        "device_map": "cpu",
        "cache": case.cached,
        "progress": False,
    }
    if job.memory_budget is not None:
        options["memory_budget"] = job.memory_budget
    if job.workers is not None:
        options["workers"] = job.workers
    return lambda folder: quantdock.load(folder, **options)


def transformers(job: Job) -> Load:
    """``AutoModelForCausalLM.from_pretrained``."""
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


def accelerate(job: Job) -> Load:
    """accelerate's ``load_checkpoint_and_dispatch`` into transformers' model on the meta device."""
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    def load(folder: str) -> torch.nn.Module:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        model.tie_weights()
        ready: torch.nn.Module = load_checkpoint_and_dispatch(
            model, folder, device_map={"": "cpu"}, dtype=torch.bfloat16
        )
        return ready.eval()

    return load
