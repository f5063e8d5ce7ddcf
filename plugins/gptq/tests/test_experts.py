"""Experts that a checkpoint stores one by one in GPTQ form, and architectures that have them in one parameter."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantdock

sys.path.insert(0, str(Path(__file__).parent))
from moe_files import (
    EXPERTS,
    FAMILIES,
    FORMS,
    HIDDEN,
    INNER,
    Change,
    Form,
    logits,
    model_of,
    reference,
    same_bits,
    same_files,
    write,
)

pytest.importorskip("quantdock_transformers", reason="the models are transformers', whose architectures it brings")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


# Loading -------------------------------------------------------------------------------------------------------------

CASES = [("qwen3_moe", name) for name in FORMS] + [("mixtral", "act order")]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_loads_computes_saves_and_dequantizes(tmp_path: Path, family: str, form: str) -> None:
    original = model_of(family, dtype=torch.float32)
    plain = write(tmp_path / "it", original, FORMS[form])
    theirs = reference(tmp_path / "plain", original, plain)

    model = quantdock.load(tmp_path / "it")
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes
    files = load_file(tmp_path / "it" / "model.safetensors")
    assert {source for entry in report.ledger.entries for source in entry.sources} == files.keys()
    fused = {entry.parameter for entry in report.ledger.entries if entry.method and ".experts." in entry.parameter}
    assert fused == {f"model.layers.{i}.mlp.experts.{kind}_proj" for i in (0, 1) for kind in ("gate_up", "down")}

    expected = logits(theirs)
    for way in ("grouped_mm", "eager", "batched_mm"):
        model.set_experts_implementation(way)
        theirs.set_experts_implementation(way)
        assert (logits(model) - logits(theirs)).abs().max() <= 1e-4 * expected.abs().max(), way

    quantdock.save(model, tmp_path / "saved")
    assert same_files(tmp_path / "it", tmp_path / "saved")
    assert torch.equal(logits(quantdock.load(tmp_path / "saved")), logits(quantdock.load(tmp_path / "it")))
    model.save_pretrained(tmp_path / "save_pretrained")
    assert same_files(tmp_path / "it", tmp_path / "save_pretrained")

    restored = quantdock.dequantize(model)
    found, wanted = restored.state_dict(), theirs.state_dict()
    assert list(found) == list(wanted)
    assert [name for name, tensor in wanted.items() if not same_bits(found[name], tensor)] == []
    assert {type(module) for module in restored.modules()} == {type(module) for module in theirs.modules()}
    quantdock.save(restored, tmp_path / "restored")
    assert same_files(tmp_path / "plain", tmp_path / "restored")


def test_a_checkpoint_of_gptqmodels(tmp_path: Path) -> None:
    """Weights have the bits that gptqmodel dequantizes, and the logits of the plain model are gptqmodel's."""
    folder = Path(__file__).parent / "fixtures_experts" / "qwen3_moe"
    model = quantdock.load(folder, dtype=torch.float16)
    reference = load_file(folder / "reference.safetensors")
    with torch.no_grad():
        found = model(reference["ids"]).logits
    assert (found - reference["logits"]).float().norm() < 2e-2 * reference["logits"].float().norm()
    quantdock.save(model, tmp_path / "saved")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    packed = [name for name in before if not name.endswith(".weight")]  # the others were stored in bfloat16
    assert len(packed) == 2 * (4 + 3 * EXPERTS) * 4
    assert all(same_bits(before[name], after[name]) for name in packed)
    quantdock.dequantize(model)
    with torch.no_grad():
        assert torch.equal(model(reference["ids"]).logits, reference["logits"])
    quantdock.save(model, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for name, digest in json.loads((folder / "weights.json").read_text()).items():
        weight = plain[f"{name}.weight"]
        assert weight.dtype == torch.float16
        assert hashlib.sha256(weight.numpy().tobytes()).hexdigest() == digest, name


def test_tensors_of_an_expert_in_different_files(tmp_path: Path) -> None:
    original = model_of("qwen3_moe", dtype=torch.float32)
    write(tmp_path / "it", original, Form())
    expected = logits(quantdock.load(tmp_path / "it"))
    tensors = load_file(tmp_path / "it" / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if name.endswith(("1.up_proj.scales", "q_proj.qweight"))}
    shards = {"one.safetensors": first, "two.safetensors": {name: tensors[name] for name in tensors.keys() - first}}
    for file, part in shards.items():
        save_file(part, tmp_path / "it" / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "it" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "it" / "model.safetensors").unlink()
    assert torch.equal(logits(quantdock.load(tmp_path / "it")), expected)


GATE, UP, DOWN = (f"model.layers.1.mlp.experts.2.{kind}_proj." for kind in ("gate", "up", "down"))


def without(*names: str) -> Change:
    return lambda _, tensors: [tensors.pop(name) for name in names]


def put(name: str, tensor: Tensor) -> Change:
    return lambda _, tensors: tensors.update({name: tensor})


def say(**fields: object) -> Change:
    return lambda config, _: config.update(fields)


WRONG: Mapping[str, tuple[Change, str]] = {
    "no scales": (without(f"{UP}scales"), rf"{UP}weight: component 'scales' is missing, expected float16\[4, 64\]"),
    "no zero points": (without(f"{UP}qzeros"), rf"{UP}weight: component 'qzeros' is missing"),
    "no codes": (without(f"{DOWN}qweight"), DOWN),
    "no index": (without(f"{GATE}g_idx"), f"{GATE}weight' is stored as .*have to be alike"),
    "no expert": (without(*(DOWN + part for part in ("qweight", "qzeros", "scales", "g_idx"))), "down_proj"),
    "another expert": (put("model.layers.1.mlp.experts.9.up_proj.scales", torch.ones(4, 64)), "layers.1.mlp.experts.9"),
    "scales of another shape": (
        put(f"{UP}scales", torch.ones(2, 64).half()),
        rf"{UP}weight: component 'scales' is float16\[2, 64\], expected float16\[4, 64\], for 4 bits and group_size=32",
    ),
    "zero points of another shape": (
        put(f"{UP}qzeros", torch.ones(4, 16).int()),
        rf"{UP}weight: component 'qzeros' is int32\[4, 16\]",
    ),
    "scales of another dtype": (put(f"{UP}scales", torch.ones(4, 64).bfloat16()), f"{UP}weight' is stored as .*alike"),
    "scales that aren't any": (put(f"{UP}scales", torch.ones(4, 64).int()), f"{UP}weight: component 'scales' is int32"),
    "an index past the groups": (
        put(f"{UP}g_idx", torch.full((HIDDEN,), 4).int()),
        "experts.gate_up_proj: g_idx names the groups 0 to 4, but there are scales for 0 to 3",
    ),
    "an expert in full precision": (
        lambda _, tensors: (
            [tensors.pop(UP + part) for part in ("qweight", "qzeros", "scales", "g_idx")],
            tensors.update({f"{UP}weight": torch.zeros(INNER, HIDDEN)}),
        ),
        f"{UP}weight: component 'qweight' is missing.*'weight' is not part of the format",
    ),
    "other bits": (say(bits=8), "experts.*for 8 bits"),
    "another group size": (say(group_size=64), "experts.*group_size=64"),
    "bits that differ": (
        say(dynamic={r"+:.*layers\.1\.mlp\.experts\.2\.up": {"bits": 8}}),
        r"experts\.gate_up_proj: dynamic says \d bits .*and \d bits .*\.2\.up_proj'; the experts of one p.* be alike",
    ),
    "one left out": (
        say(dynamic={r"-:.*layers\.1\.mlp\.experts\.2\.up": {}}),
        "dynamic says .*no quantization for 'model.layers.1.mlp.experts.2.up_proj'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    write(tmp_path / "it", model_of("qwen3_moe"), Form(), change)
    with pytest.raises(quantdock.QuantdockError, match=message):
        quantdock.load(tmp_path / "it")


# Quantizing ----------------------------------------------------------------------------------------------------------

CONFIGS: dict[str, Any] = {
    "preset": "gptq-int4",
    "not symmetric": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
    "2 bits": {"quant_method": "gptq", "bits": 2, "group_size": 64, "checkpoint_format": "gptq_v2"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", CONFIGS)
def test_quantizes_experts_as_if_they_were_linear_layers(tmp_path: Path, family: str, config: str) -> None:
    """The tensors of each expert are those of a linear layer with its weight."""
    original = model_of(family, inner=128)
    original.save_pretrained(tmp_path / "it")
    model = quantdock.load(tmp_path / "it", quantize=CONFIGS[config])
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes
    ours = logits(model)
    quantdock.save(model, tmp_path / "saved")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("it", "saved"))
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 2 * 3 * EXPERTS
    assert not any("gate_up_proj" in name or name in experts for name in after)
    for name in experts[:: len(experts) // 5]:
        alone = quantdock.load(
            _one_layer(tmp_path / "alone" / name, before[name]), quantize=CONFIGS[config], model=_Layer
        )
        for part, tensor in alone.get_submodule("layer").state_dict().items():
            assert same_bits(after[name.removesuffix("weight") + part], tensor), (name, part)

    again = quantdock.load(tmp_path / "saved")
    assert torch.equal(logits(again), ours)
    limit = 1.5 if config == "2 bits" else 0.2
    found = quantdock.dequantize(again).state_dict()
    for name, tensor in original.state_dict().items():
        assert (found[name].float() - tensor.float()).norm() <= limit * tensor.float().norm(), name


class _Layer(torch.nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(config["in"], config["out"], bias=False, dtype=torch.bfloat16)


def _one_layer(folder: Path, weight: Tensor) -> Path:
    folder.mkdir(parents=True)
    save_file({"layer.weight": weight}, folder / "model.safetensors")
    data = {"in": weight.shape[1], "out": weight.shape[0], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_were_left_alone_are_listed(tmp_path: Path, family: str) -> None:
    model_of(family).save_pretrained(tmp_path / "it")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    model = quantdock.load(tmp_path / "it", quantize=config, skip=["*.layers.0.mlp.experts.gate_up_proj"])
    quantdock.save(model, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert sum("experts" in pattern for pattern in saved["dynamic"]) == 2  # a gate and what is beside it, of any expert
    again = quantdock.load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert {entry.parameter for entry in quantdock.report(again).ledger.entries if entry.method} == {
        entry.parameter for entry in quantdock.report(model).ledger.entries if entry.method
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"group_size": 48}, r"experts\.down_proj: groups of 48 don't divide its 64 inputs; choose a group_size"),
        ({"bits": 3, "group_size": 16, "dynamic": {"-:.*attn": {}}}, "3 bits don't fill whole words"),
        ({"group_size": 32, "desc_act": True}, r"experts\.gate_up_proj: desc_act orders inputs by their activations"),
        ({"group_size": 32, "dynamic": {r"-:.*experts\.1\.": {}}}, r"no quantization for '.*experts\.1\.gate_proj'"),
    ],
)
def test_what_cannot_be_quantized(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    inner = 40 if config.get("bits") == 3 else INNER
    model_of("qwen3_moe", inner=inner).save_pretrained(tmp_path / "it")
    with pytest.raises(quantdock.LedgerError, match=message):
        quantdock.plan(tmp_path / "it", quantize={"quant_method": "gptq", "bits": 4, **config})


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    original = model_of("qwen3_moe")
    with torch.no_grad():
        original.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[1, 70, 3] = float("nan")
    original.save_pretrained(tmp_path / "it")
    with pytest.raises(quantdock.LoadError, match=r"layers\.1\.mlp\.experts\.gate_up_proj has weights that are infin"):
        quantdock.load(tmp_path / "it", quantize={"quant_method": "gptq", "bits": 4, "group_size": 32})


def test_large_experts_pass_through_in_slices(tmp_path: Path) -> None:
    original = model_of("qwen3_moe", experts=56, inner=2048)
    original.save_pretrained(tmp_path / "it")
    plan = quantdock.plan(tmp_path / "it", quantize="gptq-int4", skip=["*.layers.1.*"])
    weight = original.get_parameter("model.layers.0.mlp.experts.gate_up_proj").detach()
    assert plan.largest_unit_nbytes < weight.nbytes
    model = plan.execute()
    quantizer = next(iter(plan.selection)).quantizer
    parameter = quantizer.parameters["model.layers.0.mlp.experts.gate_up_proj"]
    whole = quantizer.quantize_param(parameter, weight)
    assert whole is not None
    sliced = quantizer.components(model, parameter)
    assert sliced.keys() == whole.keys()
    assert all(same_bits(sliced[name], tensor) for name, tensor in whole.items())


# What the modules are ------------------------------------------------------------------------------------------------


def test_experts_can_be_copied_pickled_and_converted(tmp_path: Path) -> None:
    write(tmp_path / "it", model_of("qwen3_moe"), FORMS["act order"])
    model = quantdock.load(tmp_path / "it")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    expected = logits(model)
    state = copy.deepcopy(experts.state_dict())
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert type(other) is type(experts)
        model.set_submodule("model.layers.0.mlp.experts", other)
        assert torch.equal(logits(model), expected)
    torch.nn.Module.to(model, torch.float32)  # transformers' own refuses GPTQ models
    assert model.get_submodule("model.layers.0.mlp.experts").gate_up_proj.dtype == torch.float32
    found = model.get_submodule("model.layers.0.mlp.experts").state_dict()
    assert all(same_bits(found[name], tensor) for name, tensor in state.items())
    assert (logits(model) - expected).abs().max() < 0.05 * expected.abs().max()


def test_experts_look_like_tensors_and_are_not_changed(tmp_path: Path) -> None:
    plain = write(tmp_path / "it", model_of("qwen3_moe"), FORMS["act order"])
    experts: Any = quantdock.load(tmp_path / "it").get_submodule("model.layers.0.mlp.experts")
    name = "model.layers.0.mlp.experts.2.{}_proj.weight"
    expected = torch.cat([plain[name.format("gate")], plain[name.format("up")]])
    weight = experts.gate_up_proj
    assert isinstance(weight, torch.nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device.type) == ((EXPERTS, 2 * INNER, HIDDEN), torch.bfloat16, "cpu")
    assert torch.equal(weight[-2][7:9, 3], expected[7:9, 3])
    assert torch.equal(weight[1:3][1] * 2, expected * 2)
    assert torch.equal(weight.transpose(1, 2)[2] + 0, expected.t())
    with pytest.raises(IndexError):
        weight[EXPERTS] + 0
    x = torch.randn(EXPERTS, 5, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    for found in (
        torch.bmm(x, weight.transpose(1, 2))[2],
        x[2] @ weight[2].t(),
        torch.nn.functional.linear(x[2], weight[2]),
    ):
        assert (found - x[2] @ expected.t()).abs().max() <= 0.02 * found.abs().max()
    for change in (
        lambda: weight.add_(1),
        lambda: weight.data.mul_(2),
        weight[0].zero_,
        lambda: weight.__setitem__(0, 0.0),
        lambda: torch.nn.init.normal_(weight),
    ):
        with pytest.raises(quantdock.UnsupportedError, match="dequantize"):
            change()
    assert torch.equal(experts.gate_up_proj[2] + 0, expected)


def test_gradients_reach_what_is_below(tmp_path: Path) -> None:
    original = model_of("qwen3_moe", dtype=torch.float32)
    plain = write(tmp_path / "it", original, Form())
    theirs = reference(tmp_path / "plain", original, plain)
    model = quantdock.load(tmp_path / "it")
    found = []
    for one in (model, theirs):
        embedded = one.get_input_embeddings()(torch.arange(12)[None]).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.square().sum().backward()
        found.append(embedded.grad)
    ours, expected = found
    assert ours is not None
    assert expected is not None
    assert (ours - expected).norm() < 1e-3 * expected.norm()


def test_compute_dtype(tmp_path: Path) -> None:
    write(tmp_path / "it", model_of("qwen3_moe", dtype=torch.float32), Form())
    plain = logits(quantdock.load(tmp_path / "it"))
    override = {"quant_method": "gptq", "bits": 4, "group_size": 32, "compute_dtype": "bfloat16"}
    found = logits(quantdock.load(tmp_path / "it", quantize=override | {"dynamic": None}))
    assert 0 < (found - plain).norm() < 0.05 * plain.norm()
