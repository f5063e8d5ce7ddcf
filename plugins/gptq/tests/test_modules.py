"""Layers in models: other kinds of linear layers, and what moves with them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantdock
from quantdock import Parameter, TensorSpec
from quantdock.testing import SmallModel, write_checkpoint
from quantdock_gptq.config import GPTQConfig
from quantdock_gptq.modules import GPTQLinear
from quantdock_gptq.quantizer import GPTQQuantizer


def layers(model: nn.Module) -> dict[str, GPTQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, GPTQLinear)}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].cpu(), tensor.cpu()), name


class Transposed(nn.Module):
    """A linear layer that stores its weight ``[in, out]``, like GPT-2's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))


def test_transposed_layers() -> None:
    """GPTQ stores them like others. This is what the core does to one, step by step."""
    model = nn.Sequential(Transposed(96, 64))
    weight, bias = model[0].weight.detach(), model[0].bias
    parameter = Parameter(name="0.weight", spec=TensorSpec.of(weight), module_type=Transposed, role="linear-transposed")
    quantizer = GPTQQuantizer(GPTQConfig(bits=8, group_size=32))
    quantizer.parameters = {"0.weight": parameter}
    assert quantizer.refusal(parameter) is None
    quantizer.preprocess_model(model.to("meta"))
    slices = quantizer.layout(parameter).slices
    assert slices is not None
    parts = quantizer.begin_slices(parameter, torch.device("cpu"))
    for start in (32, 0):
        quantizer.quantize_slice(parameter, weight.narrow(slices.dim, start, 32), start, parts)
    same(dict(quantizer.finish_slices(parameter, parts)), dict(quantizer.quantize_param(parameter, weight) or {}))
    quantizer.install(model, parameter, parts)
    layer = model[0].eval()
    layer.bias = bias
    same(dict(quantizer.components(model, parameter)), parts)
    found = quantizer.dequantize(parts, parameter)
    assert TensorSpec.of(found) == parameter.spec
    assert (found - weight).norm() < 1e-2 * weight.norm()
    x = torch.randn(3, 96)
    assert torch.allclose(layer(x), x @ found + bias, atol=1e-4)
    restored = quantizer.restore_module(layer, parameter)
    assert isinstance(restored, Transposed)
    assert restored.weight.shape == weight.shape


def test_another_dtype_changes_no_stored_tensor(tmp_path: Path) -> None:
    """Scales in another dtype would be other scales; the rest of the model follows."""
    write_checkpoint(tmp_path, features=128)
    model = quantdock.load(tmp_path, model=SmallModel, quantize="gptq-int4")
    before = copy.deepcopy(layers(model)["blocks.0.down"].state_dict())
    model.float()
    same(layers(model)["blocks.0.down"].state_dict(), before)
    up = layers(model)["blocks.0.up"]
    assert up.bias is not None
    assert up.bias.dtype == torch.float32
    assert up.scales.dtype == torch.float16


def test_it_prints_what_it_holds(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, features=128)
    model = quantdock.load(tmp_path, model=SmallModel, quantize="gptq-int8")
    expected = "GPTQLinear(in_features=256, out_features=128, bias=False, bits=8, group_size=256)"
    assert repr(layers(model)["blocks.0.down"]) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("preset", ["gptq-int4", "gptq-int8"])
def test_on_a_device(preset: str, tmp_path: Path) -> None:
    """Quantized there, used there, moved here and used, and moved back."""
    write_checkpoint(tmp_path, features=128)
    ids = torch.arange(16)[None]
    here = quantdock.load(tmp_path, model=SmallModel, quantize=preset, device_map="cpu")
    there = quantdock.load(tmp_path, model=SmallModel, quantize=preset, device_map="cuda")
    before = copy.deepcopy(here.state_dict())
    same(there.state_dict(), before)
    with torch.no_grad():
        expected = there(ids.cuda())
        assert (here(ids) - expected.cpu()).float().norm() < 2e-2 * expected.float().norm()
        there.cpu()(ids)
        there.cuda()
        same(there.state_dict(), before)
        assert torch.equal(there(ids.cuda()), expected)
