"""What the quantizer takes, how it changes a model, and how it gives it back."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quantdock import Parameter, SkipList, TensorSpec, UnsupportedError
from quantdock_bnb.config import BitsAndBytesConfig
from quantdock_bnb.quantizer import BitsAndBytesQuantizer

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
NESTED = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
HALF = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
CONFIGS = [NF4, NESTED, INT8, HALF]


def small(tools: Any) -> nn.Module:
    """A model with linear layers of both orientations, one of them twice, an embedding and a norm."""
    torch.manual_seed(0)
    model = nn.Module()
    model.embed = nn.Embedding(32, 64)
    model.up = nn.Linear(64, 96)
    model.norm = nn.LayerNorm(96)
    model.down = tools.Transposed(64, 96, torch.float32)
    model.again = model.up
    model.lm_head = nn.Linear(64, 32, bias=False)
    return model.bfloat16()


def of(name: str, shape: tuple[int, ...], role: Any = "linear", kind: type[nn.Module] = nn.Linear) -> Parameter:
    return Parameter(name=name, spec=TensorSpec(dtype=torch.bfloat16, shape=shape), module_type=kind, role=role)


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        (of("a.weight", (8, 8)), None),
        (of("a.weight", (8, 8), "linear-transposed"), None),
        (of("a.weight", (8, 8), "embedding"), "embedding: bitsandbytes quantizes the weights of linear layers only"),
        (
            of("a.experts", (4, 8, 8), "other"),
            "3-D parameter: bitsandbytes quantizes the weights of linear layers only",
        ),
        (of("a.bias", (8,), "other"), "1-D parameter: bitsandbytes quantizes"),
        (of("a.weight", (8, 8), "other", nn.Bilinear), "in Bilinear: bitsandbytes quantizes"),
        (of("weight", (8, 8)), "the model is a linear layer itself"),
        (of("a.weight", (0, 8)), "it has no elements"),
        (of("b.lm_head.weight", (8, 8)), "llm_int8_skip_modules='lm_head'"),
    ],
)
@pytest.mark.parametrize("mode", ["load_in_4bit", "load_in_8bit"])
def test_refusal(parameter: Parameter, reason: str | None, mode: str) -> None:
    quantizer = BitsAndBytesQuantizer(BitsAndBytesConfig(**{mode: True}, llm_int8_skip_modules=("lm_head",)))
    found = quantizer.refusal(parameter)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(reason)


def test_what_is_stored_quantized_is_taken_whatever_the_list_says() -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=("lm_head",))
    assert BitsAndBytesQuantizer(config, prequantized=True).refusal(of("lm_head.weight", (8, 8))) is None


def test_four_bits_need_floats_that_bitsandbytes_knows() -> None:
    parameter = Parameter(
        name="a.weight",
        spec=TensorSpec(dtype=torch.float64, shape=(8, 8)),
        module_type=nn.Linear,
        role="linear",
    )
    with pytest.raises(
        UnsupportedError, match=r"a\.weight is torch\.float64; bitsandbytes quantizes float16, bfloat16"
    ):
        BitsAndBytesQuantizer(NF4).layout(parameter)
    assert BitsAndBytesQuantizer(INT8).layout(parameter)


@pytest.fixture
def other_defaults() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("other_defaults")
def test_under_other_defaults_of_torch() -> None:
    """bitsandbytes itself would make 4-bit code tables in the default dtype, and so wrong ones."""
    parameter = of("a.weight", (96, 320))
    tensor = torch.randn(96, 320)
    for config in (NF4, NESTED):
        quantizer = BitsAndBytesQuantizer(config)
        quantizer.parameters = {parameter.name: parameter}
        with pytest.raises(UnsupportedError, match=r"a\.weight: torch's default dtype is torch\.bfloat16"):
            quantizer.quantize_param(parameter, tensor)
    quantizer = BitsAndBytesQuantizer(INT8)
    quantizer.parameters = {parameter.name: parameter}
    with torch.device("meta"):
        components = quantizer.quantize_param(parameter, tensor)
    expected, scales, _ = bnb.functional.int8_vectorwise_quant(tensor.to(torch.float16))
    assert components is not None
    assert torch.equal(components["weight"], expected)
    assert torch.equal(components["SCB"], scales)


@pytest.mark.parametrize("config", CONFIGS)
def test_swapped_modules(load: Any, tools: Any, config: BitsAndBytesConfig) -> None:
    model = small(tools)
    types = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    embed, norm = model.embed, model.norm
    loaded = load(BitsAndBytesQuantizer(config), model)
    assert loaded is model
    assert loaded.embed is embed
    assert loaded.norm is norm
    assert loaded.up is loaded.again
    for name in ("up", "down", "lm_head"):
        module = loaded.get_submodule(name)
        assert isinstance(module, bnb.nn.Linear4bit if config.load_in_4bit else bnb.nn.Linear8bitLt)
        assert module.source_cls is types[name]
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert (loaded.down.in_features, loaded.down.out_features) == (96, 64)
    assert loaded.lm_head.bias is None
    flags = {name: getattr(loaded, name, False) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit")}
    assert flags == {"is_loaded_in_4bit": config.load_in_4bit, "is_loaded_in_8bit": config.load_in_8bit}


def test_only_its_own_parameters_are_touched(tools: Any) -> None:
    quantizer = BitsAndBytesQuantizer(NF4)
    model = small(tools).to("meta")
    described = tools.parameters_of(model)
    quantizer.parameters = {"up.weight": described["up.weight"]}
    bias, down = model.up.bias, model.down
    model.up.eval()
    quantizer.preprocess_model(model)
    assert model.up.bias is bias
    assert model.down is down
    assert not model.up.training
    assert all(parameter.is_meta for parameter in model.parameters())
    assert quantizer.quantize_param(described["down.weight"], torch.zeros(96, 64)) is None


@pytest.mark.parametrize("config", CONFIGS)
def test_components_are_the_state_dict(load: Any, tools: Any, config: BitsAndBytesConfig) -> None:
    quantizer = BitsAndBytesQuantizer(config)
    model = load(quantizer, small(tools))
    state = model.state_dict()
    for parameter in quantizer.parameters.values():
        components = quantizer.components(model, parameter)
        assert list(components) == list(quantizer.layout(parameter).components)
        for name, tensor in components.items():
            assert torch.equal(tensor, state[f"{parameter.module}.{name}"])
            assert not tensor.requires_grad


@pytest.mark.parametrize("config", CONFIGS)
def test_saved_and_loaded_again(load: Any, tools: Any, config: BitsAndBytesConfig) -> None:
    """The road of a checkpoint that is quantized already gives the same state and outputs, after use too."""
    quantizer = BitsAndBytesQuantizer(config)
    model = load(quantizer, small(tools))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        y = model.up(x), model.down(model.up(x))
    if config is HALF:
        with pytest.raises(UnsupportedError, match="llm_int8_has_fp16_weight=true, so nothing in it is quantized"):
            BitsAndBytesQuantizer(config, prequantized=True)
        return
    again = BitsAndBytesQuantizer(config, prequantized=True)
    again.parameters = quantizer.parameters
    skeleton = small(tools).to("meta")
    again.preprocess_model(skeleton)
    for parameter in again.parameters.values():
        stored = {name: tensor.clone() for name, tensor in quantizer.components(model, parameter).items()}
        layout = again.stored_layout(parameter, {name: TensorSpec.of(tensor) for name, tensor in stored.items()})
        assert list(layout.components) == list(stored)
        again.install(skeleton, parameter, stored)
    for name in ("embed.weight", "up.bias", "norm.weight", "norm.bias", "down.bias"):
        owner = skeleton.get_submodule(name.rpartition(".")[0])
        owner.register_parameter(name.rpartition(".")[2], nn.Parameter(model.get_parameter(name).detach()))
    again.postprocess_model(skeleton)
    skeleton.eval()
    with torch.no_grad():
        z = skeleton.up(x), skeleton.down(skeleton.up(x))
    assert all(map(torch.equal, y, z))
    expected = model.state_dict()
    found = skeleton.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("config", CONFIGS)
def test_dequantized_and_restored(load: Any, tools: Any, config: BitsAndBytesConfig) -> None:
    quantizer = BitsAndBytesQuantizer(config)
    original = small(tools)
    model = load(quantizer, copy.deepcopy(original))
    for name, parameter in quantizer.parameters.items():
        module = model.get_submodule(parameter.module)
        weight = quantizer.dequantize(quantizer.components(model, parameter), parameter)
        assert TensorSpec.of(weight) == parameter.spec
        assert weight.is_contiguous()
        reference: Any = module.weight
        if config.load_in_4bit:
            reference = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif config is not HALF:
            reference = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        reference = reference.to(torch.bfloat16)
        assert torch.equal(weight, reference.t() if name == "down.weight" else reference)
        restored = quantizer.restore_module(module, parameter)
        before = original.get_submodule(parameter.module)
        assert type(restored) is type(before)
        assert [(n, TensorSpec.of(p), p.is_meta) for n, p in restored.named_parameters()] == [
            (n, TensorSpec.of(p), True) for n, p in before.named_parameters()
        ]
        assert all(p.requires_grad for p in restored.parameters())


def test_what_was_left_alone_is_saved_as_such(load: Any, tools: Any) -> None:
    """transformers looks for quantized tensors in every linear layer that the list doesn't name."""
    model = small(tools)
    model.encoder = nn.Module()
    model.encoder.up = nn.Linear(64, 64)
    model.encoder.proj = nn.Linear(64, 64)
    described = tools.parameters_of(model)
    quantizer = BitsAndBytesQuantizer(BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=("lm_head",)))
    taken = ("encoder.up.weight", "down.weight")
    quantizer.parameters = {name: described[name] for name in taken}
    listed = quantizer.saved_config(described)["llm_int8_skip_modules"]
    assert listed == ["lm_head", "encoder.proj", "^up$"]  # "up" alone would name "encoder.up" too
    again = SkipList(listed)
    modules = {parameter.module for parameter in described.values() if parameter.role.startswith("linear")}
    skipped = {module for module in modules if again.match(module) is not None}
    assert skipped == modules - {described[name].module for name in taken}


