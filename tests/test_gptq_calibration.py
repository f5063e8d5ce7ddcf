"""GPTQ with calibration data on whole models: quality, files, memory, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import TinyFactory
from tests.reference import assert_same_tensor
from torch import nn

import quantdock
from quantdock import CalibrationError, ConfigError, UnsupportedError
from quantdock_gptq.config import GPTQConfig
from quantdock_gptq.modules import GPTQLinear


def ids(count: int, length: int, *, seed: int = 0, most: int = 100) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, most, (count, length), generator=generator).tolist()


SAMPLES = ids(24, 32)


def config(**fields: Any) -> GPTQConfig:
    return GPTQConfig(**{"bits": 4, "group_size": 32, "dataset": SAMPLES, "batch_size": 8} | fields)


def logits(model: Any, samples: list[list[int]] = SAMPLES) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(samples)).logits.float()


def error(model: Any, full: Any) -> float:
    return float((logits(model) - logits(full)).square().mean())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "qwen3", "opt", "mixtral", "gpt_neox"])
def test_architectures_come_closer_than_by_rounding(model_type: str, tiny: TinyFactory, tmp_path: Path) -> None:
    """Blocks that return tensors and tuples, masks per layer, weights stored [in, out], experts in one parameter."""
    full = quantdock.load(tiny(model_type))
    rounded = quantdock.load(tiny(model_type), quantize=GPTQConfig(bits=4, group_size=32))
    calibrated = quantdock.load(tiny(model_type), quantize=config())
    assert error(calibrated, full) < 0.95 * error(rounded, full)
    report = quantdock.report(calibrated)
    assert report.predicted_nbytes == report.measured_nbytes
    assert report.calibration["tokens"] == 24 * 32
    quantdock.save(calibrated, tmp_path / "saved")
    assert_same_tensor(logits(quantdock.load(tmp_path / "saved")), logits(calibrated), "logits")


@pytest.mark.parametrize(
    "fields",
    [
        {"desc_act": True},
        {"desc_act": True, "static_groups": True},
        {"sym": False, "checkpoint_format": "gptq_v2"},
        {"bits": 3, "group_size": -1, "act_group_aware": False},
        {"bits": 8, "true_sequential": False},
        {"dynamic": {"-:.*o_proj": {}, r"+:.*down_proj": {"bits": 8, "desc_act": True}}},
    ],
    ids=str,
)
def test_checkpoints_hold_what_was_quantized(fields: dict[str, Any], tiny: TinyFactory, tmp_path: Path) -> None:
    asked = config(**fields)
    model = quantdock.load(tiny("llama"), quantize=asked)
    expected = logits(model)
    quantdock.save(model, tmp_path / "saved")
    again = quantdock.load(tmp_path / "saved")
    assert_same_tensor(logits(again), expected, "logits")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    g_idx = stored["model.layers.1.mlp.down_proj.g_idx"]
    in_order = torch.arange(len(g_idx)) // (len(g_idx) if asked.group_size == -1 else asked.group_size)
    settings = asked.of("model.layers.1.mlp.down_proj")
    assert settings is not None
    assert torch.equal(g_idx.long(), in_order) == (not settings.desc_act or bool(asked.static_groups))
    assert torch.equal(g_idx.bincount(), in_order.bincount())


def test_what_is_saved_says_how_and_not_with_what(tiny: TinyFactory, tmp_path: Path) -> None:
    model = quantdock.load(tiny("llama"), quantize=config(tokenizer=object(), damp_percent=0.02))
    quantdock.save(model, tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
    saved = json.loads(text)["quantization_config"]
    assert saved["damp_percent"] == 0.02
    assert saved["true_sequential"] is True
    assert saved["act_group_aware"] is True
    assert not saved.get("dataset")
    assert not saved.get("tokenizer")
    assert str(SAMPLES[0][0]) + ", " + str(SAMPLES[0][1]) not in text


def test_without_data_weights_are_rounded_as_ever(tiny: TinyFactory) -> None:
    model = quantdock.load(tiny("llama"), quantize=GPTQConfig(bits=4, group_size=32))
    assert quantdock.report(model).calibration == {}
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, GPTQLinear)
    full = quantdock.load(tiny("llama")).get_parameter("model.layers.0.mlp.up_proj.weight")
    groups = full.float().view(len(full), -1, 32)
    scale = (2 / 15 * groups.abs().amax(2)).half().float()[:, :, None]
    expected = ((groups / scale).round().clamp(-8, 7) * scale).view(full.shape)
    assert torch.equal(layer.dequantized(torch.float32), expected)


def test_configs_of_transformers(tiny: TinyFactory) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPTQConfig(bits=4, group_size=32, dataset=SAMPLES, batch_size=8)
    state = quantdock.load(tiny("llama"), quantize=theirs).state_dict()
    ours = config(damp_percent=theirs.damp_percent)
    for name, tensor in quantdock.load(tiny("llama"), quantize=ours).state_dict().items():
        assert_same_tensor(state[name], tensor, name)


def test_batches_and_forms_of_samples_make_no_difference_but_rounding(tiny: TinyFactory) -> None:
    tensors = [torch.tensor(sample) for sample in SAMPLES]
    inputs = [{"input_ids": one[None], "attention_mask": torch.ones(1, len(one))} for one in tensors]
    codes = [
        quantdock.load(tiny("llama"), quantize=config(dataset=dataset, batch_size=size))
        .get_submodule("model.layers.0.self_attn.q_proj")
        .qweight
        for dataset, size in ((SAMPLES, 8), (tensors, 8), (inputs, 8), (SAMPLES, 1), (SAMPLES[:5] + SAMPLES[5:], 5))
    ]
    for other in codes[1:3]:
        assert torch.equal(other, codes[0])
    for other in codes[3:]:
        assert (other != codes[0]).float().mean() < 0.1


# Experts --------------------------------------------------------------------------------------------------------------


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(64, 96, bias=False), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.w2(torch.relu(self.w1(x)))
        return out


class Layer(nn.Module):
    """Experts one by one, as remote code has them; the last is never asked."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, hidden_states: torch.Tensor, scale: float) -> tuple[torch.Tensor]:
        x = self.norm(hidden_states).view(-1, 64)
        chosen = x[:, :3].argmax(1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                out[rows] = expert(x[rows])
        return (hidden_states + scale * out.view(hidden_states.shape),)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.between = 1.0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(input_ids)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, scale=0.5 + index)[0] * self.between
        return hidden


