"""Checkpoints of compressed-tensors: to the bits that compressed-tensors itself decompresses them to."""

from __future__ import annotations

import copy
import json
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
from quantdock_fp8.compressed_config import CompressedTensorsConfig
from quantdock_fp8.linear import Fp8Linear
from quantdock_fp8.targets import first_match

FIXTURES = Path(__file__).parent / "fixtures" / "compressed_tensors"
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


class Tiny(nn.Module):
    """Has the names of a Llama of one layer, in any dtype, and a forward that uses each of its linear layers."""

    def __init__(self) -> None:
        super().__init__()
        dtype = torch.bfloat16
        layer = nn.ModuleDict(
            {
                "self_attn": nn.ModuleDict(
                    {
                        f"{name}_proj": nn.Linear(32, rows, bias=False, dtype=dtype)
                        for name, rows in (("q", 32), ("k", 16), ("v", 16), ("o", 32))
                    }
                ),
                "mlp": nn.ModuleDict(
                    {
                        "gate_proj": nn.Linear(32, 48, bias=False, dtype=dtype),
                        "up_proj": nn.Linear(32, 48, bias=False, dtype=dtype),
                        "down_proj": nn.Linear(48, 32, bias=False, dtype=dtype),
                    }
                ),
                "input_layernorm": nn.RMSNorm(32, dtype=dtype),
                "post_attention_layernorm": nn.RMSNorm(32, dtype=dtype),
            }
        )
        parts = {"embed_tokens": nn.Embedding(8, 32, dtype=dtype), "layers": nn.ModuleList([layer])}
        self.model = nn.ModuleDict(parts | {"norm": nn.RMSNorm(32, dtype=dtype)})
        self.lm_head = nn.Linear(32, 8, bias=False, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.get_submodule("model.embed_tokens")(ids)
        layers = [f"{ATTENTION}.{name}_proj" for name in "qkvo"] + [f"{MLP}.gate_proj", f"{MLP}.up_proj"]
        found = [self.get_submodule(name)(hidden) for name in layers]
        return torch.cat([*found, self.get_submodule(f"{MLP}.down_proj")(found[-1])], -1)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )


