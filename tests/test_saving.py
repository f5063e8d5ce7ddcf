"""Saving: what was loaded comes back, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.conftest import TinyFactory, skipping_what_this_machine_lacks
from tests.reference import assert_same_model
from torch import nn

import quantdock


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma2", "gpt2", "bart", "qwen3_moe"])
def test_transformers_and_quantdock_read_it(model_type: str, tiny: TinyFactory, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = quantdock.load(tiny(model_type))
    folder = quantdock.save(model, tmp_path / "saved")
    assert_same_model(quantdock.load(folder), model)
    assert_same_model(model, AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma2"])
def test_the_same_tensors_as_save_pretrained(model_type: str, tiny: TinyFactory, tmp_path: Path) -> None:
    model = quantdock.load(tiny(model_type), quantize="bnb-nf4")
    quantdock.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    with (
        safe_open(tmp_path / "ours" / "model.safetensors", framework="pt") as ours,
        safe_open(tmp_path / "theirs" / "model.safetensors", framework="pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        for name in theirs.keys():  # noqa: SIM118 - not a dict
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name)), name
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")]
    assert configs[0] == configs[1]


def test_shards_and_their_index(tiny: TinyFactory, tmp_path: Path) -> None:
    model = quantdock.load(tiny("llama"))
    folder = quantdock.save(model, tmp_path / "saved", max_shard_size="64KiB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert_same_model(quantdock.load(folder), model)
    # Saved again in one piece, no shard and no index is left behind.
    quantdock.save(model, folder)
    assert files(folder) == {"config.json", "generation_config.json", "model.safetensors"}


class Plain(nn.Module):
    """Says nothing of a dtype; neither does its config."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(128, 256), nn.LayerNorm(256), nn.Linear(256, 128, bias=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", sorted(quantdock.presets()))
def test_a_model_of_your_own_keeps_its_dtype(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Though the first tensor in the files may be a scale in float32."""
    (tmp_path / "it").mkdir()
    save_file(Plain().to(dtype).state_dict(), tmp_path / "it" / "model.safetensors")
    with skipping_what_this_machine_lacks(preset):
        model: Any = quantdock.load(tmp_path / "it", model=Plain, quantize=preset)
    folder = quantdock.save(model, tmp_path / "saved")
    again: Any = quantdock.load(folder, model=Plain)
    assert again.norm.weight.dtype == model.norm.weight.dtype == dtype
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in quantdock.dequantize(again).state_dict().items():
        assert tensor.dtype == dtype, name


@pytest.mark.parametrize("preset", ["bnb-nf4", "fp8", "gptq-int4"])
def test_a_model_of_your_own_that_was_converted_keeps_its_new_dtype(preset: str, tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    save_file(Plain().bfloat16().state_dict(), tmp_path / "it" / "model.safetensors")
    model = quantdock.load(tmp_path / "it", model=Plain, quantize=preset).to(torch.float16)
    again: Any = quantdock.load(quantdock.save(model, tmp_path / "saved"), model=Plain)
    assert again.norm.weight.dtype == torch.float16


def test_over_the_folder_it_was_loaded_from(tiny_copy: TinyFactory) -> None:
    folder = tiny_copy("llama")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("kept")
    model = quantdock.load(folder)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantdock.save(model, folder)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "notes" / "a.txt").read_text() == "kept"
    for name, tensor in quantdock.load(folder).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_whole_or_not_at_all(tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantdock.load(tiny("llama"))
    folder = quantdock.save(model, tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(quantdock.SaveError, match="No space left"):
        quantdock.save(model, folder)
    with pytest.raises(quantdock.SaveError, match="No space left"):
        quantdock.save(model, tmp_path / "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert files(tmp_path) == {"saved"}


def test_onto_a_file(tiny: TinyFactory, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(quantdock.SaveError, match="is a file"):
        quantdock.save(quantdock.load(tiny("llama")), tmp_path / "file")


def test_a_model_of_somebody_else(tmp_path: Path) -> None:
    with pytest.raises(quantdock.QuantdockError, match="wasn't loaded by quantdock"):
        quantdock.save(torch.nn.Linear(2, 2), tmp_path)
