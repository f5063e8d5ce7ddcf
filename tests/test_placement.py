"""Devices: what fits by arithmetic fits, offloading works, and maps that make no sense are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TinyFactory
from tests.reference import assert_same_tensor

import quantdock

IDS = torch.arange(8)[None]
SPLIT = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("device_map", ["cpu", "auto", "balanced", "balanced_low_0", "sequential", {"": "cpu"}])
def test_everything_on_one_device(device_map: Any, tiny: TinyFactory) -> None:
    if torch.cuda.is_available() and isinstance(device_map, str) and device_map != "cpu":
        pytest.skip("the strategies would choose the GPU of this machine")
    plan = quantdock.plan(tiny("llama"), device_map=device_map)
    assert plan.placement.single == torch.device("cpu")
    assert_same_tensor(logits(plan.execute()), logits(quantdock.load(tiny("llama"))), "logits")


@pytest.mark.parametrize("device_map", [SPLIT, {"": "disk"}])
def test_offloaded_to_disk(device_map: dict[str, str], tiny: TinyFactory, tmp_path: Path) -> None:
    whole = quantdock.load(tiny("llama"))
    model = quantdock.load(tiny("llama"), device_map=device_map, offload_dir=tmp_path / "offload")
    assert_same_tensor(logits(model), logits(whole), "logits")
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes < quantdock.report(whole).measured_nbytes
    quantdock.save(model, tmp_path / "saved")
    again = quantdock.load(tmp_path / "saved").state_dict()
    for name, tensor in whole.state_dict().items():
        assert_same_tensor(again[name], tensor, name)


def test_stacked_experts_are_offloaded_too(tiny: TinyFactory, tmp_path: Path) -> None:
    whole = quantdock.load(tiny("mixtral"))
    model = quantdock.load(tiny("mixtral"), device_map=SPLIT, offload_dir=tmp_path / "offload")
    assert_same_tensor(logits(model), logits(whole), "logits")


def test_quantized_bytes_decide_what_fits(tiny: TinyFactory) -> None:
    """A limit that the quantized model meets and the unquantized one doesn't."""
    full = quantdock.plan(tiny("llama")).resident_nbytes
    quantized = quantdock.plan(tiny("llama"), quantize="bnb-nf4").resident_nbytes
    assert quantized < full
    limit = {"cpu": quantized}
    plan = quantdock.plan(tiny("llama"), quantize="bnb-nf4", device_map="auto", max_memory=limit)
    assert plan.placement.single == torch.device("cpu")
    assert quantdock.plan(tiny("llama"), device_map="auto", max_memory=limit).placement.offloads


def test_disk_needs_a_folder(tiny: TinyFactory) -> None:
    with pytest.raises(quantdock.PlacementError, match="offload_dir"):
        quantdock.load(tiny("llama"), device_map=SPLIT)


def test_a_quantized_parameter_does_not_go_to_disk(tiny: TinyFactory, tmp_path: Path) -> None:
    with pytest.raises(quantdock.PlacementError, match=r"layers\.1.*bnb-nf4"):
        quantdock.load(tiny("llama"), quantize="bnb-nf4", device_map=SPLIT, offload_dir=tmp_path)


@pytest.mark.parametrize(
    ("device_map", "mentions"),
    [
        ("gpu please", "gpu please"),
        ({"model.layer": "cpu", "": "cpu"}, "model.layer"),
        ({"model": "cpu"}, "lm_head"),
        ({"": "cuda:77"}, "cuda"),
    ],
)
def test_a_map_that_makes_no_sense(device_map: Any, mentions: str, tiny: TinyFactory) -> None:
    with pytest.raises(quantdock.PlacementError, match=mentions):
        quantdock.plan(tiny("llama"), device_map=device_map)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantize", [None, "bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8"])
def test_on_a_gpu_it_is_what_transformers_makes(quantize: str | None, tiny: TinyFactory) -> None:
    from transformers import AutoModelForCausalLM

    ours = quantdock.load(tiny("llama"), quantize=quantize, device_map="cuda")
    arguments = {}
    if quantize is not None:
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig.from_dict(ours.config.quantization_config.to_dict())
    theirs = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype="auto", device_map="cuda", **arguments)
    state = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert_same_tensor(state[name].cpu(), tensor.cpu(), name)
    ids = IDS.to("cuda")
    with torch.no_grad():
        assert_same_tensor(ours(ids).logits.cpu(), theirs(ids).logits.cpu(), "logits")
