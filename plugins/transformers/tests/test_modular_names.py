"""Experts stored one by one under the names of linear layers, for families whose checkpoints have other names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Lfm2MoeConfig, MixtralConfig, PhimoeConfig

import quantdock

PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=3, intermediate_size=16),
    "phimoe": lambda: PhimoeConfig(**SIZES, num_local_experts=3, intermediate_size=16, pad_token_id=0),
    "lfm2_moe": lambda: Lfm2MoeConfig(
        **SIZES,
        num_experts=3,
        moe_intermediate_size=16,
        intermediate_size=24,
        num_dense_layers=1,
        layer_types=["full_attention", "conv"],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def modular(name: str) -> str:
    """What a name of Mixtral's becomes."""
    part = re.search(r"\.experts\.\d+\.(w\d)\.", name)
    name = name.replace(".block_sparse_moe.", ".mlp.")
    return name if part is None else name.replace(f".{part[1]}.", f".{PARTS[part[1]]}.")


def write(folder: Path, family: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Any:
    """Store a model with its tensors changed, and return it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval()
    model.save_pretrained(folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {modular(name): tensor.clone() for name, tensor in tensors.items()}


def assert_same(one: Any, other: Any) -> None:
    found, expected = one.state_dict(), other.state_dict()
    assert list(found) == list(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    with torch.no_grad():
        ids = torch.arange(12).view(2, 6)
        assert torch.equal(one(ids).logits, other(ids).logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_loads_and_is_saved_as_transformers_reads_it(tmp_path: Path, family: str) -> None:
    original = write(tmp_path / "it", family, renamed)
    stored = load_file(tmp_path / "it" / "model.safetensors").keys()
    assert any(".experts.2.gate_proj.weight" in name for name in stored)
    model: Any = quantdock.load(tmp_path / "it")
    assert_same(model, original)
    assert {source for entry in quantdock.report(model).ledger.entries for source in entry.sources} == stored
    quantdock.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "save_pretrained")
    original.save_pretrained(tmp_path / "original")
    names = load_file(tmp_path / "original" / "model.safetensors").keys()
    for folder in ("saved", "save_pretrained"):
        assert load_file(tmp_path / folder / "model.safetensors").keys() == names
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / folder), original)


def test_names_without_the_base_models_prefix(tmp_path: Path) -> None:
    """As a file of the base model alone has them."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("model."): tensor for name, tensor in renamed(tensors).items()}

    original = write(tmp_path / "it", "mixtral", change)
    assert_same(quantdock.load(tmp_path / "it"), original)


def test_each_layer_may_have_names_of_its_own(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {modular(name) if "layers.1" in name else name: tensor for name, tensor in tensors.items()}

    original = write(tmp_path / "it", "mixtral", change)
    model = quantdock.load(tmp_path / "it")
    assert_same(model, original)
    quantdock.save(model, tmp_path / "saved")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), original)


LAYER = "model.layers.1.mlp.experts"
OWN = LAYER.replace("mlp", "block_sparse_moe")


def both(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | renamed(tensors)


def one_more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One expert in the other spelling."""
    return renamed(tensors) | {f"{OWN}.3.w2.weight": tensors[f"{OWN}.2.w2.weight"].clone()}


def relabelled(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in renamed(tensors).items()}


def without(suffix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in renamed(tensors).items() if not name.endswith(suffix)}


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "both spellings": (
        both,
        r"two kinds of names(.|\n)*block_sparse_moe\.experts\.0\.w\d(.|\n)*mlp\.experts\.0\.\w+_proj",
    ),
    "both in one parameter": (
        one_more,
        r"layers\.1\.mlp\.experts\.down_proj' is stored under two kinds of names(.|\n)*experts\.3\.w2",
    ),
    "unknown parts": (relabelled("gate_proj", "gate_projection"), r"experts\.0\.gate_projection\.weight"),
    "no number": (relabelled("experts.0.", "experts.first."), r"experts\.first\.gate_proj\.weight"),
    "another leaf": (relabelled("2.up_proj.weight", "2.up_proj.kernel"), r"experts\.2\.up_proj\.kernel"),
    "another place": (relabelled("mlp.experts", "moe.experts"), r"layers\.0\.moe\.experts\.0\.down_proj\.weight"),
    "an expert that isn't there": (without("1.mlp.experts.2.down_proj.weight"), r"layers\.1\.mlp\.experts\.down_proj"),
    "a part that isn't there": (
        without("1.mlp.experts.2.up_proj.weight"),
        r"2 are called '.experts.\*.up_proj.weight'",
    ),
    "half of a parameter": (
        without("up_proj.weight"),
        r"gate_up_proj' is joined(.|\n)*3 are called '.experts.\*.gate_proj.weight'(.|\n)*0 are called",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_names_that_are_unknown_or_ambiguous(tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    write(tmp_path / "it", "mixtral", change)
    with pytest.raises(quantdock.LedgerError, match=message):
        quantdock.load(tmp_path / "it")
