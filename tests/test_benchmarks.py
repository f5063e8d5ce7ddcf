"""The benchmarks run and compare like with like; what they measure is nothing a test could rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = ("bf16", "nf4")
SLACK = 0.02
"""A loader may keep one code book for the model where another has one per weight."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``load`` writes about the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("benchmarks")
    arguments = ["load", "--preset", "tiny", "--runs", "1", "--cache", str(folder), "--json", str(folder / "out.json")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments, "--cases", *CASES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for case in CASES:
        assert f"\n{case}" in done.stdout
    result: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return result


@pytest.mark.slow
def test_every_case_has_both_contenders(report: dict[str, Any]) -> None:
    assert report["failures"] == {}
    assert list(report["cases"]) == list(CASES)
    for case in report["cases"].values():
        assert list(case["contenders"]) == ["quantdock", "transformers"]
        for (outcome,) in case["contenders"].values():
            assert outcome["ready_seconds"] >= outcome["load_seconds"] > 0
            assert outcome["peak_touched"] >= outcome["level"] > 0
            assert outcome["versions"].keys() >= {"torch", "transformers", "quantdock"}


@pytest.mark.slow
def test_both_contenders_hold_the_same_model(report: dict[str, Any]) -> None:
    for name, case in report["cases"].items():
        assert case["differing"] == [], name
        ours, theirs = (outcome["model_nbytes"] for (outcome,) in case["contenders"].values())
        assert ours == pytest.approx(theirs, rel=SLACK if name != "bf16" else 0), name


@pytest.mark.slow
def test_quantdock_accounts_for_its_seconds(report: dict[str, Any]) -> None:
    for case in report["cases"].values():
        (outcome,) = case["contenders"]["quantdock"]
        assert 0 < sum(outcome["stages"].values()) <= outcome["load_seconds"]
