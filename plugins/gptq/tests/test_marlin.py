"""The checkpoint format ``marlin``: against a packing that follows the Marlin repository's, element by element."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantdock
from quantdock.testing import SmallModel, write_checkpoint
from quantdock_gptq.config import GPTQConfig
from quantdock_gptq.marlin import MarlinLinear

FEATURES = 256
LAYERS = tuple(f"blocks.{block}.{layer}" for block in range(2) for layer in ("up", "down"))
IDS = torch.arange(24).reshape(2, 12) * 7 % 32


def permutations() -> tuple[list[int], list[int], list[int]]:
    """Of codes, of scales of several groups, and of those of one, as ``_get_perms`` of the repository makes them."""
    perm: list[int] = []
    for i in range(32):
        one = []
        for block in (0, 1):
            for row in (2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4 + 4), 2 * (i % 4 + 4) + 1):
                one.append(16 * row + i // 4 + 8 * block)
        for j in range(4):
            perm.extend(p + 256 * j for p in one)
    codes = np.array(perm).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].ravel().tolist()
    scales = [i + 8 * j for i in range(8) for j in range(8)]
    single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return codes, scales, single


def pack(codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """What ``Layer.pack`` makes of codes ``[inputs, outputs]`` and scales ``[groups, outputs]``."""
    inputs, outputs = codes.shape
    order, grouped, single = permutations()
    chosen = grouped if len(scales) > 1 else single
    tiles = codes.numpy().reshape(inputs // 16, 16, outputs // 16, 16).transpose(0, 2, 1, 3)
    runs = tiles.reshape(inputs // 16, outputs * 16).reshape(-1, 1024)[:, order].reshape(inputs // 16, -1)
    words = np.zeros((inputs // 16, outputs * 2), dtype=np.uint32)
    for i in range(8):
        words |= runs[:, i::8].astype(np.uint32) << np.uint32(4 * i)
    found = scales.reshape(-1, len(chosen))[:, chosen].reshape(scales.shape)
    return {"B": torch.from_numpy(words.view(np.int32)), "s": found.contiguous()}


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def write(folder: Path, size: int, change: Change = lambda config, tensors: None) -> dict[str, Tensor]:
    """A checkpoint of quantdock's small model, and what its weights stand for, float64 ``[out, in]``."""
    write_checkpoint(folder, features=FEATURES, dtype=torch.float16)
    tensors, plain = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in LAYERS:
        outputs, inputs = tensors.pop(f"{name}.weight").shape
        groups = 1 if size == -1 else inputs // size
        codes = torch.randint(0, 16, (inputs, outputs), generator=generator)
        scales = (0.001 + 0.02 * torch.rand(groups, outputs, generator=generator)).half()
        plain[name] = ((codes - 8) * scales.double().repeat_interleave(inputs // groups, 0)).t()
        tensors |= {f"{name}.{part}": tensor for part, tensor in pack(codes, scales).items()}
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": size, "sym": True, "desc_act": False}
    config["quantization_config"] = quantization | {"checkpoint_format": "marlin"}
    change(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return plain


def layers(model: nn.Module) -> dict[str, MarlinLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MarlinLinear)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(IDS)).float()


@pytest.mark.parametrize("size", [128, -1])
def test_weights_are_what_the_packing_says(tmp_path: Path, size: int) -> None:
    plain = write(tmp_path / "it", size)
    model = quantdock.load(tmp_path / "it", model=SmallModel)
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes
    found = layers(model)
    assert found.keys() == plain.keys()
    for name, layer in found.items():
        assert torch.equal(layer.dequantized(torch.float32), plain[name].float()), name
        assert torch.equal(layer.dequantized(torch.float16), plain[name].half()), name
        weight, part = layer.stored_weight(), slice(37, 102)  # not where runs begin and end
        shown = weight.scales(part).double().repeat_interleave(weight.inputs // len(weight.group_scales), 0)
        assert torch.equal(((weight.codes(part).double() - 8) * shown).t(), plain[name][part]), name
    restored = quantdock.dequantize(model)
    assert all(torch.equal(restored.get_parameter(f"{name}.weight"), plain[name].half()) for name in plain)


@pytest.mark.parametrize("size", [128, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_computes_and_saves(tmp_path: Path, size: int, dtype: torch.dtype) -> None:
    """After use, too, when kernels have had their own forms of the weights."""
    plain = write(tmp_path / "it", size)
    model = quantdock.load(tmp_path / "it", model=SmallModel, dtype=dtype).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = layers(model)["blocks.0.up"]
    with torch.no_grad():
        expected = x.double() @ plain["blocks.0.up"].t()
        found = layer(x).double()
        if layer.bias is not None:
            expected += layer.bias.double()
    assert (found - expected).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * expected.norm()
    once = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), once)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    quantdock.save(model, tmp_path / "saved")
    stored, saved = (load_file(tmp_path / folder / "model.safetensors") for folder in ("it", "saved"))
    assert stored.keys() == saved.keys()
    assert all(torch.equal(saved[f"{name}.{part}"], stored[f"{name}.{part}"]) for name in LAYERS for part in "Bs")
    again = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (again["checkpoint_format"], again["format"]) == ("marlin", "marlin")


def test_the_older_mark(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del config["checkpoint_format"]
        config["is_marlin_format"] = True

    plain = write(tmp_path / "it", 128, change)
    found = layers(quantdock.load(tmp_path / "it", model=SmallModel))
    assert all(torch.equal(layer.dequantized(torch.float32), plain[name].float()) for name, layer in found.items())


def say(**fields: object) -> Change:
    return lambda config, _: config.update(fields)


def put(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    return lambda _, tensors: tensors.update({name: make(tensors[name]).clone()})


UP = "blocks.1.up"
PROBLEMS: Mapping[str, tuple[Change, str]] = {
    "no scales": (
        lambda _, tensors: tensors.pop(f"{UP}.s"),
        rf"{UP}.weight: component 's' is missing, expected float16\[2, ",
    ),
    "no codes": (lambda _, tensors: tensors.pop(f"{UP}.B"), f"{UP}.weight: component 'B' is missing, expected int32"),
    "scales of another shape": (
        put(f"{UP}.s", lambda tensor: tensor[:1]),
        rf"{UP}.weight: component 's' is float16\[1, .*expected float16\[2, .*group_size=128",
    ),
    "codes of another shape": (put(f"{UP}.B", lambda tensor: tensor[:-1]), rf"{UP}.weight: component 'B' is int32\["),
    "GPTQ's own tensors": (
        lambda _, tensors: tensors.update({f"{UP}.qweight": tensors.pop(f"{UP}.B")}),
        "'B' is missing.*'qweight' is not part of the format",
    ),
    "other bits": (say(bits=8), "bits is 8, but the checkpoint format 'marlin' has bits=4 only"),
    "another group size": (say(group_size=64), "group_size is 64, .* has group_size=128 or -1 only"),
    "zero points": (say(sym=False), "sym is False, .* has sym=True only"),
    "act order": (say(desc_act=True), "desc_act is True, .* has desc_act=False only"),
}


@pytest.mark.parametrize("problem", list(PROBLEMS))
def test_what_does_not_fit_is_refused(problem: str, tmp_path: Path) -> None:
    change, message = PROBLEMS[problem]
    write(tmp_path / "it", 128, change)
    with pytest.raises(quantdock.QuantdockError, match=message):
        quantdock.load(tmp_path / "it", model=SmallModel)


def test_shapes_that_the_kernel_has_no_tiles_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "it", features=64)
    config = json.loads((tmp_path / "it" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}
    (tmp_path / "it" / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "it" / "model.safetensors")
    outputs, inputs = tensors.pop(f"{UP}.weight").shape
    tensors |= {f"{UP}.B": torch.zeros(inputs // 16, outputs * 2).int(), f"{UP}.s": torch.ones(1, outputs).half()}
    save_file(tensors, tmp_path / "it" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(quantdock.LedgerError, match=f"{UP}.weight: .* expected multiples of 256 and 128"):
        quantdock.plan(tmp_path / "it", model=SmallModel)


def test_it_is_not_made(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "it", features=FEATURES)
    with pytest.raises(quantdock.UnsupportedError, match=r"'marlin' is read, not made.*to 'gptq'"):
        quantdock.plan(tmp_path / "it", model=SmallModel, quantize=GPTQConfig(checkpoint_format="marlin"))
