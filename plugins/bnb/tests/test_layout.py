"""What is declared before loading is what is made; what is stored differently is refused by name."""

from __future__ import annotations

import json
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from quantdock import Layout, Parameter, TensorSpec, UnsupportedError
from quantdock_bnb.config import BLOCKSIZES, STORAGE_DTYPES, BitsAndBytesConfig
from quantdock_bnb.quantizer import BitsAndBytesQuantizer

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DESCRIPTION = "weight.quant_state.bitsandbytes__nf4"


def parameter(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, role: Any = "linear") -> Parameter:
    """The weight ``0.weight`` of a layer with ``rows`` outputs and ``columns`` inputs."""
    shape = (columns, rows) if role == "linear-transposed" else (rows, columns)
    return Parameter(name="0.weight", spec=TensorSpec(dtype=dtype, shape=shape), module_type=nn.Linear, role=role)


def nf4(**options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} | options)


INT8 = BitsAndBytesConfig(load_in_8bit=True)
HALF = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)


def quantizer_for(described: Parameter, config: BitsAndBytesConfig, **options: Any) -> BitsAndBytesQuantizer:
    result = BitsAndBytesQuantizer(config, **options)
    result.parameters = {described.name: described}
    return result


def made(described: Parameter, config: BitsAndBytesConfig) -> tuple[Layout, dict[str, Tensor]]:
    quantizer = quantizer_for(described, config)
    tensor = torch.randn(described.spec.shape, generator=torch.Generator().manual_seed(0)).to(described.spec.dtype)
    components = quantizer.quantize_param(described, tensor)
    assert components is not None
    return quantizer.layout(described), dict(components)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 80),
    columns=st.integers(1, 300),
    dtype=st.sampled_from(FLOATS),
    blocksize=st.sampled_from(BLOCKSIZES),
    nested=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    storage=st.sampled_from(STORAGE_DTYPES),
    role=st.sampled_from(["linear", "linear-transposed"]),
)
def test_declared_is_made_in_four_bits(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    blocksize: int,
    nested: bool,
    quant_type: str,
    storage: torch.dtype,
    role: str,
) -> None:
    described = parameter(rows, columns, dtype, role)
    config = nf4(
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_blocksize=blocksize,
        bnb_4bit_quant_storage=storage,
    )
    if (rows * columns + 1) // 2 % storage.itemsize:
        with pytest.raises(
            UnsupportedError, match=r"0\.weight: .* don't fill whole elements of bnb_4bit_quant_storage"
        ):
            BitsAndBytesQuantizer(config).layout(described)
        return
    layout, components = made(described, config)
    assert list(layout.components) == list(components)
    assert layout.fits({name: TensorSpec.of(tensor) for name, tensor in components.items()})
    assert layout.variable == ({f"weight.quant_state.bitsandbytes__{quant_type}"} if nested else set())
    for name in layout.variable:
        assert components[name].numel() <= layout.components[name].numel


@pytest.mark.parametrize("config", [INT8, HALF], ids=["int8", "16-bit"])
@pytest.mark.parametrize("role", ["linear", "linear-transposed"])
def test_declared_is_made_in_eight_bits(config: BitsAndBytesConfig, role: str) -> None:
    layout, components = made(parameter(40, 24, torch.float32, role), config)
    assert list(layout.components) == list(components)
    assert layout.fits({name: TensorSpec.of(tensor) for name, tensor in components.items()})


@pytest.mark.parametrize("config", [nf4(), nf4(bnb_4bit_use_double_quant=True), INT8, HALF])
@pytest.mark.parametrize("prequantized", [False, True])
@pytest.mark.parametrize("shape", [(64, 256), (33, 65), (300, 257)])
def test_declared_bytes_are_held(
    load: Any, tools: Any, config: BitsAndBytesConfig, shape: tuple[int, int], prequantized: bool
) -> None:
    """Counted: the storages of packed weight, scales, code tables and offset, each once."""
    described = parameter(*shape)
    model = load(BitsAndBytesQuantizer(config), nn.Sequential(nn.Linear(shape[1], shape[0]).bfloat16()))
    layout = BitsAndBytesQuantizer(config).layout(described)
    if prequantized and config is not HALF:
        components = quantizer_for(described, config).components(model, described)
        again = quantizer_for(described, config, prequantized=True)
        layout = again.stored_layout(described, {name: TensorSpec.of(part) for name, part in components.items()})
        model = nn.Sequential(nn.Linear(shape[1], shape[0], device="meta"))
        again.preprocess_model(model)
        again.install(model, described, components)
    assert layout.nbytes == tools.held_bytes(model[0])


