"""The conformance suite, tested on toys that are broken in one way each: the test that is about it fails, no other."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from quantdock.testing import PeakBytes, QuantizerConformance, installed_plugin

sys.path.insert(0, str(Path(__file__).parent))
from broken_toys import EXAMPLE, PRELUDE, TOYS, Toy

IN_NEW_PROCESSES = frozenset(
    {
        "test_listing_imports_nothing",
        "test_other_loads_leave_the_plugin_alone",
        "test_naming_imports_nothing_heavy",
        "test_loads_share_no_state",
        "test_load_leaves_no_trace",
    }
)
"""Tests that start a Python, which takes seconds: the sound toys run them all, the others those that they fail."""

TESTS = """
import pytest
from quantdock.testing import QuantizerConformance
import broken_toy

class TestBroken(QuantizerConformance):
    method = "broken"
    configs = (broken_toy.Broken.config_class(),)
    presets = ("broken-int8",)
    min_sqnr_db = 38.0
"""


class Outcomes:
    """A pytest plugin that keeps the names of the tests that passed and that failed."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2].partition("[")[0]
        if report.failed:
            self.failed.add(name)
        elif report.passed and report.when == "call":
            self.passed.add(name)


def run_suite(folder: Path, toy: Toy, *options: str) -> Outcomes:
    """The suite's verdict on a toy; in this process, so that torch is imported once."""
    body = textwrap.indent(toy.quantizer, "    ") or "    pass\n"
    module = f"{PRELUDE}{body}\n{toy.module}\nINT8 = Broken.config_class()\n"
    entry_points = {
        "quantdock.quantizers": {"broken": "broken_toy:Broken"},
        "quantdock.presets": {"broken-int8": "broken_toy:INT8"},
    } | toy.entry_points
    modules = {"quantdock_toy": EXAMPLE.read_text(encoding="utf-8"), "broken_toy": module} | toy.modules
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n", encoding="utf-8")
    file = folder / "test_broken.py"
    file.write_text(TESTS + textwrap.indent(toy.tests, "    "), encoding="utf-8")
    found = Outcomes()
    fixed = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}"]
    with installed_plugin(folder, dist="broken-toy", version="1.2.3", entry_points=entry_points, modules=modules):
        pytest.main([*fixed, "-c", str(folder / "pytest.ini"), str(file), *options], plugins=[found])
    sys.modules.pop("test_broken", None)  # the next toy's has the same name
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_suite_finds_exactly_what_is_broken(tmp_path: Path, name: str) -> None:
    toy = TOYS[name]
    left_out = sorted(IN_NEW_PROCESSES - toy.fails) if toy.fails else []
    found = run_suite(tmp_path, toy, "-k", " and ".join(f"not {test}" for test in left_out))
    assert found.failed == toy.fails
    assert found.passed, "nothing was run"


def test_each_test_of_the_suite_has_a_toy_that_fails_it() -> None:
    tests = {name for name in dir(QuantizerConformance) if name.startswith("test_")}
    broken = set().union(*(toy.fails for toy in TOYS.values()))
    # The report is the core's; no plugin can make it say something else.
    assert tests - broken == {"test_report_names_the_plugin"}


def test_each_test_of_the_suite_says_what_to_do_when_it_fails() -> None:
    for name in dir(QuantizerConformance):
        if name.startswith("test_"):
            assert "When it fails:" in (getattr(QuantizerConformance, name).__doc__ or ""), name


def test_a_test_is_replaced_only_by_an_xfail_with_a_reason() -> None:
    name = "test_two_loads_are_equal"

    def replacement(self: QuantizerConformance) -> None: ...

    with pytest.raises(TypeError, match=rf"Mine.{name} replaces a test of the suite. Mark it @pytest.mark.xfail"):
        type("Mine", (QuantizerConformance,), {name: replacement})
    with pytest.raises(TypeError, match="replaces a test of the suite"):
        type("Mine", (QuantizerConformance,), {name: None})
    with pytest.raises(TypeError, match="replaces a test of the suite"):
        type("Mine", (type("Mixin", (), {name: replacement}), QuantizerConformance), {})
    with pytest.raises(TypeError, match="replaces a test of the suite"):
        type("Mine", (QuantizerConformance,), {name: pytest.mark.xfail(replacement)})
    type("Mine", (QuantizerConformance,), {name: pytest.mark.xfail(reason="rounds at random")(replacement)})


def test_what_is_marked_xfail_is_no_failure(tmp_path: Path) -> None:
    known = """
@pytest.mark.xfail(reason="rounds at random")
def test_two_loads_are_equal(self, folder, config):
    super().test_two_loads_are_equal(folder, config)
"""
    toy = dataclasses.replace(TOYS["rounds at random"], tests=known)
    found = run_suite(tmp_path, toy, "-k", "test_two_loads_are_equal or test_workers_change_nothing")
    assert found.failed == {"test_workers_change_nothing"}


def test_a_suite_without_a_config_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = Toy(fails=frozenset(), tests="configs = ()\npresets = ()")
    assert not run_suite(tmp_path, toy, "--collect-only").passed
    assert "TestBroken sets neither configs nor presets" in capsys.readouterr().out


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    given = torch.ones(1000)
    with PeakBytes([given]) as measure:
        a = given * 2  # 4000 bytes
        b = a + a  # 8000
        del a
        b += 1  # in place: nothing new
        c = b[:500].double()  # 8000: one thing went, a view is nothing, 4000 came
        del b, c
        given.clone()
    assert measure.peak == 8000