def between() -> Experts:
    model = Experts()
    model.between = 0.5
    return model


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "experts"
    folder.mkdir()
    save_file(Experts().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_experts_side_by_side(experts: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = torch.tensor(SAMPLES)
    full = quantdock.load(experts, model=Experts)
    with caplog.at_level(logging.WARNING, logger="quantdock"):
        calibrated = quantdock.load(experts, model=Experts, quantize=config())
    rounded = quantdock.load(experts, model=Experts, quantize=GPTQConfig(bits=4, group_size=32))
    with torch.no_grad():
        errors = [float((model(samples) - full(samples)).square().mean()) for model in (calibrated, rounded)]
    assert errors[0] < 0.8 * errors[1]
    notes = {
        entry.parameter: entry.note
        for entry in quantdock.report(calibrated).ledger.entries
        if "activations" in entry.note
    }
    assert sorted(notes) == [f"layers.{layer}.experts.3.w{part}.weight" for layer in range(3) for part in (1, 2)]
    assert "layers.0.experts.3.w1.weight: no activations on the calibration data: rounded to nearest" in caplog.text
    for name in notes:
        path = name.rpartition(".")[0]
        one, other = calibrated.get_submodule(path).state_dict(), rounded.get_submodule(path).state_dict()
        assert all(torch.equal(one[part], other[part]) for part in ("qweight", "scales", "qzeros", "g_idx"))


def test_a_model_that_changes_hidden_states_between_blocks(experts: Path) -> None:
    with pytest.raises(CalibrationError, match=r"changes hidden states between layers\.0 and layers\.2"):
        quantdock.load(experts, model=between, quantize=config())


def test_activations_that_are_no_numbers_are_located(experts: Path) -> None:
    state = load_file(experts / "model.safetensors")
    state["layers.1.experts.1.w1.weight"] *= 1e38
    state["layers.1.experts.1.w2.weight"] *= 1e4
    save_file(state, experts / "model.safetensors")
    with pytest.raises(CalibrationError, match="infinite or not numbers") as caught:
        quantdock.load(experts, model=Experts, quantize=config(), skip=["*.experts.1.w1"])
    assert caught.value.block == "layers.1"
    assert caught.value.parameter == "layers.1.experts.1.w2.weight"


# Memory ---------------------------------------------------------------------------------------------------------------


def test_one_block_is_in_full_precision_at_a_time(tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted while each block is calibrated: linear layers with values, beside the head."""
    from quantdock_gptq.quantizer import GPTQQuantizer

    plan = quantdock.plan(tiny("llama"), quantize=config())
    model = plan.skeleton.model
    seen = []
    original = GPTQQuantizer.calibrate

    def counting(self: GPTQQuantizer, block: Any) -> Any:
        for made in original(self, block):
            alive = [
                path
                for path, module in model.named_modules()
                if type(module) is nn.Linear and not module.weight.is_meta
            ]
            seen.append({".".join(path.split(".")[:3]) for path in alive if path != "lm_head"})
            assert alive
            yield made

    monkeypatch.setattr(GPTQQuantizer, "calibrate", counting)
    plan.execute()
    assert {tuple(found) for found in seen} == {("model.layers.0",), ("model.layers.1",)}
    kept = [module.__dict__["_original"] for module in model.modules() if isinstance(module, GPTQLinear)]
    assert len(kept) == 14
    assert all(parameter.is_meta for module in kept for parameter in module.parameters())


def test_the_plan_counts_what_calibration_needs(tiny: TinyFactory) -> None:
    with_data = quantdock.plan(tiny("llama"), quantize=config())
    without = quantdock.plan(tiny("llama"), quantize=GPTQConfig(bits=4, group_size=32))
    facts = with_data.to_dict()["calibration"]
    assert with_data.peak_nbytes - without.peak_nbytes == facts["input_nbytes"] + facts["block_nbytes"]
    assert (facts["samples"], facts["batches"], facts["tokens"], facts["parameters"]) == (24, 3, 768, 14)
    assert "calibration: 14 parameters of 2 blocks, 24 samples of 768 tokens" in str(with_data)
    kept = quantdock.report(with_data.execute()).calibration["input_nbytes"]
    assert 768 * 64 * 2 <= kept <= facts["input_nbytes"]


def test_the_result_cache_says_why_it_is_off(tiny: TinyFactory) -> None:
    model = quantdock.load(tiny("llama"), quantize=config(), cache=True)
    facts = quantdock.report(model).cache
    assert facts["state"] == "unused"
    assert "calibration looks at data" in facts["reason"]


# Tokenizers, and what is refused --------------------------------------------------------------------------------------


class Letters:
    """A tokenizer as far as calibration needs one."""

    def __call__(self, texts: list[str]) -> Mapping[str, list[list[int]]]:
        return {"input_ids": [[3 + ord(letter) % 90 for letter in text] for text in texts]}


def test_texts_go_through_the_tokenizer_and_are_cut(tiny: TinyFactory) -> None:
    texts = ["Something to read, and more of it."] * 3 + ["Short."]
    plan = quantdock.plan(tiny("llama"), quantize=config(dataset=texts, tokenizer=Letters(), model_seqlen=20))
    assert plan.calibrating is not None
    assert plan.calibrating.batches.rows == 3 * 20 + 6


@pytest.mark.parametrize(
    ("fields", "expected", "message"),
    [
        (
            {"dataset": "wikitext2"},
            ConfigError,
            r"dataset='wikitext2' is the name of a data set, and nothing is downlo",
        ),
        ({"dataset": []}, ConfigError, "dataset is empty"),
        ({"dataset": 5}, ConfigError, "dataset is int, expected a list"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0, expected a positive number"),
        ({"dataset": [[1, 2], []]}, CalibrationError, "sample 1 of the dataset is empty"),
        (
            {"dataset": [[1] * 5000]},
            CalibrationError,
            r"sample 0 of the dataset has 5000 tokens, and the model takes \d+",
        ),
        ({"dataset": [[0.5, 1.5]]}, CalibrationError, "sample 0 of the dataset is torch.float32"),
        ({"dataset": [object()]}, CalibrationError, "sample 0 of the dataset holds object"),
        (
            {"dataset": [{"input_ids": [[5, 0]], "attention_mask": [[1, 0]]}]},
            CalibrationError,
            "sample 0 of the dataset is padded",
        ),
        ({"dataset": ["a text"]}, UnsupportedError, "has no tokenizer, and the calibration data are texts"),
        ({"dataset": ["a text"], "tokenizer": "/nowhere"}, UnsupportedError, "tokenizer='/nowhere' can't be loaded"),
        ({"dataset": ["a text"], "tokenizer": 5}, UnsupportedError, "tokenizer is int, expected a tokenizer"),
        ({"dataset": [[1, 2, 100000]]}, CalibrationError, "the model can't be run on the calibration data: IndexError"),
        ({"dynamic": {"x": {"mse": 2.4}}}, UnsupportedError, "dynamic asks for mse"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_data_that_does_not_fit(
    fields: dict[str, Any], expected: type[Exception], message: str, tiny: TinyFactory
) -> None:
    with pytest.raises(expected, match=message):
        quantdock.load(tiny("llama"), quantize=config(**fields))


def test_layers_outside_of_the_blocks(tiny: TinyFactory) -> None:
    with pytest.raises(
        ConfigError, match=r"'lm_head\.weight' can't be calibrated: not in one of the blocks model\.lay"
    ):
        quantdock.plan(tiny("llama"), quantize={"lm_head": config(), "*": config()})
    both = {"lm_head": GPTQConfig(bits=8, group_size=-1), "*": config()}
    model = quantdock.load(tiny("llama"), quantize=both)
    assert isinstance(model.get_submodule("lm_head"), GPTQLinear)


def test_two_configs_share_their_data(tiny: TinyFactory) -> None:
    full = quantdock.load(tiny("llama"))
    asked = {"*.mlp.*": config(), "*.self_attn.*": config(bits=8, dataset=[list(sample) for sample in SAMPLES])}
    model = quantdock.load(tiny("llama"), quantize=asked)
    layers = [model.get_submodule(f"model.layers.0.{path}") for path in ("mlp.up_proj", "self_attn.q_proj")]
    assert [layer.bits for layer in layers] == [4, 8]
    assert error(model, full) < error(quantdock.load(tiny("llama"), quantize=config()), full)
    with pytest.raises(ConfigError, match="gptq and gptq are given different calibration data"):
        quantdock.plan(tiny("llama"), quantize={"*.mlp.*": config(), "*": config(dataset=ids(3, 8))})


def test_a_checkpoint_that_is_quantized_already(tiny: TinyFactory, tmp_path: Path) -> None:
    quantdock.save(quantdock.load(tiny("llama"), quantize=config()), tmp_path / "saved")
    with pytest.raises(ConfigError, match="already quantized, so there is nothing to calibrate with batch_size="):
        quantdock.plan(tmp_path / "saved", quantize=config())
    path = tmp_path / "saved" / "config.json"
    data = json.loads(path.read_text())
    data["quantization_config"] |= {"dataset": "c4", "tokenizer": None, "model_seqlen": 2048, "batch_size": 1}
    path.write_text(json.dumps(data))
    quantdock.load(tmp_path / "saved")  # transformers leaves the name of the data there
