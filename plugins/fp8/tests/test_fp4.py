"""Weights in 4-bit floats with scales of 16 elements: decoded to the bits that the format stands for."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantdock
from quantdock.testing.memory import PeakBytes
from quantdock_fp8 import fp4
from quantdock_fp8.linear import Fp8Linear

ROWS, COLUMNS = 300, 96
E4M3 = torch.float8_e4m3fn
NVIDIA: dict[str, Any] = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "group_size": 16,
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "exclude_modules": ["lm_head"],
    "kv_cache_quant_algo": "FP8",
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Every byte among them."""
    found = torch.randint(256, (rows * columns // 2,), generator=generator(), dtype=torch.uint8)
    found[:256] = torch.arange(256, dtype=torch.uint8)
    return found.view(rows, columns // 2)


def scales(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Every positive code that is a number among them."""
    found = torch.randint(127, (rows * columns // 16,), generator=generator(1), dtype=torch.uint8)
    found[:127] = torch.arange(127, dtype=torch.uint8)
    return found.view(rows, columns // 16).view(E4M3)


def spelled_out(packed: Tensor, each: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Value by value: sign, two bits of exponent, one of mantissa; the lower half of a byte comes first."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()
    exponent, mantissa = nibbles >> 1 & 3, (nibbles & 1).float()
    size = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    values = torch.where(nibbles >= 8, -size, size)
    return (values * each.float().repeat_interleave(group, -1)).to(dtype)


FACTOR = torch.tensor(0.0123)
EXPECTED_SCALES = scales().float() * FACTOR


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16, columns: int = COLUMNS) -> None:
        super().__init__()
        self.layer = nn.Linear(columns, ROWS, dtype=dtype)
        self.lm_head = nn.Linear(ROWS, 4, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.lm_head(self.layer(x)))


def stored(**changes: Tensor | None) -> dict[str, Tensor]:
    plain = Model().state_dict()
    own: dict[str, Tensor | None] = {
        "weight": codes(),
        "weight_scale": scales(),
        "weight_scale_2": FACTOR,
        "input_scale": torch.tensor(0.5),
        "bias": torch.randn(ROWS, generator=generator(2)).bfloat16(),
    }
    own |= changes
    layer = {f"layer.{name}": tensor for name, tensor in own.items() if tensor is not None}
    head = torch.randn(4, ROWS, generator=generator(3)).bfloat16()
    assert plain.keys() >= {"layer.weight", "layer.bias", "lm_head.weight"}
    return layer | {"lm_head.weight": head}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] = NVIDIA) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    return folder


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 9),
    size=st.sampled_from([16, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    exponent=st.integers(-140, 127),
    seed=st.integers(0, 2**16),
)
def test_decoding_is_value_times_scale_rounded_once(
    rows: int, groups: int, size: int, dtype: torch.dtype, exponent: int, seed: int
) -> None:
    packed = torch.randint(256, (rows, groups * size // 2), generator=generator(seed), dtype=torch.uint8)
    each = torch.randn(rows, groups, generator=generator(seed + 1)).double().mul(2.0**exponent).float()
    out = torch.empty(rows, groups * size, dtype=dtype)
    fp4.decode(packed, each, (1, size), out)
    assert same_bits(out, spelled_out(packed, each, size, dtype))


def test_decoding_more_than_is_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp4, "_ELEMENTS_AT_A_TIME", 7 * COLUMNS)
    out = torch.empty(ROWS, COLUMNS)
    fp4.decode(codes(), EXPECTED_SCALES, (1, 16), out)
    assert same_bits(out, spelled_out(codes(), EXPECTED_SCALES, 16, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_model_optimizers_weights(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The two scales are multiplied first, in float32, as Model Optimizer does it."""
    source = write(tmp_path / "it", stored(weight_scale_2=FACTOR.reshape(shape), k_scale=torch.tensor(1.5)))
    model = quantdock.load(source, model=lambda: Model(dtype))
    layer = model.get_submodule("layer")
    assert isinstance(layer, Fp8Linear)
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes < 2 * ROWS * COLUMNS

    expected = spelled_out(codes(), EXPECTED_SCALES, 16, dtype)
    x = torch.randn(3, COLUMNS, generator=generator(4)).to(dtype).requires_grad_()
    found = layer(x)
    reference = nn.functional.linear(x.double(), expected.double(), stored()["layer.bias"].double())
    epsilon = 4 * torch.finfo(dtype).eps
    assert (found.double() - reference).abs().max() <= epsilon * reference.abs().max()
    found.sum().backward()
    assert x.grad is not None
    slope = expected.double().sum(0)
    assert (x.grad.double() - slope).abs().max() <= epsilon * expected.double().abs().sum(0).max()

    saved = quantdock.save(model, tmp_path / "saved")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, saved))
    kept = {name for name in before if name not in ("layer.bias", "lm_head.weight")}  # those are cast when loaded
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in kept)
    assert json.loads((saved / "config.json").read_text())["quantization_config"] == NVIDIA

    restored = quantdock.dequantize(model)
    assert type(restored.get_submodule("layer")) is nn.Linear
    assert same_bits(restored.get_parameter("layer.weight").data, expected)


def test_compressed_tensors_divides_and_model_optimizer_multiplies(tmp_path: Path) -> None:
    """The same weight in both formats, with a number whose reciprocal isn't one in float32."""
    config = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            }
        },
    }
    factor = torch.tensor([81.3])
    own = stored(weight=None, weight_scale_2=None, input_scale=None, weight_packed=codes(), weight_global_scale=factor)
    model = quantdock.dequantize(quantdock.load(write(tmp_path / "it", own, config), model=Model))
    expected = spelled_out(codes(), scales().float() / factor, 16, torch.bfloat16)
    assert same_bits(model.get_parameter("layer.weight").data, expected)
    multiplied = scales().float() * (1 / factor)
    assert not torch.equal(multiplied, scales().float() / factor)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    result = pickle.loads(pickle.dumps(model))
    assert isinstance(result, nn.Module)
    return result


