"""The documentation's plugin, installed from its folder like a stranger's: conformance, a round trip, a policy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import quantdock
from quantdock.testing import QuantizerConformance, SmallModel, in_new_process, write_checkpoint

HERE = Path(__file__).parent
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module", autouse=True)
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The plugin as ``make setup`` installed it, or installed from its folder for this module."""
    try:
        importlib.metadata.distribution("quantdock-toy")
    except importlib.metadata.PackageNotFoundError:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(_install(tmp_path_factory.mktemp("toy")))
            yield
    else:
        yield


def _install(target: Path) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.fail("quantdock-toy isn't installed and can't be built without hatchling; run make setup")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", f"--target={target}", str(HERE / "toy_plugin")], check=True
    )
    return target


class TestToy(QuantizerConformance):
    method = "toy"
    presets = ("toy-int8",)
    min_sqnr_db = 38.0


def test_the_guide_shows_this_very_class() -> None:
    guide = (HERE.parent / "docs" / "writing-a-plugin.md").read_text(encoding="utf-8")
    assert inspect.getsource(TestToy).strip() in guide


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_it_is_installed_as_a_copy_with_no_dependency_but_quantdock() -> None:
    distribution = importlib.metadata.distribution("quantdock-toy")
    assert distribution.requires == ["quantdock<0.2,>=0.1"]
    installed = Path(str(distribution.locate_file("quantdock_toy.py")))
    assert installed.read_bytes() == (HERE / "toy_plugin" / "quantdock_toy.py").read_bytes()
    assert installed.parent != HERE / "toy_plugin"


def test_quantize_save_and_load_again(folder: Path, tmp_path: Path) -> None:
    model = quantdock.load(folder, model=SmallModel, quantize="toy-int8")
    saved = quantdock.save(model, tmp_path / "saved")
    again = quantdock.load(saved, model=SmallModel)
    assert torch.equal(model(IDS), again(IDS))
    assert {entry.action for entry in quantdock.report(again).ledger.entries if entry.method} == {"stored"}
    smaller = quantdock.report(again).measured_nbytes
    assert smaller < quantdock.report(quantdock.load(folder, model=SmallModel)).measured_nbytes


def test_patterns_choose_what_it_gets(folder: Path) -> None:
    model = quantdock.load(folder, model=SmallModel, quantize={"blocks.0": None, "*.up": "toy-int8"})
    methods = {entry.parameter: entry.method for entry in quantdock.report(model).ledger.entries if entry.method}
    assert methods == {"blocks.1.up.weight": "toy-int8"}


def test_a_runtime_field_can_be_overridden_and_a_storage_field_cannot(folder: Path, tmp_path: Path) -> None:
    saved = quantdock.save(quantdock.load(folder, model=SmallModel, quantize="toy-int8"), tmp_path / "saved")
    model = quantdock.load(saved, model=SmallModel, quantize={"quant_method": "toy", "compute_dtype": "bfloat16"})
    assert model.get_submodule("blocks.0.up").compute_dtype == torch.bfloat16
    with pytest.raises(quantdock.ConfigError, match=r"ToyConfig\.bits is 4, expected 8"):
        quantdock.load(saved, model=SmallModel, quantize={"quant_method": "toy", "bits": 4})


_DENIED = """
import sys, quantdock
from quantdock.testing import SmallModel
try:
    quantdock.load(sys.argv[1], model=SmallModel, quantize="toy-int8", policy=sys.argv[2])
except quantdock.PolicyError as error:
    print(error)
print("quantdock_toy" in sys.modules)
"""


def test_a_policy_that_denies_it_keeps_its_module_out(folder: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('[plugins]\ndeny = ["quantdock-toy"]\n', encoding="utf-8")
    message, imported = in_new_process("-c", _DENIED, str(folder), str(policy)).splitlines()
    assert "'toy-int8' is offered by quantdock-toy 0.1.0, which the policy refuses" in message
    assert imported == "False"
