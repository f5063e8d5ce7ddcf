"""The benchmarks run and compare like with like; what they measure is nothing a test could rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SLACK = 0.02
"""A loader may keep one code book for the model where another has one per weight."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny checkpoints are made, once for all benchmarks."""
    return tmp_path_factory.mktemp("benchmarks")


def run(command: str, cache: Path, *arguments: str, statuses: tuple[int, ...] = (0,)) -> tuple[dict[str, Any], str]:
    """What one benchmark writes as JSON, and what it prints; its exit status has to be one of ``statuses``."""
    target = cache / f"{command}.json"
    options = ["--runs", "1", "--cache", str(cache), "--json", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", command, *arguments, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in statuses, done.stdout + done.stderr
    return json.loads(target.read_text()), done.stdout


@pytest.fixture(scope="module")
def load(cache: Path) -> dict[str, Any]:
    """``load`` with everybody who needs no further package."""
    names = ["quantdock", "transformers", "floor", "accelerate", "safetensors"]
    data, text = run("load", cache, "--preset", "tiny", "--cases", "bf16", "nf4", "--contenders", *names)
    assert "\nbf16 " in text
    assert "\nnf4 " in text
    return data


def test_every_case_has_its_contenders(load: dict[str, Any]) -> None:
    assert load["failures"] == {}
    assert list(load["cases"]) == ["bf16", "nf4"]
    assert {"quantdock", "transformers", "accelerate", "safetensors"} == load["cases"]["bf16"]["contenders"].keys()
    nf4 = load["cases"]["nf4"]
    assert nf4["contenders"].keys() | nf4["left_out"].keys() == {"quantdock", "transformers", "floor"}
    for case in load["cases"].values():
        assert case["ratios"].keys() == case["contenders"].keys() - {"quantdock"}
        for (outcome,) in case["contenders"].values():
            assert outcome["ready_seconds"] >= outcome["load_seconds"] > 0
            assert outcome["peak_touched"] >= outcome["level"] > 0
            assert outcome["versions"].keys() >= {"torch", "transformers", "quantdock", "operations on"}


def test_the_floor_is_measured_where_there_are_kernels(load: dict[str, Any]) -> None:
    nf4 = load["cases"]["nf4"]
    if nf4["left_out"]:
        assert "quantdock_kernels" in nf4["left_out"]["floor"] or "quantdock-kernels" in nf4["left_out"]["floor"]
        assert nf4["over_floor"] is None
    else:
        assert nf4["over_floor"] > 0


def test_all_contenders_have_the_same_bits(load: dict[str, Any]) -> None:
    for name, case in load["cases"].items():
        assert not any(case["differing"].values()), name
        ours, theirs = (case["contenders"][contender][0]["model_nbytes"] for contender in ("quantdock", "transformers"))
        assert ours == pytest.approx(theirs, rel=SLACK if name != "bf16" else 0), name


def test_quantdock_accounts_for_its_seconds_and_bytes(load: dict[str, Any]) -> None:
    for case in load["cases"].values():
        (outcome,) = case["contenders"]["quantdock"]
        assert 0 < sum(outcome["stages"].values()) <= outcome["load_seconds"]
        assert outcome["predicted_nbytes"] == outcome["model_nbytes"]


def test_a_second_load_comes_from_the_cache_and_processes_are_measured_as_a_whole(cache: Path) -> None:
    arguments = ("--preset", "tiny", "--cases", "nf4-cached", "--whole-process")
    data, text = run("load", cache, *arguments)
    case = data["cases"]["nf4-cached"]
    assert case["differing"] == {"transformers": []}
    assert list((cache / "quantdock-cache").rglob("*.safetensors"))
    for name, runs in case["contenders"].items():
        assert case["from_start_seconds"][name][0] > runs[0]["ready_seconds"]
    assert isinstance(case["from_start"]["within"], bool)
    assert "from the start of the process" in text


def test_an_optional_contender_that_cannot_run_is_left_out_with_the_reason(cache: Path) -> None:
    data, text = run("load", cache, "--preset", "tiny", "--cases", "bf16", "--contenders", "instanttensor")
    case = data["cases"]["bf16"]
    assert list(case["contenders"]) == ["quantdock"]
    reason = case["left_out"]["instanttensor"]  # it needs CUDA where it is installed
    assert "No module named 'instanttensor'" in reason or "CUDA" in reason
    assert f"bf16: instanttensor left out: {reason}" in text


def test_tensors_within_tensors_are_compared(cache: Path) -> None:
    """torchao's; and FP8, whose contender makes some of the tensors, and another that is to make others."""
    data, text = run("load", cache, "--preset", "tiny", "--cases", "torchao-int8", "fp8")
    assert data["failures"] == {}
    torchao, fp8 = data["cases"]["torchao-int8"], data["cases"]["fp8"]
    assert torchao["differing"] == {"transformers": []}
    ours, theirs = (torchao["contenders"][name][0] for name in ("quantdock", "transformers"))
    assert ours["model_nbytes"] == theirs["model_nbytes"] == ours["predicted_nbytes"]
    assert fp8["differing"] == {"transformers' function": [], "transformers, torchao": None}
    assert "transformers' function: " in text


def test_reload_reads_what_quantdock_saved(cache: Path) -> None:
    data, text = run("reload", cache, "--preset", "tiny", "--cases", "nf4-dq")
    assert data["failures"] == {}
    case = data["cases"]["nf4-dq"]
    assert case["differing"] == {"transformers": []}
    (ours,), (theirs,) = (case["contenders"][name] for name in ("quantdock", "transformers"))
    assert ours["model_nbytes"] == pytest.approx(theirs["model_nbytes"], rel=SLACK)
    assert ours["model_nbytes"] < data["stored_nbytes"] / 2
    assert "\nnf4-dq " in text


def test_memory_compares_budgets_and_the_plan_with_the_model(cache: Path) -> None:
    arguments = ("--cases", "nf4", "--contenders", "quantdock", "--budget", "64MiB", "128MiB")
    data, text = run("memory", cache, "--preset", "tiny-experts", *arguments)
    assert [line["memory_budget"] for line in data["lines"]] == [128 * 2**20, 64 * 2**20]
    for line in data["lines"]:
        outcome = line["outcome"]
        assert outcome["predicted_nbytes"] == outcome["model_nbytes"]
        assert outcome["peak_anonymous"] is not None
        assert line["within"] == (line["beyond"] <= line["memory_budget"] * 1.05)
    assert "nf4: the smallest budget" in text


def test_plans_of_both_kinds_of_model_are_measured(cache: Path) -> None:
    data, text = run("plan", cache, "--size", "tiny")
    lines = {(line["model"], line["plan"]): line for line in data["lines"]}
    assert {model for model, _ in lines} == {"deepseek", "linears"}
    for model in ("deepseek", "linears"):
        plain, quantized = (lines[model, plan]["outcomes"][0]["planned_nbytes"] for plan in ("as it is", "bnb-nf4"))
        assert plain > quantized > 0
        assert lines[model, "model alone"]["outcomes"][0]["planned_nbytes"] is None
        assert f"{model}, bnb-nf4: within" in text


def test_both_models_generate_the_same(cache: Path) -> None:
    arguments = ("--parts", "models", "--preset", "tiny", "--cases", "nf4", "--prompt", "8", "--tokens", "4")
    data, text = run("decode", cache, *arguments, "--repeats", "2")
    assert data["same"] == {"nf4": True}
    assert [line["contender"] for line in data["lines"]] == ["quantdock", "transformers"]
    for line in data["lines"]:
        (outcome,) = line["outcomes"]
        assert len(outcome["tokens"]) == 4
        assert len(outcome["decode_seconds"]) == 2
        assert line["decode_per_second"] > 0
    assert "llama.cpp left out: no --gguf was given" in text


def test_layers_and_packed_checkpoints_are_compared(cache: Path) -> None:
    arguments = ("--parts", "layers", "packed", "--packed", "tiny", "--layers", "64x128", "--copies", "2")
    settings = ("--prompt", "4", "--tokens", "3", "--repeats", "1")
    data, text = run("decode", cache, *arguments, *settings, statuses=(0, 1))  # so small, they tell nothing of speed
    assert data["failures"] == {}
    (layers,) = data["layers"]
    seconds = layers["outcome"]["seconds"]
    assert seconds.keys() == {"bf16", "gptq-int4", "gptq-int8", "fp8-block"}
    assert all(len(rows) == 2 and min(map(min, rows)) > 0 for rows in seconds.values())
    assert layers["outcome"]["paths"].keys() == seconds.keys() - {"bf16"}
    assert layers["reached"].keys() == seconds.keys() - {"bf16"}
    assert [one["checkpoint"] for one in data["packed"]] == ["gptq", "awq"]
    for one in data["packed"]:
        ours = {line["dtype"]: line["outcomes"][0] for line in one["lines"] if line["contender"] == "quantdock"}
        assert ours.keys() == {"float16", "bfloat16"}
        assert all(len(outcome["tokens"]) == 3 and any(outcome["logits"]) for outcome in ours.values())
        if one["left_out"]:  # no gptqmodel here
            assert f"{one['checkpoint']}: transformers left out: {one['left_out']}" in text
        else:
            assert len(one["lines"]) == 4