def converted(model: nn.Module) -> nn.Module:
    return model.to(torch.float32).to(torch.bfloat16)


@pytest.mark.parametrize("action", [copied, pickled, converted, nn.Module.share_memory])
def test_nothing_that_is_done_to_the_module_changes_what_is_stored(
    tmp_path: Path, action: Callable[[nn.Module], nn.Module]
) -> None:
    model = quantdock.load(write(tmp_path / "it", stored()), model=Model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, COLUMNS, generator=generator(4)).bfloat16()
    expected = model(x)
    changed = action(model)
    assert all(same_bits(changed.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(changed(x), expected)


def test_the_weight_is_never_whole_in_full_precision(tmp_path: Path) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(256, 8192, bias=False, dtype=torch.bfloat16)

    own = {"weight": codes(8192, 256), "weight_scale": scales(8192, 256), "weight_scale_2": FACTOR}
    source = write(tmp_path / "it", {f"layer.{name}": tensor for name, tensor in own.items()})
    layer = quantdock.load(source, model=Large).get_submodule("layer")
    x = torch.ones(1, 256, dtype=torch.bfloat16)
    with torch.no_grad(), PeakBytes([x, *layer.state_dict().values()]) as peak:
        layer(x)
    assert peak.peak < 8192 * 256


WRONG: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no scales": (
        {"weight_scale": None},
        "layer.weight: component 'weight_scale' is missing: the codes mean nothing without their scale",
    ),
    "no second scale": (
        {"weight_scale_2": None},
        "layer.weight: component 'weight_scale_2' is missing: the scales are relative to it",
    ),
    "scales of other groups": (
        {"weight_scale": scales()[:, :3]},
        r"'weight_scale' is float8_e4m3fn\[300, 3\], expected the shape \[300, 6\] .*for blocks of \[1, 16\]",
    ),
    "scales of another dtype": (
        {"weight_scale": scales().float()},
        r"'weight_scale' is float32\[300, 6\], expected float8_e4m3fn",
    ),
    "a second scale per row": (
        {"weight_scale_2": torch.ones(ROWS)},
        r"'weight_scale_2' is float32\[300\], expected one float32",
    ),
    "a second scale of another dtype": (
        {"weight_scale_2": FACTOR.bfloat16()},
        r"'weight_scale_2' is bfloat16\[\], expected one float32",
    ),
    "codes that aren't packed": (
        {"weight": torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)},
        r"component 'weight' is uint8\[300, 96\], expected uint8\[300, 48\]",
    ),
    "codes of 8 bits": (
        {"weight": torch.zeros(ROWS, COLUMNS).to(E4M3)},
        r"component 'weight' is float8_e4m3fn\[300, 96\], expected uint8\[300, 48\]",
    ),
    "a scale for activations that are quantized beforehand": (
        {"pre_quant_scale": torch.ones(COLUMNS)},
        "stored tensor 'layer.pre_quant_scale'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error(tmp_path: Path, name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(quantdock.LedgerError, match=message):
        quantdock.plan(write(tmp_path / "it", stored(**changes)), model=Model)


def test_groups_that_do_not_divide_a_row(tmp_path: Path) -> None:
    changes = {"weight": codes(ROWS, 40), "weight_scale": scales(ROWS, 48)}
    with pytest.raises(
        quantdock.LedgerError,
        match=r"layer\.weight: it has rows of 40 elements, which groups of 16 elements don't divide",
    ):
        quantdock.plan(write(tmp_path / "it", stored(**changes)), model=lambda: Model(columns=40))
