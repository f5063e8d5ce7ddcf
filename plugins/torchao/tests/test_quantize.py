"""Quantizing parameter by parameter gives what torchao's ``quantize_`` makes of the whole model."""

from __future__ import annotations

import copy
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

import quantdock
from quantdock import LedgerError, Parameter, TensorSpec
from quantdock.testing import SmallModel, write_checkpoint
from quantdock_torchao import TorchAoConfig, tensors, upstream
from quantdock_torchao.choice import Choice
from quantdock_torchao.presets import INT8
from quantdock_torchao.quantizer import TorchAoQuantizer

ao: Any = upstream.module("torchao.quantization")
METHODS: dict[str, Callable[[], Any]] = {
    "int8": ao.Int8WeightOnlyConfig,
    "int8-groups": lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(16)),
    "int8-tensor": lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()),
    "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig,
    "int8-dynamic-asymmetric": lambda: ao.Int8DynamicActivationInt8WeightConfig(
        act_mapping_type=ao.MappingType.ASYMMETRIC
    ),
    "int3": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=ao.PerGroup(32)),
    "int4-dynamic": lambda: ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
    "float8": ao.Float8WeightOnlyConfig,
    "float8-tensor": lambda: ao.Float8WeightOnlyConfig(granularity=ao.PerTensor()),
}


