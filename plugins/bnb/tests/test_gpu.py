"""On a CUDA device: bitsandbytes' own kernels, and moves between devices."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from quantdock_bnb import fourbit
from quantdock_bnb.config import BitsAndBytesConfig
from quantdock_bnb.quantizer import BitsAndBytesQuantizer

sys.path.insert(0, str(Path(__file__).parent))
from whole import eight_bits, four_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CONFIGS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    "nf4 nested": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "fp4 in bfloat16": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        left, right = (tensor.cpu().reshape(-1).view(torch.uint8) for tensor in (found[name], value))
        assert torch.equal(left, right), name


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(quant_type: str, nested: bool) -> None:
    tensor = torch.randn(512, 768, device="cuda").bfloat16()
    expected, expected_state = bnb.functional.quantize_4bit(tensor, quant_type=quant_type, compress_statistics=nested)
    data, state = four_bits(tensor, quant_type=quant_type, blocksize=64, nested=nested, quant_storage=torch.uint8)
    ours, theirs = (fourbit.to_components("w", d, s) for d, s in ((data, state), (expected, expected_state)))
    same_state(ours, theirs)


def test_eight_bits_are_those_of_bitsandbytes() -> None:
    """In several pieces, which bitsandbytes does in one."""
    matrix = torch.randn(3000, 1024, device="cuda").bfloat16()
    expected, expected_scales, _ = bnb.functional.int8_vectorwise_quant(matrix.to(torch.float16))
    codes, scales = eight_bits(matrix)
    assert torch.equal(codes, expected)
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_used_on_the_cpu_and_moved(load: Any, name: str) -> None:
    """bitsandbytes' 4-bit layer moves what its CPU kernel made of the weight; its 8-bit layer leaves scales behind."""
    torch.manual_seed(0)
    model = load(BitsAndBytesQuantizer(CONFIGS[name]), nn.Sequential(nn.Linear(256, 128)).bfloat16())
    before = copy.deepcopy(model.state_dict())
    unused = copy.deepcopy(model).cuda()
    x = torch.randn(4, 256).bfloat16()
    with torch.no_grad():
        y = model(x)
        model.cuda()
        same_state(model.state_dict(), before)
        assert torch.equal(model(x.cuda()), unused(x.cuda()))
        model.cpu()
        same_state(model.state_dict(), before)
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_quantized_on_the_device(load: Any, name: str) -> None:
    torch.manual_seed(0)
    quantizer = BitsAndBytesQuantizer(CONFIGS[name])
    model = load(quantizer, nn.Sequential(nn.Linear(256, 128)).bfloat16())
    parameter = quantizer.parameters["0.weight"]
    weight = torch.randn(128, 256, device="cuda").bfloat16()
    components = quantizer.quantize_param(parameter, weight)
    assert components is not None
    quantizer.install(model, parameter, components)
    model[0].bias = nn.Parameter(torch.zeros(128, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(4, 256, device="cuda").bfloat16()
    with torch.no_grad():
        y = model(x)
        expected = x.float() @ quantizer.dequantize(components, parameter).float().t()
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    assert model[0].weight.device.type == "cuda"
    same_state(dict(quantizer.components(model, parameter)), dict(components))
