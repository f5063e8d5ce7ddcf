"""Matching stored tensors with parameters where a format has names of its own."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantdock
from quantdock.testing import installed_plugin

sys.path.insert(0, str(Path(__file__).parent))
from plain import IDS, Plain, write_plain

# Nothing is stored under the parameter's own name, as in formats that keep packed words beside scales and zeros.
MODULE = textwrap.dedent(
    '''
    from dataclasses import dataclass
    import torch
    import quantdock
    from quantdock import Layout, TensorSpec, hookimpl

    @dataclass(frozen=True, kw_only=True)
    class Config(quantdock.QuantizationConfig):
        quant_method = "halves"

    class Halves(torch.nn.Module):
        """Keeps the upper and the lower half of each float32 apart."""
        def __init__(self, linear):
            super().__init__()
            shape = linear.weight.shape
            self.register_buffer("upper", torch.empty(shape, dtype=torch.int16, device="meta"))
            self.register_buffer("lower", torch.empty(shape, dtype=torch.int16, device="meta"))
            self.bias = linear.bias
        def forward(self, x):
            weight = torch.stack([self.lower, self.upper], -1).view(torch.float32).squeeze(-1)
            return torch.nn.functional.linear(x, weight, self.bias)

    class Quantizer(quantdock.Quantizer[Config]):
        config_class = Config
        def refusal(self, parameter):
            return None if parameter.role == "linear" else "not linear"
        def layout(self, parameter):
            half = TensorSpec(dtype=torch.int16, shape=parameter.spec.shape)
            return Layout(components={"upper": half, "lower": half})
        def companions(self):
            return {"upper": "weight", "lower": "weight"}
        @hookimpl
        def preprocess_model(self, model):
            for parameter in self.parameters.values():
                model.set_submodule(parameter.module, Halves(model.get_submodule(parameter.module)))
        @hookimpl
        def quantize_param(self, parameter, tensor):
            halves = tensor.view(torch.int16).view(*tensor.shape, 2)
            return {"lower": halves[..., 0].contiguous(), "upper": halves[..., 1].contiguous()}
    '''
)
HALVES = {"quant_method": "halves"}


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path) -> Iterator[None]:
    entry_points = {"quantdock.quantizers": {"halves": "halves_plugin:Quantizer"}}
    with installed_plugin(
        tmp_path / "site",
        dist="quantdock-halves",
        version="1.0",
        entry_points=entry_points,
        modules={"halves_plugin": MODULE},
    ):
        yield


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write_plain(tmp_path / "model")
    return quantdock.save(quantdock.load(tmp_path / "model", model=Plain, quantize=HALVES), tmp_path / "saved")


def rewrite(folder: Path, drop: str = "", **more: torch.Tensor) -> None:
    state = load_file(folder / "model.safetensors")
    state = {name: tensor.clone() for name, tensor in state.items() if name != drop} | more
    save_file(state, folder / "model.safetensors")


def test_it_comes_back_from_names_of_its_own(saved: Path, tmp_path: Path) -> None:
    original = quantdock.load(tmp_path / "model", model=Plain)
    model = quantdock.load(saved, model=Plain)
    assert torch.equal(model(IDS), original(IDS))
    stored = {entry.parameter for entry in quantdock.report(model).ledger.entries if entry.action == "stored"}
    assert stored == {"layers.0.weight", "layers.1.weight"}


def test_a_missing_half_is_named(saved: Path) -> None:
    rewrite(saved, drop="layers.1.lower")
    with pytest.raises(quantdock.LedgerError, match=r"layers\.1\.weight.*'lower' is missing"):
        quantdock.load(saved, model=Plain)


def test_both_halves_missing_is_a_missing_parameter(saved: Path) -> None:
    rewrite(saved, drop="layers.1.lower")
    rewrite(saved, drop="layers.1.upper")
    with pytest.raises(quantdock.LedgerError, match=r"'layers\.1\.weight'.*not in the checkpoint"):
        quantdock.load(saved, model=Plain)


def test_halves_of_no_parameter_are_named(saved: Path) -> None:
    rewrite(saved, **{"stray.upper": torch.ones(2, 2, dtype=torch.int16)})
    with pytest.raises(quantdock.LedgerError, match=r"stored tensor 'stray\.upper'"):
        quantdock.load(saved, model=Plain)
    model = quantdock.load(saved, model=Plain, ignore_unexpected=["stray"])
    assert "stray.upper" in quantdock.report(model).ledger.ignored


def test_halves_of_a_parameter_that_the_method_refuses_are_named(saved: Path) -> None:
    rewrite(saved, drop="norm.weight", **{"norm.upper": torch.ones(32, dtype=torch.int16)})
    with pytest.raises(quantdock.LedgerError, match=r"'norm\.weight' is stored quantized .*not linear"):
        quantdock.load(saved, model=Plain)


def test_placement_counts_the_bytes_of_such_a_parameter(saved: Path) -> None:
    total = quantdock.plan(saved, model=Plain).resident_nbytes
    fits = quantdock.plan(saved, model=Plain, device_map="auto", max_memory={"cpu": total})
    assert fits.placement.single == torch.device("cpu")
    with pytest.raises(quantdock.PlacementError, match=r"is quantized with halves and can't be offloaded"):
        quantdock.plan(saved, model=Plain, device_map="auto", max_memory={"cpu": total - 1})