def config_of(folder: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return written


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
"""What is done to a config and to tensors before they are stored again."""


def changed(folder: Path, kind: str, change: Change) -> Path:
    """A fixture with something changed."""
    config, tensors = config_of(FIXTURES / kind), load_file(FIXTURES / kind / "model.safetensors")
    change(config, tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    return folder


KINDS = {"float": 6, "four": 7}
"""Fixture -> how many layers are quantized."""


@pytest.mark.parametrize("kind", KINDS)
def test_dequantizes_to_the_bits_of_compressed_tensors(kind: str) -> None:
    model = quantdock.load(FIXTURES / kind, model=Tiny)
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes
    stored = load_file(FIXTURES / kind / "model.safetensors")
    assert {source for entry in report.ledger.entries for source in entry.sources} == stored.keys()
    quantized = {name.removesuffix("_scale") for name in stored if name.endswith("weight_scale")}
    assert {entry.parameter for entry in report.ledger.entries if entry.method} == quantized
    assert len(quantized) == KINDS[kind]

    ids, expected = torch.arange(8)[None], load_file(FIXTURES / kind / "decompressed.safetensors")
    with torch.no_grad():
        computed = model(ids)
    restored = quantdock.dequantize(model)
    assert {type(module) for module in restored.modules()} == {type(module) for module in Tiny().modules()}
    assert restored.state_dict().keys() == expected.keys()
    assert all(same_bits(restored.state_dict()[name], tensor) for name, tensor in expected.items())
    with torch.no_grad():
        difference = (computed - restored(ids)).float().abs().max()
    assert difference <= 2**-7 * computed.float().abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_is_saved_as_it_was(tmp_path: Path, kind: str) -> None:
    model = quantdock.load(FIXTURES / kind, model=Tiny)
    model(torch.arange(8)[None])
    saved = quantdock.save(copy.deepcopy(model), tmp_path / "saved")
    before, after = (load_file(folder / "model.safetensors") for folder in (FIXTURES / kind, saved))
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)
    asked = {name: value for name, value in config_of(FIXTURES / kind).items() if value is not None}
    assert config_of(saved) == asked
    again = quantdock.load(saved, model=Tiny)
    assert all(same_bits(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gets_the_same_weights(kind: str) -> None:
    reason = "transformers needs compressed-tensors to load these, which isn't installed; the fixtures have its weights"
    pytest.importorskip("compressed_tensors", reason=reason)
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(FIXTURES / kind, dtype="auto")
    with torch.no_grad():
        theirs(torch.arange(8)[None])  # which decompresses
    restored = quantdock.dequantize(quantdock.load(FIXTURES / kind)).state_dict()
    plain = {name: tensor for name, tensor in theirs.state_dict().items() if name.endswith("weight")}
    assert restored.keys() == plain.keys()
    different = {name for name, tensor in plain.items() if not same_bits(restored[name], tensor)}
    # transformers loads scales in float32, which this one has, in the model's dtype.
    assert different == (set() if kind == "float" else {f"{ATTENTION}.o_proj.weight"})


def test_scales_in_float32_are_rounded_once(tmp_path: Path) -> None:
    """As compressed-tensors decompresses: the product in float32, then the model's dtype."""
    name = f"{ATTENTION}.q_proj.weight"

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"].float() * 1.0123

    source = changed(tmp_path / "it", "float", change)
    stored = load_file(source / "model.safetensors")
    expected = (stored[name].float() * stored[f"{name}_scale"]).bfloat16()
    restored = quantdock.dequantize(quantdock.load(source, model=Tiny))
    assert same_bits(restored.get_parameter(name).data, expected)


def group(config: dict[str, Any], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = config["config_groups"][f"group_{number}"]
    return found


def weights(config: dict[str, Any], **values: object) -> None:
    group(config)["weights"].update(values)


# What the config is changed to, and what the error says.
CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    form: (
        lambda config, form=form: [
            config.update(format=form),
            *(each.pop("format", None) for each in config["config_groups"].values()),
        ],
        rf"format is {form!r}; of compressed-tensors, quantdock-fp8 reads 'float-quantized'.* and 'mixed-precision'",
    )
    for form in (
        "pack-quantized",
        "int-quantized",
        "naive-quantized",
        "marlin-24",
        "sparse-24-bitmask",
        "dense",
        "mxfp6-pack-quantized",
    )
} | {
    "a group of another format": (
        lambda config: [config.update(format="mixed-precision"), group(config, 1).update(format="pack-quantized")],
        r"config_groups\['group_1'\].format is 'pack-quantized'; of compressed-tensors",
    ),
    "a mixture that doesn't say of what": (
        lambda config: [config.update(format="mixed-precision"), group(config, 1).pop("format")],
        r"config_groups\['group_1'\].format is 'mixed-precision'",
    ),
    "integers": (lambda config: weights(config, type="int"), r"'group_0'\].weights.type is 'int', expected 'float'"),
    "no type": (lambda config: group(config)["weights"].pop("type"), "type is 'int', expected 'float'"),
    "other bits": (lambda config: weights(config, num_bits=4), r"weights.num_bits is 4, expected 8"),
    "zero points": (lambda config: weights(config, symmetric=False), "symmetric is False, expected True"),
    "weights that are dynamic": (lambda config: weights(config, dynamic=True), "dynamic is True, expected False"),
    "an unknown strategy": (
        lambda config: weights(config, strategy="attn_head"),
        "strategy is 'attn_head', expected 'tensor' or 'channel' or 'block'",
    ),
    "groups of 8-bit floats": (lambda config: weights(config, strategy=None, group_size=64), "strategy is 'group'"),
    "no blocks": (lambda config: weights(config, strategy="block"), "block_structure is None, expected two positive"),
    "blocks that are none": (
        lambda config: weights(config, strategy="block", block_structure=[128, 0]),
        r"block_structure is \[128, 0\], expected two positive integers",
    ),
    "blocks that are no numbers": (
        lambda config: weights(config, strategy="block", block_structure="128xall"),
        "block_structure is '128xall', expected two positive integers",
    ),
    "an unknown field of weights": (lambda config: weights(config, rotation=1), "has the field 'rotation', which"),
    "an unknown field of a group": (lambda config: group(config).update(order=1), r"'group_0'\] has the field 'order'"),
    "a preset's name": (
        lambda config: config["config_groups"].update(FP8=["Linear"]),
        r"config_groups\['FP8'\] is \['Linear'\], expected an object; write a preset's name out",
    ),
    "no weights at all": (
        lambda config: [each.update(weights=None) for each in config["config_groups"].values()],
        "config_groups has no group with weights",
    ),
    "weights that are no object": (lambda config: group(config).update(weights="FP8"), "weights is 'FP8', expected an"),
    "no groups": (lambda config: config.update(config_groups={}), "config_groups is {}, expected an object with"),
    "targets that are none": (lambda config: group(config).update(targets="Linear"), "targets is 'Linear', expected a"),
    "a target that is no pattern": (
        lambda config: group(config).update(targets=["re:("]),
        r"targets: 're:\(' is no regular expression",
    ),
    "an ignored pattern that is none": (
        lambda config: config.update(ignore=["re:*"]),
        r"ignore: 're:\*' is no regular expression",
    ),
    "ignore that is no list": (lambda config: config.update(ignore="lm_head"), "ignore is 'lm_head', expected a list"),
    "sparsity": (
        lambda config: config.update(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config is .*sparse-24-bitmask.* expected none, or the format 'dense'; sparse weights can't be loaded",
    ),
    "rotations": (
        lambda config: config.update(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}),
        "transform_config is .* expected none; weights that were rotated can't be loaded",
    ),
    "an unknown field": (lambda config: config.update(kwant=1), "no field 'kwant'"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_not_read_is_an_error(name: str) -> None:
    change, message = CONFIGS[name]
    config = config_of(FIXTURES / "float")
    change(config)
    with pytest.raises(quantdock.ConfigError, match=message):
        CompressedTensorsConfig.from_dict(config)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["re:(", "8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TOP = ("config_groups", "format", "ignore", "kv_cache_scheme", "sparsity_config", "transform_config", "version")
INNER = ("group_0", "targets", "weights", "input_activations", "format", "num_bits", "type", "symmetric", "strategy")
INNER += ("group_size", "block_structure", "dynamic")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*TOP, *INNER]), ANYTHING, st.sampled_from(["tensor", "block", None]))
def test_any_json_is_read_or_refused(name: str, value: object, strategy: str | None) -> None:
    config = config_of(FIXTURES / "float")
    weights(config, strategy=strategy)
    own = group(config)
    holder = config if name in TOP else config["config_groups"] if name == "group_0" else own
    (own["weights"] if holder is own and name not in own else holder)[name] = value
    try:
        read = CompressedTensorsConfig.from_dict(config)
    except quantdock.ConfigError:
        return
    assert CompressedTensorsConfig.from_dict(json.loads(json.dumps(read.to_dict()))).groups == read.groups


def test_what_older_configs_have_is_read() -> None:
    config = config_of(FIXTURES / "float")
    config["sparsity_config"] = {"format": "dense", "global_sparsity": 0.1, "targets": ["Linear"]}
    group(config).pop("format")
    weights(config, strategy=None, group_size=-1, observer="minmax", observer_kwargs={}, block_structure=None)
    group(config, 2)["weights"]["block_structure"] = "20x24"
    read = CompressedTensorsConfig.from_dict(config).groups
    assert [each.scheme.granularities for each in read] == [("row",), ("tensor",), ("block",)]
    assert read[2].scheme.block_size == (20, 24)


Q, GATE, UP = f"{ATTENTION}.q_proj.weight", f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"

TENSORS: dict[str, tuple[Change, str]] = {
    "no scale": (lambda _, tensors: tensors.pop(f"{Q}_scale"), rf"{Q}.* float8_e4m3fn.* a scale may be missing"),
    "no scale, but others": (
        lambda _, tensors: tensors.pop(f"{GATE}_scale"),
        rf"{GATE}: component 'weight_scale' is missing: the codes mean nothing",
    ),
    "a scale per row where one is expected": (
        lambda _, tensors: tensors.update({f"{GATE}_scale": torch.ones(48, 1)}),
        rf"{GATE}: component 'weight_scale' is float32\[48, 1\], expected the shape \[\] or \[1\]",
    ),
    "other blocks": (
        lambda config, _: group(config, 2)["weights"].update(block_structure=[16, 8]),
        rf"{UP}: .* bfloat16\[3, 2\], expected the shape \[3, 4\] .*for blocks of \[16, 8\]",
    ),
    "scales that are integers": (
        lambda _, tensors: tensors.update({f"{Q}_scale": torch.ones(32, 1, dtype=torch.uint8)}),
        rf"{Q}: component 'weight_scale' is uint8\[32, 1\], expected one of float32, bfloat16, float16",
    ),
    "no scale of activations": (
        lambda _, tensors: tensors.pop(f"{MLP}.gate_proj.input_scale"),
        rf"{GATE}: component 'input_scale' is missing, which input_activations of the group 'group_1'.* needs",
    ),
    "a weight that isn't quantized": (
        lambda _, tensors: tensors.update({Q: torch.zeros(32, 32)}),
        rf"{Q}: component 'weight' is float32\[32, 32\], expected float8_e4m3fn",
    ),
    "no target": (
        lambda config, _: group(config).update(targets=["Conv2d"]),
        rf"{Q}.* stored quantized .* no group of the checkpoint's config is meant for it; .* targets: 'Conv2d'",
    ),
    "ignored, but stored quantized": (
        lambda config, _: config.update(ignore=["re:.*q_proj"]),
        rf"{Q}.* stored quantized .* config says that it isn't, with ignore='re:\.\*q_proj'",
    ),
    "a cache that the config doesn't know of": (
        lambda config, _: config.pop("kv_cache_scheme"),
        rf"stored tensor '{ATTENTION}.k_scale'",
    ),
    "a cache of a layer that isn't quantized": (
        lambda _, tensors: [
            tensors.pop(f"{ATTENTION}.k_proj.weight_scale"),
            tensors.update({f"{ATTENTION}.k_proj.weight": torch.zeros(16, 32, dtype=torch.bfloat16)}),
        ],
        f"{ATTENTION}.k_proj.weight: 'k_scale' of the cache is kept with this layer, which has to be quantized",
    ),
    "zero points": (
        lambda _, tensors: tensors.update({f"{Q}_zero_point": torch.zeros(32, 1)}),
        f"stored tensor '{Q}_zero_point'",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_an_error(tmp_path: Path, name: str) -> None:
    change, message = TENSORS[name]
    with pytest.raises(quantdock.LedgerError, match=message):
        quantdock.plan(changed(tmp_path / "it", "float", change), model=Tiny)


def test_what_is_meant_and_isn_t_stored_quantized_stays_as_it_is(tmp_path: Path) -> None:
    """As with a router, which is a linear layer that nobody quantizes."""

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors.pop(f"{Q}_scale")
        tensors[Q] = torch.ones(32, 32, dtype=torch.bfloat16)

    model = quantdock.load(changed(tmp_path / "it", "float", change), model=Tiny)
    assert type(model.get_submodule(f"{ATTENTION}.q_proj")) is nn.Linear
    assert isinstance(model.get_submodule(f"{ATTENTION}.k_proj"), Fp8Linear)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_can_be_trained_on_top(kind: str) -> None:
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    names = ["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj"]
    adapters = peft.LoraConfig(target_modules=names, r=4)
    model = peft.get_peft_model(quantdock.load(FIXTURES / kind, model=Tiny), adapters)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    model(torch.arange(8)[None]).float().square().sum().backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == len(names)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert all(same_bits(model.state_dict()[name], tensor) for name, tensor in before.items())


ITEMS = ["Linear", "re:.*gate", "a.gate_proj", "re:a.*", "Module", "b"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.gate_proj", "a.gate_proj"), ("c.gate", "re:.*gate"), ("a.gate", "re:.*gate"), ("b", "b"), ("c", "Linear")],
)
def test_which_target_decides(name: str, expected: str) -> None:
    assert first_match(ITEMS, [name], ["Linear", "Module"]) == expected


def test_targets_decide_as_in_compressed_tensors() -> None:
    reason = "compares with compressed-tensors itself, which isn't installed; the fixtures' groups are its doing, too"
    pytest.importorskip("compressed_tensors", reason=reason)
    from compressed_tensors.utils.match import match_targets

    classes = [kind.__name__ for kind in nn.Linear.__mro__]
    for name in ("a.gate_proj", "c.gate", "a.gate", "b", "c", "b.c", "xa.gate_proj"):
        for items in (ITEMS, ITEMS[::-1], ITEMS[1:], ITEMS[1:4], ["re:b", "Conv2d"], ["Conv2d"]):
            theirs = match_targets(name, nn.Linear(1, 1), items)
            assert first_match(items, [name], classes) == (theirs[0] if theirs else None), (name, items)
