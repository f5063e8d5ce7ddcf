"""Synthetic Llama-shaped checkpoints in bfloat16, written shard by shard without building a model.

The weights are random, which no loader can tell from trained ones: what is read, converted and quantized has the same
sizes. A checkpoint is made once per folder and appears there whole or not at all.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

_STD = 0.02
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The sizes of one checkpoint; the output head is tied to the embeddings."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    shards: int

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the stored tensors, in the order of a forward pass."""
        hidden, wide = self.hidden, self.intermediate
        narrow = hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for index in range(self.layers):
            layer = f"model.layers.{index}"
            yield f"{layer}.input_layernorm.weight", (hidden,)
            yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
            yield f"{layer}.self_attn.k_proj.weight", (narrow, hidden)
            yield f"{layer}.self_attn.v_proj.weight", (narrow, hidden)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
            yield f"{layer}.mlp.gate_proj.weight", (wide, hidden)
            yield f"{layer}.mlp.up_proj.weight", (wide, hidden)
            yield f"{layer}.mlp.down_proj.weight", (hidden, wide)
        yield "model.norm.weight", (hidden,)

    def config(self) -> dict[str, object]:
        """What ``config.json`` says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


PRESETS: dict[str, Preset] = {
    "tiny": Preset(hidden=128, layers=2, intermediate=256, heads=4, kv_heads=2, vocabulary=512, shards=2),
    "small": Preset(hidden=768, layers=12, intermediate=3072, heads=12, kv_heads=4, vocabulary=49_152, shards=2),
    "1b": Preset(hidden=2048, layers=16, intermediate=8192, heads=32, kv_heads=8, vocabulary=128_256, shards=5),
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk."""

    preset: str
    folder: Path

    @property
    def shards(self) -> list[Path]:
        """The weight files, in order."""
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.stat().st_size for shard in self.shards)


def make(preset: str, cache: Path) -> Checkpoint:
    """The checkpoint of a preset, in ``cache``; written now if it isn't there."""
    folder = cache / f"llama-{preset}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{folder.name}-") as aside:
            whole = Path(aside, "whole")
            whole.mkdir()
            _write(PRESETS[preset], whole)
            whole.rename(folder)
    return Checkpoint(preset=preset, folder=folder)


def _write(preset: Preset, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shards = _split(list(preset.shapes()), preset.shards)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _weight(shape, generator) for name, shape in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(preset.config(), indent=2))


def _weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A matrix of small random numbers, or the ones of a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, _STD, generator=generator)


def _split(shapes: list[tuple[str, tuple[int, ...]]], count: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Cut the list into ``count`` runs of about the same number of elements."""
    total = sum(torch.Size(shape).numel() for _, shape in shapes)
    result: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(count)]
    before = 0
    for name, shape in shapes:
        size = torch.Size(shape).numel()
        result[min(count - 1, (before + size // 2) * count // total)].append((name, shape))
        before += size
    return [shard for shard in result if shard]
