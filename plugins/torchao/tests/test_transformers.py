"""torchao through quantdock is torchao through transformers, bit for bit, and each reads what the other saved."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantdock
from quantdock_torchao import tensors, upstream

pytest.importorskip("quantdock_transformers", reason="compares with transformers")
from tests.tiny_models import logits_of, make_tiny

ao: Any = upstream.module("torchao.quantization")
METHODS: dict[str, Callable[[], Any]] = {
    "int8": ao.Int8WeightOnlyConfig,
    "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig,
    "float8": ao.Float8WeightOnlyConfig,
    "mixed": lambda: ao.FqnToConfig(
        OrderedDict(
            [
                (r"re:.*self_attn\..*", ao.Int8WeightOnlyConfig()),
                (r"re:.*experts\..*_proj", ao.Float8WeightOnlyConfig()),
                (r"re:.*up_proj", ao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
                ("model.layers.0.mlp.down_proj", None),
            ]
        )
    ),
}


@pytest.fixture(autouse=True)
def _settings_of_torch() -> Any:
    """torchao's ``quantize_`` changes this for everybody; put it back."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)


def reference(folder: Path, method: Any = None) -> Any:
    from transformers import AutoModelForCausalLM, TorchAoConfig

    quantize = {} if method is None else {"quantization_config": TorchAoConfig(method)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu", **quantize)


def values(model: Any) -> dict[str, torch.Tensor]:
    result = {}
    for name, value in model.state_dict().items():
        parts = tensors.parts_of("x", value) if hasattr(value, "tensor_data_names") else {"": value}
        result |= {f"{name} {part}": tensor for part, tensor in parts.items()}
    return result


def assert_same(ours: Any, theirs: Any) -> None:
    left, right = values(ours), values(theirs)
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype, name
        assert torch.equal(left[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert torch.equal(logits_of(ours), logits_of(theirs))
    report = quantdock.report(ours)
    assert report.predicted_nbytes == report.measured_nbytes


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # transformers, asking torchao's tensors
def test_load_save_and_reload(name: str, source: Path, tmp_path: Path) -> None:
    from transformers import TorchAoConfig

    theirs = reference(source, METHODS[name]())
    ours = quantdock.load(source, quantize=TorchAoConfig(METHODS[name]()))
    assert_same(ours, theirs)
    assert any(hasattr(value, "tensor_data_names") for value in ours.state_dict().values())

    theirs.save_pretrained(tmp_path / "theirs")
    quantdock.save(ours, tmp_path / "ours", max_shard_size="200KB")
    ours.save_pretrained(tmp_path / "by_save_pretrained")
    for folder in ("theirs", "ours", "by_save_pretrained"):
        again = quantdock.load(tmp_path / folder)
        assert_same(again, theirs)
        assert_same(again, reference(tmp_path / folder))