@pytest.fixture(autouse=True)
def _inductor_untouched() -> Any:
    """torchao's own ``quantize_`` changes settings for everybody; put them back."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def expected(model: nn.Module, method: Any) -> nn.Module:
    result = copy.deepcopy(model)
    result.head = nn.Identity()  # tied, which is the core's business
    by_name = isinstance(method, ao.FqnToConfig)
    ao.quantize_(result, method, **({"filter_fn": None} if by_name else {}))
    return result


def parts(value: torch.Tensor) -> dict[str, torch.Tensor]:
    return tensors.parts_of("x", value) if hasattr(value, "tensor_data_names") else {"": value}


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for name, value in theirs.named_parameters():
        found = ours.get_parameter(name)
        assert type(found) is type(value), name
        assert found.requires_grad == value.requires_grad, name
        assert parts(found).keys() == parts(value).keys()
        for part, tensor in parts(value).items():
            other = parts(found)[part]
            assert other.dtype == tensor.dtype
            assert torch.equal(other.detach().view(torch.uint8), tensor.detach().view(torch.uint8)), f"{name} {part}"
        if hasattr(value, "tensor_data_names"):
            assert tensors.describe(found) == tensors.describe(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_bits_are_torchaos(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    method = METHODS[name]()
    original = write_checkpoint(tmp_path, dtype=dtype)
    ours = quantdock.load(tmp_path, model=SmallModel, quantize=TorchAoConfig(quant_type=method))
    theirs = expected(original, method)
    assert_same(ours, theirs)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        theirs.head = ours.head
        assert torch.equal(ours(ids), theirs(ids))


KEYS = [
    "blocks.0.up.weight",
    "blocks.0.up",
    "blocks.1.experts.weight",
    r"re:blocks\.\d\.up",
    r"re:.*\.weight",
    r"re:blocks\..*down.*",
    r"re:blocks\.1\.(up|down|experts).*",
    r"re:.*experts",
    r"re:embed\.weight",
    "_default",
]


@given(keys=st.lists(st.sampled_from(KEYS), unique=True), nones=st.sets(st.sampled_from(KEYS)))
@settings(max_examples=50, deadline=None)
def test_names_are_matched_as_torchao_matches_them(keys: list[str], nones: set[str]) -> None:
    """For every matrix of a model, down to which key decides: each has a group size of its own."""
    with torch.device("cpu"):
        model = SmallModel({"features": 64, "dtype": "float32"})
    model.head = nn.Identity()
    model.requires_grad_(False)
    for block in model.blocks:  # torchao would quantize vectors, too, that an expression happens to match
        block.norm = nn.Identity()
        block.up.register_parameter("bias", None)
    model.norm = nn.Identity()
    described = {
        name: Parameter(
            name=name,
            spec=TensorSpec.of(value),
            module_type=type(model.get_submodule(name.rpartition(".")[0])),
            role="linear" if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) else "other",
        )
        for name, value in model.named_parameters()
    }
    # An expression with None is passed over in torchao 0.18, against its own documentation; in transformers it decides.
    nones = {key for key in nones if not key.startswith("re:") and key != "_default"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Config Deprecation: _default")
        method = ao.FqnToConfig(
            OrderedDict(
                (key, None if key in nones else ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(2 ** (index + 1))))
                for index, key in enumerate(keys[:6])
            )
        )
    choice = Choice(method)
    try:
        ao.quantize_(model, method, filter_fn=None)
    except NotImplementedError:  # torchao 0.18 quantizes again what a name and an expression match
        reject()
    for name, parameter in described.items():
        found = model.get_parameter(name)
        size = found.block_size[-1] if hasattr(found, "block_size") else None
        config, reason = choice.of(parameter)
        assert (None if config is None else config.granularity.group_size) == size, (name, list(method.fqn_to_config))
        assert (config is None) == bool(reason)


def test_fused_experts_are_quantized_where_they_are_named(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path, features=64)
    method = ao.FqnToConfig(
        OrderedDict({r"re:.*\.experts\.weight": ao.Float8WeightOnlyConfig(), r"re:.*\.up": ao.Int8WeightOnlyConfig()})
    )
    ours = quantdock.load(tmp_path, model=SmallModel, quantize=TorchAoConfig(quant_type=method))
    assert_same(ours, expected(original, method))
    report = quantdock.report(ours)
    assert {entry.parameter for entry in report.ledger.entries if entry.method} == {
        f"blocks.{index}.{name}.weight" for index in (0, 1) for name in ("up", "experts")
    }
    saved = quantdock.save(ours, tmp_path / "saved")
    again = quantdock.load(saved, model=SmallModel)
    assert_same(again, ours)
    restored = quantdock.dequantize(again)
    value = restored.get_parameter("blocks.0.experts.weight")
    assert value.dtype == torch.bfloat16
    assert torch.equal(value, ours.get_parameter("blocks.0.experts.weight").dequantize())


def test_reasons_are_given(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    asked = TorchAoConfig(quant_type=INT8.quant_type, modules_to_not_convert=("down", r"blocks\.0"))
    model = quantdock.load(tmp_path, model=SmallModel, quantize=asked)
    notes = {entry.parameter: entry.note for entry in quantdock.report(model).ledger.entries}
    assert notes["blocks.1.down.weight"] == ""  # an end of a parameter's name, as in transformers
    assert notes["blocks.0.up.weight"] == r"modules_to_not_convert='blocks\\.0'"
    assert notes["blocks.0.experts.weight"].startswith("3-D parameter: torchao quantizes the weights of linear layers")
    assert notes["embed.weight"].startswith("embedding: torchao quantizes the weights of linear layers")


@given(
    entry=st.sampled_from(["a", "a.b", r"a\.\d", "weight", "b.weight", "a.*", "a|b", "b", r"\w"]),
    name=st.sampled_from(["a.weight", "a.b.weight", "a.1.weight", "ab.weight", "b.a.weight", "a.bc.weight"]),
)
@settings(deadline=None)
def test_modules_are_skipped_as_transformers_skips_them(entry: str, name: str) -> None:
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils", reason="compares with transformers")
    quantizer = TorchAoQuantizer(TorchAoConfig(quant_type=INT8.quant_type, modules_to_not_convert=(entry,)))
    spec = TensorSpec(dtype=torch.bfloat16, shape=(8, 8))
    refusal = quantizer.refusal(Parameter(name=name, spec=spec, module_type=nn.Linear, role="linear"))
    assert (refusal is None) == utils.should_convert_module(name, [entry])


@pytest.mark.parametrize("size", [48, 11])
@pytest.mark.parametrize("method", [ao.IntxWeightOnlyConfig, ao.Int8WeightOnlyConfig, ao.Float8WeightOnlyConfig])
def test_groups_that_do_not_divide_a_weight_are_an_error_that_names_it(
    method: Callable[..., Any], size: int, tmp_path: Path
) -> None:
    """Which sizes there are is between torchao and each weight; the machine has nothing to do with it."""
    write_checkpoint(tmp_path, linear=(64, 32))
    with pytest.raises(
        LedgerError,
        match=rf"extra\.weight: torchao's {method.__name__} doesn't take bfloat16\[32, 64\] .*{size}.*"
        r"skip=\['blocks\.1\.extra\.weight'\]",
    ):
        quantdock.plan(tmp_path, model=SmallModel, quantize=method(granularity=ao.PerGroup(size)))


def test_settings_of_torch_are_left_alone(tmp_path: Path) -> None:
    from torch._inductor import config as inductor

    write_checkpoint(tmp_path)
    names = ("coordinate_descent_tuning", "epilogue_fusion", "use_mixed_mm", "force_fuse_int_mm_with_mul")
    before = {name: getattr(inductor, name, None) for name in names}
    quantdock.load(tmp_path, model=SmallModel, quantize="torchao-int8-dynamic")
    assert {name: getattr(inductor, name, None) for name in names} == before
    assert not re.search("set_inductor_config.: False", str(INT8.to_dict()))  # it is saved as it was asked for