@given(
    modules=st.lists(st.from_regex(r"[ab_](\.?[ab_1]){0,4}", fullmatch=True), unique=True, min_size=1, max_size=8),
    data=st.data(),
)
def test_what_is_listed_matches_what_was_left_alone_and_nothing_else(modules: list[str], data: st.DataObject) -> None:
    spec = TensorSpec(dtype=torch.float32, shape=(8, 8))
    described = {
        f"{module}.weight": Parameter(name=f"{module}.weight", spec=spec, module_type=nn.Linear, role="linear")
        for module in modules
    }
    left = data.draw(st.sets(st.sampled_from(modules)))
    quantizer = BitsAndBytesQuantizer(BitsAndBytesConfig(load_in_4bit=True))
    quantizer.parameters = {name: one for name, one in described.items() if one.module not in left}
    listed = SkipList(quantizer.saved_config(described)["llm_int8_skip_modules"] or ())
    assert {module for module in modules if listed.match(module) is not None} == left


def test_nothing_left_alone_is_not_listed(tools: Any) -> None:
    described = tools.parameters_of(small(tools))
    quantizer = BitsAndBytesQuantizer(NF4)
    quantizer.parameters = {n: p for n, p in described.items() if quantizer.refusal(p) is None}
    assert quantizer.saved_config(described) == NF4.to_dict()
    assert BitsAndBytesQuantizer(NF4, prequantized=True).saved_config(described) == NF4.to_dict()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = BitsAndBytesQuantizer(NF4)
    quantizer.check_device(torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=re.escape(f"bitsandbytes {bnb.__version__} doesn't run on 'vulkan'")):
        quantizer.check_device(torch.device("vulkan"))
    monkeypatch.setattr(bnb.cextension.lib, "compiled_with_cuda", False)
    with pytest.raises(UnsupportedError, match="no library for the CUDA or ROCm version"):
        quantizer.check_device(torch.device("cuda", 0))
    preferred = quantizer.preferred_device()
    assert (preferred is not None) == torch.cuda.is_available()


def test_companions() -> None:
    assert BitsAndBytesQuantizer(INT8).companions() == {"SCB": "weight", "weight_format": "weight"}
    assert set(BitsAndBytesQuantizer(NF4).companions()) == {
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
        "weight.quant_state.bitsandbytes__fp4",
    }