def peak_bytes(quantizer: BitsAndBytesQuantizer, described: Parameter, tensor: Tensor) -> int:
    """Bytes that quantizing allocates at the most, the result not counted."""
    quantizer.quantize_param(described, tensor)  # tables are made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = quantizer.quantize_param(described, tensor)
    assert result is not None
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak - sum(part.nbytes for part in result.values())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("role", ["linear", "linear-transposed"])
@pytest.mark.parametrize("config", [nf4(), nf4(bnb_4bit_use_double_quant=True), INT8, HALF])
def test_working_bytes_are_not_exceeded(config: BitsAndBytesConfig, role: str, dtype: torch.dtype) -> None:
    described = parameter(300, 256, dtype, role)
    quantizer = quantizer_for(described, config)
    allowed = quantizer.layout(described).working_bytes
    tensor = torch.randn(described.spec.shape).to(dtype)
    assert peak_bytes(quantizer, described, tensor) <= allowed
    assert peak_bytes(quantizer, described, torch.full_like(tensor, float("nan"))) <= allowed
    # One value that falls between two codes, all over.
    bound = torch.full_like(tensor, 0.8614784181118011)
    bound.view(-1)[::64] = 1
    assert peak_bytes(quantizer, described, bound) <= allowed


def test_temporaries_stay_small() -> None:
    layout = BitsAndBytesQuantizer(nf4(bnb_4bit_use_double_quant=True)).layout(parameter(4096, 4096))
    assert layout.working_bytes < 16 << 20


# Stored components ----------------------------------------------------------------------------------------------------


def specs_of(components: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in components.items()}


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("nested", [False, True])
def test_block_size_and_nesting_are_found_out(blocksize: int, nested: bool) -> None:
    described = parameter(512, 300)
    _, components = made(described, nf4(bnb_4bit_blocksize=blocksize, bnb_4bit_use_double_quant=nested))
    quantizer = quantizer_for(described, nf4(), prequantized=True)
    layout = quantizer.stored_layout(described, specs_of(components))
    assert layout.components == specs_of(components)
    expected = quantizer_for(described, nf4(bnb_4bit_blocksize=blocksize, bnb_4bit_use_double_quant=nested))
    assert layout.nbytes == expected.layout(described).nbytes


def spec(dtype: torch.dtype, *shape: int) -> TensorSpec:
    return TensorSpec(dtype=dtype, shape=shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight.absmax": None},
            r"'weight\.absmax' is missing, found 'weight', .*isn't stored in bitsandbytes' 4-bit",
        ),
        ({"weight.quant_map": None}, r"component 'weight\.quant_map' is missing, expected float32\[16\]"),
        ({DESCRIPTION: None}, r"component 'weight\.quant_state\.bitsandbytes__nf4' is missing"),
        ({"weight.scale": spec(torch.float32, 1)}, r"component 'weight\.scale' is not part of the format"),
        (
            {"weight.absmax": spec(torch.float32, 77)},
            r"absmax' is float32\[77\], expected one scale for each block of 32",
        ),
        ({"weight.absmax": spec(torch.float16, 256)}, r"absmax' is float16\[256\], expected float32\[256\]"),
        ({"weight.absmax": spec(torch.uint8, 256)}, r"component 'weight\.nested_absmax' is missing"),
        (
            {"weight": spec(torch.bfloat16, 4096, 1)},
            r"component 'weight' is bfloat16\[4096, 1\], expected uint8\[8192, 1\]",
        ),
        ({"weight": spec(torch.uint8, 8000, 1)}, r"component 'weight' is uint8\[8000, 1\], expected uint8\[8192, 1\]"),
        ({DESCRIPTION: spec(torch.uint8, 5000)}, r"is uint8\[5000\], expected up to 4096 bytes"),
        ({DESCRIPTION: spec(torch.int8, 80)}, r"is int8\[80\], expected up to 4096 bytes"),
    ],
)
def test_stored_differently(changes: dict[str, TensorSpec | None], message: str) -> None:
    described = parameter(64, 256)
    _, components = made(described, nf4())
    found = {name: value for name, value in (specs_of(components) | changes).items() if value is not None}
    with pytest.raises(UnsupportedError, match=r"^0\.weight: .*" + message):
        quantizer_for(described, nf4(), prequantized=True).stored_layout(described, found)


def test_another_code_than_the_config_says() -> None:
    described = parameter(64, 256)
    _, components = made(described, nf4(bnb_4bit_quant_type="fp4"))
    with pytest.raises(UnsupportedError, match=r"bitsandbytes__fp4' is not part of .*bitsandbytes__nf4' is missing"):
        quantizer_for(described, nf4(), prequantized=True).stored_layout(described, specs_of(components))


