"""The contenders that make a model: one function each, called in that contender's process."""

from __future__ import annotations

from collections.abc import Mapping
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
    config = CASES[job.case].config
    assert config is not None, f"transformers doesn't do {job.case} here; contenders.py knows"
    return _from_pretrained(config)


def torchao_float8(job: Job) -> Load:
    """``AutoModelForCausalLM.from_pretrained`` with torchao's float8, whatever the case asks for."""
    return _from_pretrained(CASES["torchao-float8"].config or {})


def _from_pretrained(config: Mapping[str, Any]) -> Load:
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoQuantizationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": "cpu"}

    def load(folder: str) -> torch.nn.Module:
        # The config is made anew each time: transformers writes into it.
        quantization = {"quantization_config": AutoQuantizationConfig.from_dict({**config})} if config else {}
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options, **quantization)
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
