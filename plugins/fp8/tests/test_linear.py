"""The layer survives what is done to modules, and computes what a linear layer with the decoded weight does."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantdock
from quantdock.testing import SmallModel, write_checkpoint
from quantdock.testing.memory import PeakBytes
from quantdock_fp8.few_rows import CPU_ROWS
from quantdock_fp8.linear import Fp8Linear

IDS = torch.arange(12).reshape(2, 6)
PRESETS = ("fp8", "fp8-row", "fp8-block")
POWERS = {"quant_method": "fp8", "weight_block_size": [16, 32], "scale_fmt": "ue8m0"}


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    result = pickle.loads(pickle.dumps(model))
    assert isinstance(result, nn.Module)
    return result


def used(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model(IDS)
    return model


def trained(model: nn.Module) -> nn.Module:
    model.train()(IDS).float().sum().backward()
    model.zero_grad()
    return model.eval()


def shared(model: nn.Module) -> nn.Module:
    return model.share_memory()


ACTIONS: tuple[Callable[[nn.Module], nn.Module], ...] = (copied, pickled, used, trained, shared)


@pytest.mark.parametrize("preset", [*PRESETS, POWERS])
def test_saved_alike_whatever_has_happened(tmp_path: Path, preset: object) -> None:
    write_checkpoint(tmp_path / "checkpoint", features=40)
    model = quantdock.load(tmp_path / "checkpoint", model=SmallModel, quantize=preset)
    expected = (quantdock.save(model, tmp_path / "first") / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    for number, actions in enumerate(itertools.permutations(ACTIONS, 3)):
        it = copy.deepcopy(model)
        for action in actions:
            it = action(it)
        saved = quantdock.save(it, tmp_path / str(number))
        assert (saved / "model.safetensors").read_bytes() == expected, actions
        assert json.loads((saved / "config.json").read_text()) == config


@pytest.mark.parametrize("preset", [*PRESETS, POWERS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_another_dtype_leaves_codes_and_scales_alone(tmp_path: Path, preset: object, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    model = quantdock.load(tmp_path / "checkpoint", model=SmallModel, quantize=preset)
    layer = model.get_submodule("blocks.0.up")
    assert isinstance(layer, Fp8Linear)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
    model.to(dtype)
    assert layer.bias.dtype == dtype
    for name, tensor in before.items():
        found = layer.state_dict()[name]
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def layer_of(tmp_path: Path, preset: str, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Fp8Linear, nn.Linear]:
    """A layer ``[out, in]`` with a bias, and the one that it stands for."""
    write_checkpoint(tmp_path / "checkpoint", linear=(shape[1], shape[0]), dtype=dtype)
    model = quantdock.load(tmp_path / "checkpoint", model=SmallModel, quantize=preset)
    layer = copy.deepcopy(model.get_submodule("blocks.1.extra"))
    reference = quantdock.dequantize(model).get_submodule("blocks.1.extra")
    assert isinstance(layer, Fp8Linear)
    assert isinstance(reference, nn.Linear)
    return layer, reference


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Up to the order in which a dot product is summed up."""
    error = (found.double() - expected.double()).abs().max()
    return bool(error <= 4 * torch.finfo(dtype).eps * expected.double().abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (127, 33), (129, 200), (300, 129)])
@pytest.mark.parametrize("preset", PRESETS)
def test_outputs_and_gradients(tmp_path: Path, preset: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer, reference = layer_of(tmp_path, preset, shape, dtype)
    generator = torch.Generator().manual_seed(0)
    for leading in ((), (3,), (2, 5), (0,)):
        x = torch.randn(*leading, shape[1], generator=generator).to(dtype)
        y = x.clone()
        found, expected = layer(x.requires_grad_()), reference(y.requires_grad_())
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        if not found.numel():
            continue
        assert close(found, expected, dtype)
        layer.bias.grad = reference.bias.grad = None
        weights = torch.randn(found.shape, generator=generator).to(dtype)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        assert close(x.grad, y.grad, dtype)
        assert layer.bias.grad is not None
        assert close(layer.bias.grad, reference.bias.grad, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (127, 33), (300, 129)])
@pytest.mark.parametrize("preset", PRESETS)
def test_few_rows_and_many(tmp_path: Path, preset: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer, reference = layer_of(tmp_path, preset, shape, dtype)
    exact = copy.deepcopy(reference).double()
    generator = torch.Generator().manual_seed(0)
    for rows in (0, 1, 3, 8, CPU_ROWS, CPU_ROWS + 1):
        x = torch.randn(2 * shape[1], rows, generator=generator).to(dtype).t()[:, ::2]
        with torch.no_grad():
            found, expected = layer(x), exact(x.double())
            assert (found.dtype, found.shape) == (dtype, (rows, shape[0]))
            sizes = x.double().abs() @ exact.weight.abs().t() + exact.bias.abs()
            # Rounded to the dtype, and summed in float32 in any order.
            bound = torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
            assert ((found.double() - expected).abs() <= bound * sizes).all()
            assert torch.equal(found, layer(x))


def test_the_weight_is_never_whole_in_full_precision(tmp_path: Path) -> None:
    layer, _ = layer_of(tmp_path, "fp8-block", (4096, 256), torch.bfloat16)
    x = torch.ones(1, 256, dtype=torch.bfloat16)
    with torch.no_grad(), PeakBytes([x, *layer.state_dict().values()]) as peak:
        layer(x)
    assert peak.peak < layer.weight.numel()


def test_autocast_decides_as_for_linear_layers(tmp_path: Path) -> None:
    layer, reference = layer_of(tmp_path, "fp8-block", (48, 64), torch.float32)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = layer(x), reference(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert close(found, expected, torch.bfloat16)


def test_other_kinds_of_linear_layers_are_left_alone(tmp_path: Path) -> None:
    """nn.MultiheadAttention computes with the weight of its layer, past the layer."""
    from safetensors.torch import save_file

    def factory() -> nn.Module:
        return nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "plain": nn.Linear(32, 32)})

    (tmp_path / "it").mkdir()
    save_file(factory().state_dict(), tmp_path / "it" / "model.safetensors")
    (tmp_path / "it" / "config.json").write_text("{}")
    model = quantdock.load(tmp_path / "it", model=factory, quantize="fp8-block")
    found = [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)]
    assert found == ["plain"]
    saved = quantdock.save(model, tmp_path / "saved")
    assert load_file(saved / "model.safetensors")["plain.weight"].dtype == torch.float8_e4m3fn
    listed = json.loads((saved / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert listed == []  # nor does transformers take it for a linear layer
