"""Every causal-LM architecture of the installed transformers loads as transformers itself loads it."""

from __future__ import annotations

import pytest
from tests.conftest import TinyFactory
from tests.reference import assert_same_model
from tests.tiny_models import UNMAKEABLE, causal_lm_architectures

import quantdock

ARCHITECTURES = [tiny.model_type for tiny in causal_lm_architectures()]


def test_there_are_at_least_130_architectures() -> None:
    assert len(ARCHITECTURES) >= 130
    assert not set(ARCHITECTURES) & UNMAKEABLE.keys()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_same_class_state_and_logits(model_type: str, tiny: TinyFactory) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny(model_type)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ours = quantdock.load(folder)
    assert_same_model(ours, theirs)
    report = quantdock.report(ours)
    assert report.predicted_nbytes == report.measured_nbytes


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "bart", "mamba2", "gpt2", "deepseek_v3"])
def test_same_model_in_another_dtype(model_type: str, dtype: str, tiny: TinyFactory) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny(model_type)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert_same_model(quantdock.load(folder, dtype=dtype), theirs)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "llama4"])
def test_experts_are_stacked_without_a_second_copy(model_type: str, tiny: TinyFactory) -> None:
    """Experts that a checkpoint stores one by one go straight to their place in the fused parameter."""
    plan = quantdock.plan(tiny(model_type))
    stacked = [unit for unit in plan.units if unit.conversion is not None and not unit.conversion.is_rename]
    for unit in stacked:
        assert unit.conversion is not None
        assert unit.conversion.assemblies is not None, f"{unit.targets[0].parameter.name} needs a copy of its own"


def test_workers_make_no_difference(tiny: TinyFactory) -> None:
    folder = tiny("mixtral")
    assert_same_model(quantdock.load(folder, workers=4), quantdock.load(folder, workers=1))
