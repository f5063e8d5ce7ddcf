"""Loads to CUDA devices: through pinned memory, on streams of the workers' own, within a budget per device."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import quantdock
from quantdock.staging import Staging
from quantdock.testing import installed_plugin
from quantdock.units import SLICE, STAGING

sys.path.insert(0, str(Path(__file__).parent))
from broken_toys import EXAMPLE
from test_slicing import SLICED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class Wide(nn.Module):
    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(config["width"], config["width"]) for _ in range(3))


def write(folder: Path, width: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    folder.mkdir()
    values = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))).to(dtype)
        for name, tensor in Wide({"width": width}).state_dict().items()
    }
    save_file(values, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"width": width}))
    return values


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 2500])
def test_what_arrives_is_what_is_stored(tmp_path: Path, width: int, stored: torch.dtype) -> None:
    """Smaller and larger than a slice, cast and not."""
    values = write(tmp_path / "model", width, stored)
    model = quantdock.load(tmp_path / "model", model=Wide, device_map="cuda", dtype="bfloat16", workers=3)
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu(), values[name].to(torch.bfloat16)), name


def test_slices_are_quantized_on_the_device(tmp_path: Path) -> None:
    write(tmp_path / "model", 4096, torch.bfloat16)
    modules = {"quantdock_toy": EXAMPLE.read_text(encoding="utf-8"), "sliced_toy": SLICED}
    with installed_plugin(
        tmp_path / "site",
        dist="sliced-toy",
        version="1.0",
        entry_points={"quantdock.quantizers": {"sliced": "sliced_toy:Sliced"}},
        modules=modules,
    ):
        options = {"model": Wide, "quantize": {"quant_method": "sliced"}}
        here = quantdock.load(tmp_path / "model", **options, device_map="cpu").state_dict()  # type: ignore[arg-type]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        plan = quantdock.plan(tmp_path / "model", **options, device_map="cuda", memory_budget="128MiB")  # type: ignore[arg-type]
        assert all(unit.cut is not None for unit in plan.units if unit.targets[0].action == "quantize")
        model = plan.execute()
        peak = torch.cuda.max_memory_allocated() - before
    assert peak <= plan.resident_nbytes + 128 * 2**20
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu(), here[name]), name


def test_a_ring_is_used_again_only_when_its_copy_arrived() -> None:
    """Many copies, each of other values than the one before, with the device kept busy."""
    device = torch.device("cuda", 0)
    busy = torch.randn(4096, 4096, device=device)
    sources = [torch.full((SLICE // 4,), float(index)) for index in range(12)]
    targets = [torch.empty(SLICE // 4, device=device) for _ in sources]
    torch.cuda.synchronize()
    with Staging() as staging, staging.on(device):
        for source, target in zip(sources, targets, strict=True):
            busy = busy @ busy
            staging.copy(source, target, drop=False)
    for index, target in enumerate(targets):
        assert bool((target == index).all()), index
    assert STAGING == 2 * SLICE, "two halves"
