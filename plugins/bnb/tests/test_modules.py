"""Our layers compute what bitsandbytes' layers compute, bit for bit, and are the same to save after use as before."""

from __future__ import annotations

import copy
import io
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16
from torch import Tensor, nn

from quantdock_bnb import repack
from quantdock_bnb.config import BitsAndBytesConfig
from quantdock_bnb.modules import Linear4bit, Linear8bitLt
from quantdock_bnb.quantizer import BitsAndBytesQuantizer

needs_kernel = pytest.mark.skipif(
    not has_avx512bf16(), reason="bitsandbytes repacks weights only on CPUs with AVX512-BF16"
)


def four_bit(**options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} | options)


EIGHT_BIT = BitsAndBytesConfig(load_in_8bit=True)
CONFIGS = {
    "nf4": four_bit(bnb_4bit_compute_dtype=torch.bfloat16),
    "nf4 float32": four_bit(),
    "nf4 float16": four_bit(bnb_4bit_compute_dtype=torch.float16),
    "nf4 nested": four_bit(bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16),
    "nf4 128": four_bit(bnb_4bit_blocksize=128, bnb_4bit_compute_dtype=torch.bfloat16),
    "nf4 in bfloat16": four_bit(bnb_4bit_quant_storage=torch.bfloat16, bnb_4bit_use_double_quant=True),
    "fp4": four_bit(bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.bfloat16),
    "int8": EIGHT_BIT,
    "int8 all columns": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "int8 of 16-bit weights": BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True),
}
IN_FOUR_BITS = [name for name in CONFIGS if "4" in name]


def linear(rows: int = 64, columns: int = 256, dtype: torch.dtype = torch.bfloat16, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(rows + columns)
    return nn.Linear(columns, rows, bias=bias).to(dtype)


def ours(load: Any, config: BitsAndBytesConfig, layer: nn.Linear) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(layer))
    return load(BitsAndBytesQuantizer(config), model)[0]


def theirs(config: BitsAndBytesConfig, layer: nn.Linear) -> nn.Module:
    """The layer as transformers makes it with bitsandbytes."""
    rows, columns = layer.weight.shape
    result: nn.Module
    if config.load_in_4bit:
        result = bnb.nn.Linear4bit(
            columns,
            rows,
            layer.bias is not None,
            config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
        )
        result.weight.blocksize = config.bnb_4bit_blocksize
        kind = bnb.nn.Params4bit
    else:
        result = bnb.nn.Linear8bitLt(
            columns,
            rows,
            layer.bias is not None,
            has_fp16_weights=config.llm_int8_has_fp16_weight,
            threshold=config.llm_int8_threshold,
        )
        kind = bnb.nn.Int8Params
    attributes = {name: value for name, value in vars(result.weight).items() if name != "SCB"}
    result.weight = kind(layer.weight.data.clone(), requires_grad=False, **attributes).to("cpu")
    result.bias = copy.deepcopy(layer.bias)
    return result.requires_grad_(False).eval()


def inputs(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    x[:, ::50] *= 10  # beyond the threshold of 8-bit layers
    return x


def same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_same_state_and_outputs_as_bitsandbytes(load: Any, name: str, dtype: torch.dtype, bias: bool) -> None:
    layer = linear(dtype=dtype, bias=bias)
    mine, reference = ours(load, CONFIGS[name], layer), theirs(CONFIGS[name], layer)
    before = copy.deepcopy(reference.state_dict())
    same_state(mine.state_dict(), before)
    with torch.no_grad():
        for rows in (1, 3, 33):
            x = inputs(rows, 256, dtype)
            assert torch.equal(mine(x), reference(x))
            assert torch.equal(mine(x[None]), reference(x[None]))
    same_state(mine.state_dict(), before)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_same_outputs_and_gradients_in_training(load: Any, name: str) -> None:
    layer = linear()
    mine, reference = ours(load, CONFIGS[name], layer).train(), theirs(CONFIGS[name], layer).train()
    for rows in (1, 7):
        x, y = (inputs(rows, 256, torch.bfloat16).requires_grad_() for _ in range(2))
        for value, module in ((x, mine), (y, reference)):
            module(value).float().square().sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("name", [*IN_FOUR_BITS, "int8"])
def test_training_after_use(load: Any, name: str) -> None:
    """bitsandbytes' layer loses the gradient here, without a word, once its weight has the kernel's layout."""
    layer = linear()
    used, fresh = ours(load, CONFIGS[name], layer), ours(load, CONFIGS[name], layer)
    with torch.inference_mode():
        used(inputs(2, 256, torch.bfloat16))
    gradients = []
    for module in (used, fresh):
        x = inputs(3, 256, torch.bfloat16).requires_grad_()
        module.train()(x).float().sum().backward()
        gradients.append(x.grad)
    assert gradients[0] is not None
    assert torch.equal(*gradients)


@pytest.mark.parametrize("shape", [(20, 256), (96, 100), (7, 31), (33, 64), (32, 32)])
@pytest.mark.parametrize("nested", [False, True])
def test_any_shape(load: Any, shape: tuple[int, int], nested: bool) -> None:
    """bitsandbytes' layer fails on these in evaluation on CPUs with AVX512-BF16."""
    config = four_bit(bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=nested)
    layer = linear(*shape)
    mine = ours(load, config, layer)
    packed, state = bnb.functional.quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=nested)
    before = copy.deepcopy(mine.state_dict())
    with torch.no_grad():
        for rows in (1, 5):
            x = inputs(rows, shape[1], torch.bfloat16)
            assert torch.equal(mine(x), bnb.matmul_4bit(x, packed, quant_state=state, bias=layer.bias))
    same_state(mine.state_dict(), before)


