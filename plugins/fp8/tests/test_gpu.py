"""On a CUDA device: the same bits as on CPU, moves between devices, and what kernels compute."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import quantdock
from quantdock import QuantizationConfig, UnsupportedError
from quantdock.testing import QuantizerConformance, SmallModel, write_checkpoint
from quantdock_fp8 import fp4, launching
from quantdock_fp8.activations import defined
from quantdock_fp8.config import FbgemmFp8Config, Fp8Config
from quantdock_fp8.eight_bits import why_not
from quantdock_fp8.few_rows import ROWS
from quantdock_fp8.linear import Fp8Linear
from quantdock_fp8.presets import BLOCK, TENSOR

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

REASON = why_not(torch.device("cuda:0"))
in_eight_bits = pytest.mark.skipif(REASON is not None, reason=f"no products of 8-bit floats here: {REASON}")
in_triton = pytest.mark.skipif(not launching.installed(), reason="Triton isn't installed")


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


# Weights as they are stored, few rows of activations ----------------------------------------------------------------

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRESETS = ("fp8", "fp8-row", "fp8-block")
SHAPES = ((256, 384), (576, 512), (330, 200), (129, 7))
"""``[out, in]`` of a layer; blocks that fill it, blocks that don't, and dimensions that instructions don't like."""


def layer_of(folder: Path, quantize: object, shape: tuple[int, int], dtype: torch.dtype, device: str) -> Fp8Linear:
    """A layer with a bias, in evaluation."""
    if not folder.exists():
        write_checkpoint(folder, linear=(shape[1], shape[0]), dtype=dtype)
    model = quantdock.load(folder, model=SmallModel, quantize=quantize, device_map=device)
    layer = model.get_submodule("blocks.1.extra")
    assert isinstance(layer, Fp8Linear)
    return layer


def near(found: Tensor, expected: Tensor, dtype: torch.dtype, more: float = 0.0) -> bool:
    """Up to the order of sums, and what tensor cores leave out of them."""
    error = (found.cpu().double() - expected.double()).abs().max()
    return bool(error <= (8 * torch.finfo(dtype).eps + more) * expected.double().abs().max())


def rows_of(count: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(dtype)


@in_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_few_rows_and_many_as_on_the_cpu(
    tmp_path: Path, preset: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    here, there = (layer_of(tmp_path / "it", preset, shape, dtype, device) for device in ("cpu", "cuda"))
    assert there.path(dtype) == "triton"
    with torch.no_grad():
        for count in (1, 2, 17, ROWS, ROWS + 1, 300):
            x = rows_of(count, shape[1], dtype)
            found = there(x.cuda())
            assert found.dtype == dtype
            assert near(found, here(x), dtype), count
            assert torch.equal(found, there(x.cuda()))  # sums have one order


@in_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_decodes_to_the_bits_of_the_cpu(tmp_path: Path, dtype: torch.dtype) -> None:
    here, there = (layer_of(tmp_path / "it", "fp8-block", (576, 512), dtype, device) for device in ("cpu", "cuda"))
    numbers = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    every = numbers.repeat(-(-576 * 512 // len(numbers)))[: 576 * 512].reshape(576, 512).view(torch.float8_e4m3fn)
    for layer in (here, there):
        layer.weight.data.view(torch.uint8).copy_(every.view(torch.uint8))
        layer.weight_scale_inv.mul_(2.0**-14)  # products are subnormal in float16
        layer.bias = None
    assert there.path(dtype) == "triton"
    with torch.no_grad():
        for part in torch.eye(512, dtype=dtype).split(ROWS):
            assert torch.equal(there(part.cuda()).cpu(), here(part))


@in_triton
def test_layers_that_were_moved_and_used_are_saved_as_they_were(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "it", linear=(200, 330))
    model = quantdock.load(tmp_path / "it", model=SmallModel, quantize="fp8-block", device_map="cpu")
    expected = (quantdock.save(model, tmp_path / "first") / "model.safetensors").read_bytes()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        before = model(ids)
        model.cuda()
        assert "triton in" in str(quantdock.report(model))
        assert near(model(ids.cuda()), before, torch.bfloat16, 0.05)
        used = (quantdock.save(model, tmp_path / "second") / "model.safetensors").read_bytes()
        assert torch.equal(model.cpu()(ids), before)
    assert used == expected


@in_triton
def test_gradients_training_and_autocast_as_on_the_cpu(tmp_path: Path) -> None:
    dtype = torch.float32
    here, there = (layer_of(tmp_path / "it", "fp8-block", (330, 200), dtype, device) for device in ("cpu", "cuda"))
    gradients = []
    for layer in (here, there.train()):
        x = rows_of(3, 200, dtype).to(layer.weight.device).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)
        gradients.append(gradient.cpu())
    assert near(gradients[1], gradients[0], dtype)
    there.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16), torch.autocast("cpu", dtype=torch.bfloat16):
        x = rows_of(3, 200, dtype)
        found = there(x.cuda())
        assert found.dtype == torch.bfloat16
        assert near(found, here(x), torch.bfloat16)


@in_triton
def test_graphs_can_be_captured(tmp_path: Path) -> None:
    layer = layer_of(tmp_path / "it", "fp8-block", (256, 384), torch.bfloat16, "cuda")
    x = rows_of(1, 384, torch.bfloat16).cuda()
    with torch.no_grad():
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer(x)
        found.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(found, expected)


@in_triton
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is but one CUDA device")
def test_layers_compute_where_they_are(tmp_path: Path) -> None:
    here, there = (
        layer_of(tmp_path / "it", "fp8-block", (256, 384), torch.bfloat16, each) for each in ("cpu", "cuda:1")
    )
    x = rows_of(1, 384, torch.bfloat16)
    with torch.no_grad(), torch.cuda.device(0):
        assert near(there(x.to("cuda:1")), here(x), torch.bfloat16)


# Activations in 8 bits ----------------------------------------------------------------------------------------------


def expected_of(layer: Fp8Linear, x: Tensor) -> Tensor:
    """What the definition gives on CPU, for a layer that was moved there."""
    assert layer.activations is not None
    stored, block = layer._stored(), layer.coding.tiling.block
    own, scales = layer.activations.quantize(x, block, layer._buffers.get("input_scale"))
    found = defined(own, scales, stored.codes, stored.scales(), block)
    return found.to(x.dtype) + layer.bias.to(x.dtype)


@in_eight_bits
@in_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "asked",
    [
        Fp8Config(quantize_activations=True),
        FbgemmFp8Config(quantize_activations=True),
        Fp8Config(quantize_activations=True, weight_block_size=(128, 128)),
        Fp8Config(quantize_activations=True, weight_block_size=(48, 40)),
    ],
    ids=["tensor", "row", "block", "odd blocks"],
)
def test_products_of_8_bits_are_what_is_defined(
    tmp_path: Path, asked: QuantizationConfig, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    layer = layer_of(tmp_path / "it", asked, shape, dtype, "cuda")
    assert layer.path(dtype) in ("scaled_mm", "triton8")
    inputs = [rows_of(count, shape[1], dtype) for count in (0, 1, 2, 17, 300)]
    with torch.no_grad():
        found = [layer(x.cuda()) for x in inputs]
        layer.cpu()
        for x, each in zip(inputs, found, strict=True):
            assert (each.dtype, each.shape) == (dtype, (len(x), shape[0]))
            assert not len(x) or near(each, expected_of(layer, x), dtype, 1e-3)
        assert layer.path(dtype) == "refused"
        with pytest.raises(
            UnsupportedError, match="quantize_activations=True asks for products of 8-bit floats on cpu"
        ):
            layer(inputs[1])


@in_eight_bits
@in_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 384), (330, 200)])
def test_a_stored_scale_of_activations(tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "plain.weight": torch.randn(shape, generator=generator).mul_(60).clamp_(-448, 448).to(torch.float8_e4m3fn),
        "plain.weight_scale": torch.tensor(0.01),
        "plain.input_scale": torch.tensor(0.02),
        "plain.bias": torch.randn(shape[0], generator=generator).to(dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        f'{{"dtype": "{str(dtype).removeprefix("torch.")}", "quantization_config": '
        '{"quant_method": "fp8", "activation_scheme": "static"}}'
    )
    asked = Fp8Config(quantize_activations=True)
    model = quantdock.load(
        tmp_path,
        model=lambda: nn.ModuleDict({"plain": nn.Linear(shape[1], shape[0], dtype=dtype)}),
        quantize=asked,
        device_map="cuda",
    )
    layer = model.get_submodule("plain")
    assert isinstance(layer, Fp8Linear)
    assert layer.path(dtype) == ("triton8" if shape[1] % 16 else "scaled_mm")
    x = rows_of(5, shape[1], dtype) * 3  # some of it beyond what the scale is for
    with torch.no_grad():
        found = layer(x.cuda())
        assert near(found, expected_of(layer.cpu(), x), dtype, 1e-3)


@in_eight_bits
@in_triton
def test_activations_have_the_codes_of_the_cpu(tmp_path: Path) -> None:
    layer = layer_of(tmp_path / "it", Fp8Config(quantize_activations=True), (256, 384), torch.bfloat16, "cuda")
    assert layer.activations is not None
    for dtype in DTYPES:
        for block in ((128, 128), (1, 384), (16, 40)):
            x = rows_of(33, 384, dtype)
            here = layer.activations.quantize(x, block, None)
            there = layer.activations.quantize(x.cuda(), block, None)
            for one, other in zip(here, there, strict=True):
                assert torch.equal(one.view(torch.uint8), other.cpu().view(torch.uint8))


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch.compile does so
@in_eight_bits
@in_triton
def test_8_bits_under_compile_and_with_gradients(tmp_path: Path) -> None:
    asked = Fp8Config(quantize_activations=True, weight_block_size=(128, 128))
    layer = layer_of(tmp_path / "it", asked, (256, 384), torch.bfloat16, "cuda")
    x = rows_of(5, 384, torch.bfloat16).cuda()
    with torch.no_grad():
        expected = layer(x)
        found = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
    stored = layer._stored()
    decoded = torch.ones(5, 256, dtype=torch.bfloat16, device="cuda") @ stored.decode(torch.bfloat16)
    assert near(gradient, decoded.cpu(), torch.bfloat16)
