"""Mixtral's experts under the names that gptqmodel gives them with transformers 5."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantdock

sys.path.insert(0, str(Path(__file__).parent))
from moe_files import EXPERTS, FORMS, Form, logits, model_of, reference, same_bits, same_files, write

pytest.importorskip("quantdock_transformers", reason="the models are transformers', whose architectures it brings")

PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def modular(name: str) -> str:
    name = name.replace(".block_sparse_moe.", ".mlp.")
    return re.sub(r"(\.experts\.\d+\.)(w\d)\.", lambda match: f"{match[1]}{PARTS[match[2]]}.", name)


def rename(folder: Path, *, keep: bool = False) -> dict[str, Tensor]:
    """Give the tensors of a checkpoint gptqmodel's names, beside their own or instead of them."""
    before = load_file(folder / "model.safetensors")
    after = {modular(name): tensor.clone() for name, tensor in before.items()}
    save_file(before | after if keep else after, folder / "model.safetensors", metadata={"format": "pt"})
    return after


@pytest.mark.parametrize("form", ["4 bits", "act order", "no index, other scales"])
def test_is_what_it_is_under_its_own_names(tmp_path: Path, form: str) -> None:
    original = model_of("mixtral")
    write(tmp_path / "own", original, FORMS[form])
    plain = write(tmp_path / "it", original, FORMS[form])
    stored = rename(tmp_path / "it")
    assert f"model.layers.1.mlp.experts.{EXPERTS - 1}.gate_proj.qweight" in stored
    model: Any = quantdock.load(tmp_path / "it")
    own = quantdock.load(tmp_path / "own")
    assert {source for entry in quantdock.report(model).ledger.entries for source in entry.sources} == stored.keys()
    found, expected = model.state_dict(), own.state_dict()
    assert list(found) == list(expected)
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(logits(model), logits(own))

    # Quantized, they keep the names, which are the only ones that gptqmodel reads.
    quantdock.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "save_pretrained")
    assert same_files(tmp_path / "it", tmp_path / "saved")
    assert same_files(tmp_path / "it", tmp_path / "save_pretrained")

    # In full precision, they get those that transformers reads.
    theirs = reference(tmp_path / "plain", original, plain)
    restored = quantdock.dequantize(model)
    assert torch.equal(logits(restored), logits(theirs))
    quantdock.save(restored, tmp_path / "restored")
    assert same_files(tmp_path / "plain", tmp_path / "restored")


def save_quantized(folder: Path, skip: str) -> tuple[Path, Path]:
    """Quantize and save one model, read under its own names and under gptqmodel's."""
    original, saved = model_of("mixtral", inner=128), []
    for name in ("own", "it"):
        original.save_pretrained(folder / name)
        if name == "it":
            rename(folder / name)
        model = quantdock.load(folder / name, quantize="gptq-int4", skip=[skip])
        saved.append(quantdock.save(model, folder / f"{name}-saved"))
        assert torch.equal(logits(quantdock.load(saved[-1])), logits(model))
    return saved[0], saved[1]


def test_quantizing_keeps_the_names(tmp_path: Path) -> None:
    own, it = save_quantized(tmp_path, "*.layers.0.mlp.experts.*")
    rename(own)
    assert same_files(own, it)


def test_experts_left_in_full_precision_get_their_own_names(tmp_path: Path) -> None:
    own, it = save_quantized(tmp_path, "*.experts.*")
    assert same_files(own, it)


def test_both_kinds_of_names(tmp_path: Path) -> None:
    write(tmp_path / "it", model_of("mixtral"), Form())
    rename(tmp_path / "it", keep=True)
    message = r"two kinds of names(.|\n)*block_sparse_moe\.experts\.0\.w\d(.|\n)*mlp\.experts\.0\.\w+_proj"
    with pytest.raises(quantdock.LedgerError, match=message):
        quantdock.load(tmp_path / "it")


def test_scales_under_other_names_than_their_codes(tmp_path: Path) -> None:
    write(tmp_path / "it", model_of("mixtral"), Form())
    tensors = rename(tmp_path / "it")
    name = "model.layers.1.mlp.experts.2.up_proj.scales"
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.scales"] = tensors.pop(name)
    save_file(tensors, tmp_path / "it" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(quantdock.LedgerError, match=r"two kinds of names(.|\n)*experts\.2\.w3\.weight"):
        quantdock.load(tmp_path / "it")
