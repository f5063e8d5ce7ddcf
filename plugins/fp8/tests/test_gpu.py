"""On a CUDA device: the same bits as on CPU, and moves between devices."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import quantdock
from quantdock.testing import QuantizerConformance, SmallModel, write_checkpoint
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
    restored = [quantdock.dequantize(model).get_parameter("extra.weight").cpu() for model in models]
    assert torch.equal(*restored)
