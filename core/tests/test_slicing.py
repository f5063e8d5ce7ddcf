"""Parameters that are quantized slice by slice: the same bits, less memory, the same errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import quantdock
from quantdock import hookimpl
from quantdock.conversion import Piece
from quantdock.slicing import part_of
from quantdock.staging import Staging
from quantdock.testing import installed_plugin
from quantdock.units import SLICE

sys.path.insert(0, str(Path(__file__).parent))
from broken_toys import EXAMPLE

SLICED = """
import dataclasses
import torch
from quantdock import Slices, hookimpl
from quantdock_toy import ToyConfig, ToyQuantizer, quantize

class Config(ToyConfig):
    quant_method = "sliced"

class Sliced(ToyQuantizer):
    config_class = Config
    def layout(self, parameter):
        slices = Slices(dim=0, multiple=16, working_bytes=4096, working_copies=4)
        return dataclasses.replace(super().layout(parameter), slices=slices)
    def quantize_slice(self, parameter, tensor, start, parts):
        assert start % 16 == 0 and tensor.dtype == parameter.spec.dtype
        if parameter.name == "broken.weight" and start:
            raise RuntimeError("the kernel said no")
        weight, scale = quantize(tensor)
        parts["weight"][start : start + len(tensor)] = weight
        parts["weight_scale"][start : start + len(tensor)] = scale
"""

ROWS, COLUMNS = 8400, 2048


class Watching:
    """A stage plugin that wants to see ``quantize_param`` called, and so keeps parameters in one piece."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @hookimpl(tryfirst=True)
    def quantize_param(self, parameter: quantdock.Parameter) -> None:
        self.seen.append(parameter.name)


@pytest.fixture
def sliced(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """``load``'s arguments for a method that quantizes in slices."""
    modules = {"quantdock_toy": EXAMPLE.read_text(encoding="utf-8"), "sliced_toy": SLICED}
    entry_points = {"quantdock.quantizers": {"sliced": "sliced_toy:Sliced"}}
    with installed_plugin(
        tmp_path / "site", dist="sliced-toy", version="1.0", entry_points=entry_points, modules=modules
    ):
        yield {"quantize": {"quant_method": "sliced"}}


def write(folder: Path, name: str = "large", dtype: torch.dtype = torch.bfloat16) -> None:
    folder.mkdir(parents=True)
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({f"{name}.weight": values, "small.weight": values[:32, :32].clone()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"name": name}))


class Model(nn.Module):
    def __init__(self, config: dict[str, str]) -> None:
        super().__init__()
        self.add_module(config["name"], nn.Linear(COLUMNS, ROWS, bias=False))
        self.small = nn.Linear(32, 32, bias=False)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_slices_give_the_same_bits_as_the_whole(tmp_path: Path, sliced: dict[str, Any], stored: torch.dtype) -> None:
    write(tmp_path / "model", dtype=stored)
    whole = Watching()
    options: dict[str, Any] = {**sliced, "model": Model, "dtype": "bfloat16", "workers": 3}
    expected = quantdock.load(tmp_path / "model", **options, plugins=[whole]).state_dict()
    assert sorted(whole.seen) == ["large.weight", "small.weight"]
    plan = quantdock.plan(tmp_path / "model", **options)
    cuts = {unit.targets[0].parameter.name: unit.cut for unit in plan.units}
    assert cuts["small.weight"] is None
    cut = cuts["large.weight"]
    assert cut is not None
    assert cut.mapped == (stored == torch.bfloat16)
    assert cut.count > 2
    assert all(start % 16 == 0 for start, _ in cut)
    found = plan.execute().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_slices_need_the_memory_of_slices(tmp_path: Path, sliced: dict[str, Any]) -> None:
    write(tmp_path / "model")
    options: dict[str, Any] = {**sliced, "model": Model, "workers": 2}
    whole = quantdock.plan(tmp_path / "model", **options, plugins=[Watching()])
    plan = quantdock.plan(tmp_path / "model", **options, memory_budget="1MiB")
    assert whole.largest_unit_nbytes > 9 * ROWS * COLUMNS
    assert plan.largest_unit_nbytes <= 6 * SLICE
    report = quantdock.report(plan.execute())
    assert report.in_flight_peak_nbytes == plan.largest_unit_nbytes, "larger than the budget: one at a time"


def test_an_error_in_a_slice_names_its_place(tmp_path: Path, sliced: dict[str, Any]) -> None:
    write(tmp_path / "model", name="broken")
    with pytest.raises(quantdock.LoadError, match="RuntimeError: the kernel said no") as caught:
        quantdock.load(tmp_path / "model", model=Model, **sliced)
    assert caught.value.parameter == "broken.weight"
    assert caught.value.file == tmp_path / "model" / "model.safetensors"
    assert "sliced-toy 1.0" in str(caught.value)


def test_progress_counts_a_sliced_parameter_once(tmp_path: Path, sliced: dict[str, Any]) -> None:
    write(tmp_path / "model")
    seen: list[Any] = []
    quantdock.load(tmp_path / "model", model=Model, **sliced, progress=seen.append)
    assert [one.parameters for one in seen] == [1, 2]
    assert seen[-1].stored_nbytes == seen[-1].total_nbytes == 2 * (ROWS * COLUMNS + 32 * 32)


@st.composite
def assemblies(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, torch.Tensor], list[Piece]]:
    """A target of up to three dimensions, stacked along the first or concatenated along one of them, or both."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=2, max_size=3)))
    stacked = draw(st.booleans())
    axis = draw(st.integers(1 if stacked else 0, len(shape) - 1))
    at = draw(st.integers(0, shape[axis]))
    runs = [(begin, end) for begin, end in ((0, at), (at, shape[axis])) if begin < end]
    sources: dict[str, torch.Tensor] = {}
    pieces = []
    for first in range(shape[0]) if stacked else [None]:
        for begin, end in runs:
            into = [slice(None)] * axis + [slice(begin, end)]
            kept = list(shape)
            kept[axis] = end - begin
            if first is not None:
                into, kept = [first, *into[1:]], kept[1:]  # type: ignore[list-item]
            permute = tuple(draw(st.permutations(range(len(kept)))))
            name = f"{first}.{begin}"
            back = [permute.index(index) for index in range(len(kept))]
            values = torch.randn(kept).permute(back) if kept else torch.randn(())
            sources[name] = values.contiguous()
            pieces.append(Piece(source=name, into=tuple(into), permute=permute))
    return shape, sources, pieces


@settings(max_examples=200, deadline=None)
@given(assembly=assemblies(), data=st.data())
def test_slices_of_assemblies_are_the_slices_of_the_whole(
    assembly: tuple[tuple[int, ...], dict[str, torch.Tensor], list[Piece]], data: st.DataObject
) -> None:
    shape, sources, pieces = assembly
    whole = torch.full(shape, torch.nan)
    for piece in pieces:
        whole[piece.into] = piece.of(sources[piece.source])
    assert not whole.isnan().any()
    dim = data.draw(st.integers(0, len(shape) - 1))
    rows = data.draw(st.integers(1, shape[dim]))
    with Staging() as staging:
        for start in range(0, shape[dim], rows):
            expected = whole.narrow(dim, start, min(rows, shape[dim] - start))
            found = torch.full(expected.shape, torch.nan)
            for piece in pieces:
                part = part_of(piece, dim, shape[dim], start, start + rows)
                if part is not None:
                    staging.copy(part.of(piece.of(sources[piece.source])), found[part.into], drop=False)
            assert torch.equal(found, expected)
