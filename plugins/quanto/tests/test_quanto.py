"""quanto through quantdock is optimum-quanto itself, and what it saves comes back, into optimum-quanto too."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum import quanto
from safetensors.torch import load_file, save_file
from torch import nn

import quantdock
from quantdock import ConfigError, UnsupportedError
from quantdock.testing import SmallModel, write_checkpoint
from quantdock_quanto.config import QuantoConfig
from quantdock_quanto.quantizer import QuantoQuantizer

WEIGHTS = ["int8", "float8"]
LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
IDS = torch.arange(24).reshape(2, 12)


def expected(original: nn.Module, weights: str) -> nn.Module:
    model = copy.deepcopy(original)
    quanto.quantize(model, weights=quanto.qtypes[f"q{weights}"], include=LAYERS)
    quanto.freeze(model)
    return model.eval()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype, name
        assert left[name].shape == tensor.shape, name
        assert torch.equal(left[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    with torch.no_grad():
        assert torch.equal(ours(IDS), theirs(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_bits_are_quantos(weights: str, dtype: torch.dtype, tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path, dtype=dtype)
    ours = quantdock.load(tmp_path, model=SmallModel, quantize=QuantoConfig(weights=weights))
    assert_same(ours, expected(original, weights))
    for name in LAYERS:
        assert isinstance(ours.get_submodule(name), quanto.QLinear)
        assert ours.get_submodule(name).frozen


@pytest.mark.parametrize("weights", WEIGHTS)
def test_after_use_it_is_saved_as_it_was_loaded(weights: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source")
    model = quantdock.load(tmp_path / "source", model=SmallModel, quantize=QuantoConfig(weights=weights))
    before = copy.deepcopy(model)
    with torch.no_grad():
        model(IDS)
    folder = quantdock.save(model, tmp_path / "saved")
    again = quantdock.load(folder, model=SmallModel)
    assert_same(again, before)
    assert_same(copy.deepcopy(again).to("cpu"), before)
    buffer = io.BytesIO()
    torch.save(again, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False), before)
    assert_same(quantdock.load(quantdock.save(again, tmp_path / "again"), model=SmallModel), before)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_quanto_reads_what_is_saved(weights: str, tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "source")
    ours = quantdock.load(tmp_path / "source", model=SmallModel, quantize=QuantoConfig(weights=weights))
    folder = quantdock.save(ours, tmp_path / "saved")
    theirs = copy.deepcopy(original)
    qmap = {name: {"weights": f"q{weights}_e4m3fn" if weights == "float8" else f"q{weights}"} for name in LAYERS}
    qmap = {name: entry | {"activations": "none"} for name, entry in qmap.items()}
    state = load_file(folder / "model.safetensors")
    theirs.head = nn.Identity()
    quanto.requantize(theirs, state, qmap)
    theirs.head = original.head
    with torch.no_grad():
        assert torch.equal(theirs.eval()(IDS), ours(IDS))


@pytest.mark.parametrize("shift", [1, 7, 8, 33])
def test_weights_may_lie_anywhere_in_a_file(shift: int, tmp_path: Path) -> None:
    """torch's int8 kernel kills the process when codes aren't aligned, as they may be in a mapped file."""
    write_checkpoint(tmp_path / "source")
    ours = quantdock.load(tmp_path / "source", model=SmallModel, quantize="quanto-int8")
    folder = quantdock.save(ours, tmp_path / "saved")
    state = load_file(folder / "model.safetensors") | {"a": torch.zeros(shift, dtype=torch.int8)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    again = quantdock.load(folder, model=SmallModel, ignore_unexpected=["a"])
    for name in LAYERS:
        weight: Any = again.get_submodule(name).weight
        assert weight._data.data_ptr() % 16 == 0
    assert_same(again, ours)
    assert quantdock.report(again).measured_nbytes == quantdock.report(again).predicted_nbytes


def test_one_row_is_quantized_as_a_whole(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "source", linear=(64, 1))
    ours = quantdock.load(tmp_path / "source", model=SmallModel, quantize="quanto-int8")
    theirs = copy.deepcopy(original.get_submodule("blocks.1.extra"))
    assert isinstance(theirs, nn.Linear)
    made = quanto.QLinear.from_module(theirs, weights=quanto.qint8)
    made.freeze()
    weight: Any = ours.get_parameter("blocks.1.extra.weight")
    assert torch.equal(weight._data, made.weight._data)
    assert torch.equal(weight.dequantize(), made.weight.dequantize())
    again = quantdock.load(quantdock.save(ours, tmp_path / "saved"), model=SmallModel)
    assert torch.equal(again.get_parameter("blocks.1.extra.weight").dequantize(), weight.dequantize())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bits_are_those_of_transformers(weights: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    pytest.importorskip("quantdock_transformers", reason="loads a model of transformers'")
    from tests.tiny_models import logits_of, make_tiny

    source, config = make_tiny("llama", tmp_path / "llama"), transformers.QuantoConfig(weights=weights)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(source, device_map="cpu", quantization_config=config)
    ours = quantdock.load(source, quantize=config)
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        if name.endswith(("input_scale", "output_scale")):  # in float32 with transformers, in the model's with quanto
            assert left[name] == tensor == 1
            continue
        assert torch.equal(left[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert torch.equal(logits_of(ours), logits_of(theirs))
    again = quantdock.load(quantdock.save(ours, tmp_path / "saved"))
    assert torch.equal(logits_of(again), logits_of(theirs))


def test_the_config_is_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")

    theirs = transformers.QuantoConfig(weights="float8", modules_to_not_convert=["lm_head"])
    ours = QuantoConfig.from_dict(theirs.to_dict() | {"quant_method": "quanto"})
    assert ours == QuantoConfig(weights="float8", modules_to_not_convert=("lm_head",))
    assert json.loads(json.dumps(theirs.to_dict())) == ours.to_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": "int3"}, "weights is 'int3'"),
        ({"weights": ["int8"]}, "weights is"),
        ({"activations": "int4"}, "activations is 'int4'"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        ({"modules_to_not_convert": ["("]}, "is no regular expression"),
    ],
)
def test_values_that_do_not_fit_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantoConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": "int4"}, r"weights='int4' can't be used: .* compiler"),
        ({"weights": "int2"}, r"weights='int2' can't be used: .* compiler"),
        ({"activations": "int8"}, "activations='int8': .* calibrating"),
    ],
)
@pytest.mark.parametrize("prequantized", [True, False])
def test_what_can_not_run_is_refused(values: dict[str, Any], message: str, prequantized: bool) -> None:
    with pytest.raises(UnsupportedError, match=message):
        QuantoQuantizer(QuantoConfig(**values), prequantized=prequantized)


def test_skipped_modules_stay_as_they_are(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = QuantoConfig(modules_to_not_convert=("down", r"blocks\.0"))
    model = quantdock.load(tmp_path, model=SmallModel, quantize=config)
    notes = {entry.parameter: entry.note for entry in quantdock.report(model).ledger.entries}
    assert notes["blocks.0.up.weight"] == r"modules_to_not_convert='blocks\\.0'"
    assert notes["blocks.1.down.weight"] == "modules_to_not_convert='down'"
    assert notes["blocks.1.up.weight"] == ""
