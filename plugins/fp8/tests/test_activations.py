"""Activations in 8 bits: only where they are asked for and the device can, and then as the formats define them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quantdock
from quantdock import ConfigError, UnsupportedError, ops
from quantdock.testing import SmallModel, in_new_process, write_checkpoint
from quantdock_fp8 import eight_bits, products
from quantdock_fp8.activations import FBGEMM_FLOOR, Activations, defined
from quantdock_fp8.config import FbgemmFp8Config, Fp8Config, Mxfp8Config
from quantdock_fp8.linear import Fp8Linear
from quantdock_fp8.modelopt_config import ModelOptConfig
from quantdock_fp8.multiplying import multiply

IDS = torch.arange(12).reshape(2, 6)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
F8 = torch.float8_e4m3fn
CPU = torch.device("cpu")
Block = tuple[int, int]

REFUSED = (
    "quantize_activations=True asks for products of 8-bit floats on cpu, which can't be: this plugin multiplies them "
    "on CUDA devices only. Leave quantize_activations out: weights are decoded then, which is more precise"
)


# How they are quantized ---------------------------------------------------------------------------------------------


def values(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Over many orders of magnitude, with a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(-20, 8, (rows, columns), generator=generator)
    found = torch.randn(rows, columns, generator=generator) * torch.exp2(powers.float())
    found[rows // 2] = 0
    return found.to(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 300),
    size=st.sampled_from([32, 40, 128, 1000]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_groups_as_in_the_kernels_of_transformers(
    rows: int, columns: int, size: int, dtype: torch.dtype, seed: int
) -> None:
    """``fp8_act_quant`` of kernels-community/finegrained-fp8, which takes groups of the same size only."""
    x = values(rows, columns, dtype, seed)
    found, scales = Activations().quantize(x, (128, size), None)
    for index, group in enumerate(x.float().split(size, dim=1)):
        scale = group.abs().amax(1, keepdim=True) / 448.0
        assert torch.equal(scales[:, index : index + 1], scale.clamp(min=1e-12))
        expected = (group / scale.clamp(min=1e-12)).to(F8)
        assert same_bits(found[:, index * size : (index + 1) * size].contiguous(), expected)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 300),
    bound=st.sampled_from([0.5, 1200.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_rows_as_in_fbgemm(rows: int, columns: int, bound: float, dtype: torch.dtype, seed: int) -> None:
    """``quantize_fp8_per_row`` on CUDA: ``max(min(largest, bound) / 448, 1 / (448 * 512))``, saturating."""
    x = values(rows, columns, dtype, seed)
    found, scales = FbgemmFp8Config(activation_scale_ub=bound, quantize_activations=True).activations.quantize(
        x, (1, columns), None
    )
    expected = torch.maximum(x.float().abs().amax(1).clamp(max=bound) / 448, torch.tensor(1 / (448 * 512)))
    assert torch.equal(scales, expected[:, None])
    assert same_bits(found, (x.float() / scales).clamp(-448, 448).to(F8))


@pytest.mark.parametrize("stored", [torch.tensor(0.02), torch.tensor([0.02]).bfloat16()])
def test_a_stored_scale_is_for_all(stored: Tensor) -> None:
    x = values(5, 40, torch.bfloat16, 0) * 100
    found, scales = Activations(static=True).quantize(x, (16, 16), stored)
    assert scales.shape == (1, 1)
    assert scales.item() == stored.float().item()
    assert same_bits(found, (x.float() / stored.float()).clamp(-448, 448).to(F8))
    assert found.float().abs().max() == 448


@pytest.mark.parametrize("static", [False, True])
def test_strides_make_no_difference(static: bool) -> None:
    x = values(40, 96, torch.bfloat16, 0)
    stored = torch.tensor(0.5) if static else None
    expected, scales = Activations(static=static).quantize(x, (16, 40), stored)
    for other in (x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2]):
        found, again = Activations(static=static).quantize(other, (16, 40), stored)
        assert found.is_contiguous()
        assert same_bits(found, expected)
        assert torch.equal(again, scales)


def test_what_is_no_number_spoils_its_group_alone() -> None:
    x = torch.ones(2, 100)
    x[0, 10], x[1, 50] = float("nan"), float("inf")
    found, scales = Activations().quantize(x, (128, 40), None)
    values = found.float() * scales.repeat_interleave(40, 1)[:, :100]
    assert torch.equal(values.isnan(), torch.zeros(2, 100, dtype=torch.bool).index_put_(*spoiled()))
    bounded, _ = Activations(bound=2.0, floor=FBGEMM_FLOOR).quantize(x, (128, 40), None)
    assert bounded[1, 50].float() == 448


def spoiled() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """All of the first group of row 0; of the second group of row 1, what was infinite (and the scale, for all)."""
    rows = torch.tensor([0] * 40 + [1] * 40)
    return (rows, torch.tensor([*range(40), *range(40, 80)])), torch.tensor(True)


# What is multiplied -------------------------------------------------------------------------------------------------


def weight_of(rows: int, columns: int, block: Block, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).mul_(50).clamp_(-448, 448).to(F8)
    grid = -(-rows // block[0]), -(-columns // block[1])
    return weight, torch.rand(grid, generator=generator) + 0.5


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 40),
    rows=st.integers(1, 8),
    columns=st.integers(1, 20),
    way=st.sampled_from(["tensor", "row", "row with one scale"]),
    seed=st.integers(0, 2**32),
)
def test_scaled_mm_computes_what_is_defined(count: int, rows: int, columns: int, way: str, seed: int) -> None:
    rows, columns = 16 * rows, 16 * columns
    static, block = way == "tensor", (1 if way == "row" else rows, columns)
    weight, scales = weight_of(rows, columns, block, seed)
    x = values(count, columns, torch.bfloat16, seed) / 128
    own, own_scales = Activations(static=static).quantize(x, block, torch.tensor(2e-3) if static else None)
    multiplication = products.MULTIPLICATIONS[way.partition(" ")[0]]
    expected = defined(own, own_scales, weight, scales, block)
    for dtype in DTYPES if way == "tensor" else (torch.bfloat16,):
        found = multiplication(own, own_scales, weight, scales, block, dtype)
        assert (found.dtype, found.shape) == (dtype, (count, rows))
        error = (found.float() - expected).abs().amax()
        assert error <= (torch.finfo(dtype).eps + 1e-6) * expected.abs().max()


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 9),
    rows=st.integers(1, 90),
    columns=st.integers(1, 90),
    block=st.sampled_from([(128, 128), (16, 40), (1, 128), (128, 32)]),
    seed=st.integers(0, 2**32),
)
def test_the_definition_is_near_the_product_that_it_stands_for(
    count: int, rows: int, columns: int, block: Block, seed: int
) -> None:
    weight, scales = weight_of(rows, columns, block, seed)
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))
    found = defined(*Activations().quantize(x, block, None), weight, scales, block)
    spread = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    full = weight.double() * spread.double()
    # Codes are off by 2 ** -4 of themselves at most, and by half of the smallest, 2 ** -10 of the scale.
    allowed = (x.double().abs() * 2**-4 + x.double().abs().amax() / 448 * 2**-10) @ full.abs().T
    assert bool(((found.double() - x.double() @ full.T).abs() <= allowed + 1e-3).all())


@pytest.mark.parametrize("count", [1, 4, 5, 130])
@pytest.mark.parametrize("shape", [(128, 128), (256, 640), (384, 512), (128, 1280)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_takes_the_scales_of_blocks_as_they_are_laid_out(
    count: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """There is no such product on CPU; its checks of shapes and strides need neither a device nor values."""
    if not hasattr(nn.functional, "scaled_mm"):
        pytest.skip("this torch has no scaled_mm")
    weight, scales = (torch.empty(each, device="meta") for each in (shape, (shape[0] // 128, shape[1] // 128)))
    own, own_scales = Activations().quantize(torch.empty(count, shape[1], device="meta"), (128, 128), None)
    found = products.multiply_blocks(own, own_scales, weight.to(F8), scales, (128, 128), dtype)
    assert (found.dtype, found.shape) == (dtype, (count, shape[0]))


@pytest.mark.parametrize(
    ("dtype", "shape", "block", "static", "expected"),
    [
        (torch.float32, (48, 64), (48, 64), True, "tensor"),
        (torch.bfloat16, (48, 64), (48, 64), False, "row"),
        (torch.bfloat16, (48, 64), (1, 64), False, "row"),
        (torch.bfloat16, (48, 64), (1, 64), True, "row"),
        (torch.float16, (48, 64), (1, 64), False, None),
        (torch.bfloat16, (256, 384), (128, 128), False, "block"),
        (torch.float16, (256, 384), (128, 128), False, "block"),
        (torch.bfloat16, (256, 384), (128, 128), True, None),
        (torch.bfloat16, (576, 512), (128, 128), False, None),
        (torch.bfloat16, (512, 576), (128, 128), False, None),
        (torch.bfloat16, (256, 384), (64, 128), False, None),
        (torch.bfloat16, (64, 64), (16, 64), False, None),
        (torch.bfloat16, (50, 64), (1, 64), False, None),
        (torch.bfloat16, (48, 65), (48, 65), True, None),
    ],
)
def test_recipes_are_for_what_torch_can(
    dtype: torch.dtype, shape: tuple[int, int], block: Block, static: bool, expected: str | None
) -> None:
    assert eight_bits.recipe(dtype, shape, block, static) == expected


def test_gradients_are_those_of_the_decoded_weight() -> None:
    block = (1, 64)
    weight, scales = weight_of(48, 64, block, 0)
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(48, dtype=torch.bfloat16, requires_grad=True)

    def product(x: Tensor, weight: Tensor, scales: Tensor, block: Block, bias: Tensor | None) -> Tensor:
        own, own_scales = Activations().quantize(x, block, None)
        assert bias is not None
        return products.multiply_rows(own, own_scales, weight, scales, block, x.dtype) + bias

    results = [multiply(x, weight, scales, block, bias, each) for each in (product, None)]
    assert not torch.equal(*results)
    found, expected = (torch.autograd.grad(result.float().sum(), (x, bias)) for result in results)
    assert all(map(torch.equal, found, expected))


# Who asks for it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [Fp8Config(quantize_activations=True), FbgemmFp8Config(quantize_activations=True)])
def test_how_to_run_is_not_what_is_stored(config: Fp8Config | FbgemmFp8Config) -> None:
    assert "quantize_activations" not in config.to_dict()
    stored = type(config).from_dict(config.to_dict())
    assert not stored.quantize_activations
    assert stored.activations is None
    assert stored.overridden_by(config) == config
    assert type(config).from_dict(config.to_dict() | {"quantize_activations": True}) == config


def test_a_user_spells_out_nothing_else() -> None:
    stored = Fp8Config(weight_block_size=(128, 128), scale_fmt="ue8m0", activation_scheme="static")
    found = stored.overridden_by(Fp8Config(quantize_activations=True), {"quantize_activations"})
    assert found.weight_block_size == (128, 128)
    assert found.activations == Activations(static=True)
    assert Fp8Config(quantize_activations=True).activations == Activations()
    own = FbgemmFp8Config(quantize_activations=True, activation_scale_ub=900).activations
    assert own == Activations(bound=900.0, floor=FBGEMM_FLOOR)


@pytest.mark.parametrize("config", [Fp8Config, FbgemmFp8Config])
def test_it_is_asked_for_or_not(config: type[Fp8Config | FbgemmFp8Config]) -> None:
    with pytest.raises(ConfigError, match="quantize_activations is 'dynamic', expected true or false"):
        config.from_dict({"quantize_activations": "dynamic"})


def test_methods_that_have_no_such_products_say_so() -> None:
    with pytest.raises(ConfigError, match="quantize_activations is True, expected false; products of MXFP8 with MXFP8"):
        Mxfp8Config(quantize_activations=True)
    with pytest.raises(ConfigError, match="no field 'quantize_activations'"):
        ModelOptConfig.from_dict({"quant_algo": "FP8", "quantize_activations": True})


@pytest.mark.parametrize("config", [Fp8Config, FbgemmFp8Config])
def test_refused_where_it_cannot_be_before_anything_is_loaded(
    tmp_path: Path, config: type[Fp8Config | FbgemmFp8Config]
) -> None:
    write_checkpoint(tmp_path / "it")
    asked = config(quantize_activations=True)
    with pytest.raises(UnsupportedError) as caught:
        quantdock.plan(tmp_path / "it", model=SmallModel, quantize=asked, device_map="cpu")
    assert str(caught.value) == REFUSED


def test_a_stored_checkpoint_is_asked_for_it_in_a_load(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "it")
    model = quantdock.load(tmp_path / "it", model=SmallModel, quantize="fp8-block", device_map="cpu")
    saved = quantdock.save(model, tmp_path / "saved")
    for asked in (Fp8Config(quantize_activations=True), {"quant_method": "fp8", "quantize_activations": True}):
        with pytest.raises(UnsupportedError) as caught:
            quantdock.load(saved, model=SmallModel, quantize=asked, device_map="cpu")
        assert str(caught.value) == REFUSED
    explicit = {"quant_method": "fp8", "quantize_activations": False}
    again = quantdock.load(saved, model=SmallModel, quantize=explicit, device_map="cpu")
    with torch.no_grad():
        assert torch.equal(again(IDS), model(IDS))
    other = Fp8Config(weight_block_size=(64, 64), quantize_activations=True)
    with pytest.raises(ConfigError, match="already quantized and fixes weight_block_size"):
        quantdock.load(saved, model=SmallModel, quantize=other, device_map="cpu")


def quantizing(tmp_path: Path) -> nn.Module:
    """A model as it would be after a move from a device that multiplies 8-bit floats."""
    write_checkpoint(tmp_path / "it")
    model = quantdock.load(tmp_path / "it", model=SmallModel, quantize="fp8-block", device_map="cpu")
    for layer in model.modules():
        if isinstance(layer, Fp8Linear):
            layer.activations = Activations()
    return model


def test_a_model_that_was_moved_refuses_and_says_so(tmp_path: Path) -> None:
    model = quantizing(tmp_path)
    layer = model.get_submodule("blocks.0.up")
    assert isinstance(layer, Fp8Linear)
    assert set(layer.paths().values()) == {"refused"}
    assert "quantize_activations=True" in repr(layer)
    with pytest.raises(UnsupportedError) as caught:
        model(IDS)
    assert str(caught.value) == REFUSED
    assert "refused" in str(quantdock.report(model))
    config = json.loads((quantdock.save(model, tmp_path / "saved") / "config.json").read_text())
    assert "quantize_activations" not in config["quantization_config"]


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch.compile does so
def test_a_compiled_layer_refuses_in_the_same_way(tmp_path: Path) -> None:
    """What decides is one operation to torch.compile, which makes no other product of it."""
    layer = quantizing(tmp_path).get_submodule("blocks.0.up")
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError) as caught, torch.no_grad():
        torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert str(caught.value) == REFUSED


def test_paths_on_cpu(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "it")
    model = quantdock.load(tmp_path / "it", model=SmallModel, quantize="fp8-row", device_map="cpu")
    layer = model.get_submodule("blocks.0.up")
    assert isinstance(layer, Fp8Linear)
    path = "compiled" if ops.has_fast_products() else "decode"
    assert layer.paths() == dict.fromkeys(("bfloat16", "float16", "float32"), path)
    assert layer.path(torch.float64) == "decode"


def test_triton_need_not_be_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "it")
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, quantdock; from quantdock.testing import SmallModel\n"
        "model = quantdock.load(sys.argv[1], model=SmallModel, quantize='fp8', device_map='cpu')\n"
        "model(torch.arange(6).reshape(1, 6))\n"
        "print(model.get_submodule('blocks.0.up').paths()['bfloat16'])"
    )
    assert in_new_process("-c", code, str(tmp_path / "it")).strip() in ("compiled", "decode")
