"""What workers make of large layers is what bitsandbytes makes of them in the caller's thread."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file

import quantdock

PRESETS = {"bnb-nf4": ("nf4", False), "bnb-nf4-dq": ("nf4", True), "bnb-fp4": ("fp4", False)}


class Wide(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # More than 32768 blocks, from where torch adds up a mean with all of its threads.
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2048, 1088, bias=False) for _ in range(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"layers.{index}.weight": torch.randn(1088, 2048, generator=generator).bfloat16() * 0.02 for index in range(3)
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_bits_do_not_depend_on_the_workers(folder: Path, preset: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        models = [quantdock.load(folder, model=Wide, quantize=preset, workers=workers) for workers in (1, 3)]
        assert torch.get_num_threads() == threads
        full = quantdock.load(folder, model=Wide)
        quant_type, nested = PRESETS[preset]
        for index, layer in enumerate(full.layers):
            data, state = bnb.functional.quantize_4bit(
                layer.weight.detach(), quant_type=quant_type, compress_statistics=nested
            )
            expected = {"weight": data} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
            for model in models:
                found = model.layers[index].state_dict()
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    finally:
        torch.set_num_threads(before)