def test_another_block_size_than_the_config_says() -> None:
    described = parameter(64, 256)
    _, components = made(described, nf4())
    config = nf4(bnb_4bit_blocksize=128)
    with pytest.raises(UnsupportedError, match="expected one scale for each block of 128 elements, so 128 in all"):
        quantizer_for(described, config, prequantized=True).stored_layout(described, specs_of(components))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SCB": None}, r"component 'SCB' is missing, expected float32\[64\]"),
        ({"weight_format": None}, r"component 'weight_format' is missing"),
        ({"SCB": spec(torch.float16, 64)}, r"component 'SCB' is float16\[64\], expected float32\[64\]"),
        (
            {"weight": spec(torch.float16, 64, 256)},
            r"component 'weight' is float16\[64, 256\], expected int8\[64, 256\]",
        ),
    ],
)
def test_stored_differently_in_eight_bits(changes: dict[str, TensorSpec | None], message: str) -> None:
    described = parameter(64, 256)
    _, components = made(described, INT8)
    found = {name: value for name, value in (specs_of(components) | changes).items() if value is not None}
    with pytest.raises(UnsupportedError, match=r"^0\.weight: .*" + message):
        quantizer_for(described, INT8, prequantized=True).stored_layout(described, found)


def install(config: BitsAndBytesConfig, components: dict[str, Tensor]) -> nn.Module:
    described = parameter(64, 256)
    quantizer = quantizer_for(described, config, prequantized=True)
    model = nn.Sequential(nn.Linear(256, 64, device="meta"))
    quantizer.preprocess_model(model)
    quantizer.install(model, described, components)
    return model


def test_other_weight_format() -> None:
    _, components = made(parameter(64, 256), INT8)
    components["weight_format"] = torch.tensor(1, dtype=torch.uint8)
    with pytest.raises(UnsupportedError, match=r"^0\.weight: component 'weight_format' is 1, expected 0"):
        install(INT8, components)


def described_as(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [256, 64]}, r"says shape=\[256, 64\], expected \[64, 256\]"),
        ({"blocksize": 128}, r"says blocksize=128, expected one of \[64\]"),
        ({"blocksize": [64]}, r"says blocksize=\[64\], expected one of \[64\]"),
        ({"dtype": "float64"}, r"says dtype='float64', expected one of \['float16'"),
        ({"quant_type": "fp4"}, r"says quant_type='fp4', expected 'nf4'"),
        ({"nested_blocksize": 64}, r"says nested_blocksize=64, expected 256"),
        ({"nested_dtype": "float16"}, r"says nested_dtype='float16', expected 'float32'"),
        ({"nested_offset": "0"}, r"says nested_offset='0', expected a number"),
        ({"more": 1}, r"has the keys \['blocksize', .*'more'"),
    ],
)
def test_hostile_description(change: dict[str, Any], message: str) -> None:
    config = nf4(bnb_4bit_use_double_quant=True)
    _, components = made(parameter(64, 256), config)
    values = json.loads(bytes(components[DESCRIPTION].tolist()))
    components[DESCRIPTION] = described_as(json.dumps(values | change))
    with pytest.raises(UnsupportedError, match=rf"^0\.weight: component '{DESCRIPTION}' " + message):
        install(config, components)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no JSON"), ("[" * 4000, "is no JSON"), ("[]", "is list, expected a JSON object")]
)
def test_broken_description(text: str, message: str) -> None:
    _, components = made(parameter(64, 256), nf4())
    components[DESCRIPTION] = described_as(text)
    with pytest.raises(UnsupportedError, match=message):
        install(nf4(), components)


@pytest.mark.parametrize("config", [nf4(), nf4(bnb_4bit_use_double_quant=True)])
def test_description_reads_as_bitsandbytes_reads_it(config: BitsAndBytesConfig) -> None:
    _, components = made(parameter(64, 256), config)
    state = install(config, dict(components))[0].weight.quant_state
    parts = {name.removeprefix("weight."): part for name, part in components.items() if name != "weight"}
    expected = bnb.functional.QuantState.from_dict(parts, device="cpu")
    for attribute in ("shape", "dtype", "blocksize", "quant_type", "nested"):
        assert getattr(state, attribute) == getattr(expected, attribute)
    assert torch.equal(state.code, expected.code)
    assert torch.equal(state.absmax, expected.absmax)
    if expected.nested:
        assert torch.equal(state.offset, expected.offset)
        assert vars(state.state2).keys() == vars(expected.state2).keys()
        assert torch.equal(state.state2.absmax, expected.state2.absmax)
        assert (state.state2.blocksize, state.state2.dtype) == (expected.state2.blocksize, expected.state2.dtype)
