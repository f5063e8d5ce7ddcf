"""On a CUDA device: the same bits as on CPU, and moves between devices."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import quantdock
from quantdock.testing import QuantizerConformance, SmallModel, write_checkpoint
from quantdock_fp8 import fp4
from quantdock_fp8.presets import BLOCK, TENSOR

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class TestFp8OnDevice(QuantizerConformance):
    method = "fp8"
    configs = (TENSOR, BLOCK)
    presets = ("fp8", "fp8-block")
    min_sqnr_db = 28.0
    device = "cuda"


class TestFbgemmOnDevice(QuantizerConformance):
    method = "fbgemm_fp8"
    presets = ("fp8-row",)
    min_sqnr_db = 28.0
    device = "cuda"


@pytest.mark.parametrize("preset", ["fp8", "fp8-row", "fp8-block"])
def test_same_bits_as_on_the_cpu(tmp_path: Path, preset: str) -> None:
    write_checkpoint(tmp_path / "it", linear=(330, 200))
    models = [
        quantdock.load(tmp_path / "it", model=SmallModel, quantize=preset, device_map=device)
        for device in ("cpu", "cuda")
    ]
    moved = copy.deepcopy(models[0]).cuda().cpu()
    expected = models[0].state_dict()
    for found in (models[1].state_dict(), moved.state_dict()):
        for name, tensor in expected.items():
            left, right = (one.cpu().reshape(-1).view(torch.uint8) for one in (found[name], tensor))
            assert torch.equal(left, right), name
    restored = [quantdock.dequantize(model).get_parameter("blocks.1.extra.weight").cpu() for model in models]
    assert torch.equal(*restored)


class Experts(nn.Module):
    """Multiplies each row with the matrix of its expert, in each of the ways that models have."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(3, 200, 330, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        one_by_one = [nn.functional.linear(x[number], self.gate_up_proj[number]) for number in range(3)]
        batched = torch.bmm(x, self.gate_up_proj.transpose(1, 2))
        return torch.stack([torch.stack(one_by_one), batched])


class WithExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()


@pytest.mark.parametrize("preset", ["fp8", "fp8-row", "fp8-block"])
def test_experts_have_the_bits_of_the_cpu(tmp_path: Path, preset: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 200, 330, generator=generator).bfloat16()
    save_file({"experts.gate_up_proj": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    here, there = (
        quantdock.load(tmp_path, model=WithExperts, quantize=preset, device_map=device) for device in ("cpu", "cuda")
    )
    for name, tensor in here.state_dict().items():
        left, right = (one.cpu().reshape(-1).view(torch.uint8) for one in (there.state_dict()[name], tensor))
        assert torch.equal(left, right), name
    x = torch.randn(3, 5, 330, generator=generator).bfloat16()
    with torch.no_grad():
        expected, found = here.experts(x), there.experts(x.cuda()).cpu()
    assert (found - expected).abs().max() <= 0.01 * expected.abs().max()
    restored = [quantdock.dequantize(model).get_parameter("experts.gate_up_proj").cpu() for model in (here, there)]
    assert torch.equal(*restored)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_four_bits_decode_to_the_bits_of_the_cpu(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (300, 160), generator=generator, dtype=torch.uint8)
    scales = torch.randn(300, 320 // size, generator=generator)
    found, expected = torch.empty(300, 320, dtype=dtype, device="cuda"), torch.empty(300, 320, dtype=dtype)
    fp4.decode(codes, scales, (1, size), expected)
    fp4.decode(codes.cuda(), scales.cuda(), (1, size), found)
    left, right = (one.cpu().reshape(-1).view(torch.uint8) for one in (found, expected))
    assert torch.equal(left, right)
