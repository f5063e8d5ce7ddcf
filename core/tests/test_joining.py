"""Parameters that a checkpoint holds in several quantized pieces; quantizer and architecture are made up for it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantdock
from quantdock import Architecture, Assembly, Conversion, Piece, Routing, Skeleton, TensorSpec, hookimpl
from quantdock.testing import installed_plugin

EXPERTS, ROWS, COLUMNS = 3, 6, 5

MODULE = textwrap.dedent(
    """
    from dataclasses import dataclass
    import torch
    import quantdock
    from quantdock import Assembly, Layout, Piece, TensorSpec, hookimpl

    @dataclass(frozen=True, kw_only=True)
    class Config(quantdock.QuantizationConfig):
        quant_method = "pieces"
        way: str = "right"

    class Quantizer(quantdock.Quantizer[Config]):
        config_class = Config
        capabilities = quantdock.Capabilities(dequantize=True)
        def refusal(self, parameter):
            return None if len(parameter.spec.shape) == 3 else "no experts"
        def layout(self, parameter):
            shape = parameter.spec.shape
            scale = TensorSpec(dtype=torch.float32, shape=shape[:2])
            return Layout(components={"weight": TensorSpec(dtype=torch.int8, shape=shape), "scale": scale})
        def companions(self):
            return {"scale": "weight"}
        def assemble(self, parameter, pieces):
            if self.config.way == "not at all":
                return super().assemble(parameter, pieces)
            made = {"weight": [], "scale": []}
            for piece in self.assemblies[parameter.name].pieces:
                for component, placed in made.items():
                    placed.append(Piece(source=pieces[piece.source][component].name, into=piece.into))
            if self.config.way == "twice":
                made["scale"][1] = made["scale"][0]
            if self.config.way == "forgetful":
                del made["scale"]
            shapes = {name: spec.shape for name, spec in self.layout(parameter).components.items()}
            if self.config.way == "unfilled":
                shapes["scale"] = (4, *shapes["scale"][1:])
            return {name: Assembly(shape=shapes[name], pieces=tuple(placed)) for name, placed in made.items()}
        def stored_in_pieces(self, parameter):
            return True
        def disassemble(self, parameter, exported):
            return {
                name.removesuffix("weight") + component: part
                for component, parts in exported.items()
                for name, part in parts.items()
            }
        @hookimpl
        def preprocess_model(self, model):
            for parameter in self.parameters.values():
                module = model.get_submodule(parameter.module)
                spec = self.layout_of(parameter).components["scale"]
                module.register_buffer("scale", torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
        @hookimpl
        def quantize_param(self, parameter, tensor):
            return None
    """
)


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(EXPERTS, ROWS, COLUMNS))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.norm = torch.nn.LayerNorm(COLUMNS)


class Stacking(Architecture):
    """Stores experts one by one, the upper rows apart from the lower ones."""

    def route(self, stored: Mapping[str, TensorSpec], slots: Mapping[str, TensorSpec]) -> Routing:
        half = ROWS // 2
        pieces = tuple(
            Piece(source=name, into=(int(name.split(".")[1]), slice(0, half) if "upper" in name else slice(half, ROWS)))
            for name in stored
            if name.startswith("experts.")
        )
        shape = slots["experts.weight"].shape
        dtype = stored[pieces[0].source].dtype
        fused = Conversion(
            sources=tuple(piece.source for piece in pieces),
            targets={"experts.weight": TensorSpec(dtype=dtype, shape=(len(pieces) // 2, *shape[1:]))},
            assemblies={"experts.weight": Assembly(shape=shape, pieces=pieces)},
            label="stack",
        )
        rest = [quantdock.rename(name, name, spec) for name, spec in stored.items() if name in slots]
        return Routing(conversions=[fused, *rest])

    def export(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        fused = state.pop("experts.weight", None)
        if fused is not None:
            for number, expert in enumerate(fused):
                for which, part in zip(("upper", "lower"), expert.chunk(2), strict=True):
                    state[f"experts.{number}.{which}.weight"] = part
        return state

    def write_config(self, folder: Path, quantization: Mapping[str, Any] | None) -> None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))


class Stage:
    @hookimpl
    def build_model(self) -> Skeleton:
        with torch.device("meta"):
            return Skeleton(model=Model(), architecture=Stacking(), built_by="test")


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path) -> Iterator[None]:
    entry_points = {"quantdock.quantizers": {"pieces": "pieces_plugin:Quantizer"}}
    modules = {"pieces_plugin": MODULE}
    with installed_plugin(
        tmp_path / "site", dist="quantdock-pieces", version="1.0", entry_points=entry_points, modules=modules
    ):
        yield


def write(folder: Path, way: str = "right", **changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    half = (ROWS // 2, COLUMNS)
    stored: dict[str, torch.Tensor | None] = {"norm.weight": torch.ones(COLUMNS), "norm.bias": torch.zeros(COLUMNS)}
    for number in range(EXPERTS):
        for which in ("upper", "lower"):
            base = f"experts.{number}.{which}"
            stored[f"{base}.weight"] = torch.randint(-128, 128, half, generator=generator, dtype=torch.int8)
            stored[f"{base}.scale"] = torch.rand(half[0], generator=generator)
    stored |= changed
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    folder.mkdir()
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    data = {"quantization_config": {"quant_method": "pieces", "way": way}}
    (folder / "config.json").write_text(json.dumps(data))
    return kept


def test_every_piece_goes_to_its_place_and_back(tmp_path: Path) -> None:
    stored = write(tmp_path / "it")
    plan = quantdock.plan(tmp_path / "it", plugins=[Stage()])
    (entry,) = [entry for entry in plan.ledger.entries if entry.parameter == "experts.weight"]
    assert set(entry.sources) == {name for name in stored if name.startswith("experts.")}
    assert entry.stored_nbytes == entry.nbytes == EXPERTS * ROWS * (COLUMNS + 4)
    model = plan.execute()
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes
    for number in range(EXPERTS):
        for component in ("weight", "scale"):
            expected = [stored[f"experts.{number}.{which}.{component}"] for which in ("upper", "lower")]
            assert torch.equal(model.experts.state_dict()[component][number], torch.cat(expected))
    quantdock.save(model, tmp_path / "saved")
    again = load_file(tmp_path / "saved" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("twice", r"takes 'experts\.0\.lower\.scale' twice"),
        ("forgetful", r"leaves out 'experts\.0\.lower\.scale'"),
        ("unfilled", r"fills 18 elements of 'scale', which has the shape \[4, 6\]"),
    ],
)
def test_a_plugin_is_held_to_its_word(tmp_path: Path, way: str, message: str) -> None:
    write(tmp_path / "it", way)
    with pytest.raises(quantdock.PluginError, match=message):
        quantdock.plan(tmp_path / "it", plugins=[Stage()])


def test_a_method_that_knows_no_pieces_says_so(tmp_path: Path) -> None:
    write(tmp_path / "it", "not at all")
    message = r"made from quantized tensors \('experts\.0\.lower\.weight', \.\.\.\) by stack, which isn't supported"
    with pytest.raises(quantdock.LedgerError, match=message):
        quantdock.plan(tmp_path / "it", plugins=[Stage()])


def test_pieces_of_different_dtypes_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "it", **{"experts.2.lower.scale": torch.ones(ROWS // 2, dtype=torch.float16)})
    with pytest.raises(quantdock.LedgerError, match=r"'experts\.2\.lower\.scale' is float16\[3\], but .* float32"):
        quantdock.plan(tmp_path / "it", plugins=[Stage()])


def test_too_few_pieces_are_an_error(tmp_path: Path) -> None:
    gone = {f"experts.2.{which}.{part}": None for which in ("upper", "lower") for part in ("weight", "scale")}
    write(tmp_path / "it", **gone)
    with pytest.raises(quantdock.LedgerError, match=r"has shape \[3, 6, 5\], but 4 stored weights .* \[2, 6, 5\]"):
        quantdock.plan(tmp_path / "it", plugins=[Stage()])