@pytest.mark.parametrize("name", IN_FOUR_BITS)
def test_no_rows(load: Any, name: str) -> None:
    """bitsandbytes' kernel divides by their number, which ends the process."""
    mine = ours(load, CONFIGS[name], linear())
    with torch.no_grad():
        assert mine(torch.empty(0, 256, dtype=torch.bfloat16)).shape == (0, 64)
        mine(inputs(1, 256, torch.bfloat16))
        assert mine(torch.empty(2, 0, 256, dtype=torch.bfloat16)).shape == (2, 0, 64)


@needs_kernel
def test_the_kernel_is_used(load: Any) -> None:
    mine = ours(load, CONFIGS["nf4"], linear())
    assert isinstance(mine, Linear4bit)
    weight = mine.weight.data
    held = [weight.clone(), mine.weight.quant_state]
    mine(inputs(1, 256, torch.bfloat16))
    assert mine.stored_state is held[1]
    assert mine.weight.quant_state.packing_format_for_cpu
    assert mine.weight.nbytes == weight.nbytes
    assert torch.equal(weight, held[0])  # what somebody took from the layer before is left alone
    mine.train()(inputs(1, 256, torch.bfloat16))
    assert mine.stored_state is None
    assert mine.weight.quant_state is mine.quant_state is held[1]


@needs_kernel
@pytest.mark.parametrize("name", IN_FOUR_BITS)
@pytest.mark.parametrize("shape", [(32, 256), (64, 128), (1024, 768)])
def test_repacking_is_that_of_bitsandbytes(name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repack, "_STEP", 32 * 400)
    config = CONFIGS[name]
    data, state = bnb.functional.quantize_4bit(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16(),
        blocksize=config.bnb_4bit_blocksize,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )
    packed, kernel_state = repack.to_kernel(data, state)
    expected, expected_state = _convert_weight_packed_for_cpu(data, copy.copy(state))
    assert torch.equal(packed, expected)
    assert torch.equal(kernel_state.absmax, expected_state.absmax)
    back = repack.from_kernel(packed, data.dtype)
    assert back.shape == data.shape
    assert torch.equal(back.view(torch.uint8), data.view(torch.uint8))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_after_moves_and_copies(load: Any, name: str) -> None:
    layer = linear()
    model = nn.Sequential(ours(load, CONFIGS[name], layer)).eval()
    before = copy.deepcopy(model.state_dict())
    x = inputs(3, 256, torch.bfloat16)
    with torch.no_grad():
        y = model(x)
        for changed in (model.to("cpu"), copy.deepcopy(model), _pickled(model), model.cpu()):
            same_state(changed.state_dict(), before)
            assert torch.equal(changed(x), y)
            same_state(changed.state_dict(), before)


def _pickled(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    result: nn.Module = torch.load(stream, weights_only=False)
    return result


def test_bias_keeps_its_dtype(load: Any) -> None:
    """bitsandbytes casts the bias to the input's or the compute dtype for good; float32 would lose bits."""
    layer = linear(dtype=torch.float32)
    for config in (CONFIGS["nf4"], EIGHT_BIT):
        mine = ours(load, config, layer)
        with torch.no_grad():
            mine(inputs(2, 256, torch.bfloat16))
        assert mine.bias.dtype == torch.float32
        assert torch.equal(mine.bias, layer.bias)


def test_instances_of_bitsandbytes_layers(load: Any) -> None:
    """PEFT and transformers recognise layers by these classes and attributes."""
    assert isinstance(ours(load, CONFIGS["nf4"], linear()), bnb.nn.Linear4bit)
    assert isinstance(ours(load, EIGHT_BIT, linear()), bnb.nn.Linear8bitLt)
    assert issubclass(Linear8bitLt, nn.Linear)
    for name, config in CONFIGS.items():
        layer = linear()
        mine, reference = ours(load, config, layer), theirs(config, layer)
        assert type(mine.weight) is type(reference.weight)
        assert vars(mine.weight).keys() == vars(reference.weight).keys()
        for attribute, value in vars(reference.weight).items():
            found = getattr(mine.weight, attribute)
            if attribute == "quant_state":
                assert {key: type(part) for key, part in vars(found).items()} == {
                    key: type(part) for key, part in vars(value).items()
                }
                assert found == value
                assert mine.quant_state is found
            elif attribute == "module":
                assert found is mine
            elif isinstance(value, Tensor):
                assert torch.equal(found, value), (name, attribute)
            else:
                assert found == value, (name, attribute)
        assert not mine.weight.requires_grad


@pytest.mark.parametrize("bias", [False, True])
def test_a_twin_is_a_layer_of_its_own(bias: bool) -> None:
    """What ``twin`` gives is what the constructor gives, and shares nothing with its model."""

    def made() -> Linear4bit:
        return Linear4bit(64, 32, bias, torch.bfloat16, quant_type="nf4", device="meta")

    original, twin = made(), made().twin()
    assert original.__dict__.keys() == twin.__dict__.keys()
    for key, value in original.__dict__.items():
        if key not in ("_parameters", "_buffers", "_modules"):
            assert twin.__dict__[key] == value, key
    for name, parameter in original.named_parameters():
        other = twin.get_parameter(name)
        assert (type(parameter), parameter.shape, parameter.dtype) == (type(other), other.shape, other.dtype)
        assert (parameter.requires_grad, parameter.is_meta) == (other.requires_grad, other.is_meta)
        skipped = {"module"}
        assert {k: v for k, v in vars(parameter).items() if k not in skipped} == {
            k: v for k, v in vars(other).items() if k not in skipped
        }
    assert twin.weight.module is twin
    again = twin.twin()
    twin.register_forward_hook(lambda *_: None)
    twin.weight = original.weight
    assert not again._forward_hooks
    assert again.weight is not original.weight
