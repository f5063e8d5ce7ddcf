"""Shapes of synthetic checkpoints, by name; what a loader reads and makes has the sizes of the real ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

Shapes = Iterator[tuple[str, tuple[int, ...]]]
"""Names and shapes of stored tensors."""


@dataclass(frozen=True, kw_only=True)
class Preset(ABC):
    """The sizes of one checkpoint."""

    family: ClassVar[str]
    hidden: int
    layers: int
    shards: int

    @abstractmethod
    def shapes(self) -> Shapes:
        """All stored tensors, in the order of a forward pass."""

    @abstractmethod
    def config(self) -> dict[str, object]:
        """What ``config.json`` says."""


@dataclass(frozen=True, kw_only=True)
class Llama(Preset):
    """Llama; the output head is tied to the embeddings."""

    family: ClassVar[str] = "llama"
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    def shapes(self) -> Shapes:
        hidden, narrow = self.hidden, self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for index in range(self.layers):
            layer = f"model.layers.{index}"
            yield f"{layer}.input_layernorm.weight", (hidden,)
            yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
            yield f"{layer}.self_attn.k_proj.weight", (narrow, hidden)
            yield f"{layer}.self_attn.v_proj.weight", (narrow, hidden)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
            yield from self.feed_forward(layer)
        yield "model.norm.weight", (hidden,)

    def feed_forward(self, layer: str) -> Shapes:
        """The second half of a layer."""
        yield f"{layer}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
        yield f"{layer}.mlp.up_proj.weight", (self.intermediate, self.hidden)
        yield f"{layer}.mlp.down_proj.weight", (self.hidden, self.intermediate)

    def config(self) -> dict[str, object]:
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


@dataclass(frozen=True, kw_only=True)
class Mixtral(Llama):
    """Mixtral: stored expert by expert, held as one parameter of all experts per layer and direction."""

    family: ClassVar[str] = "mixtral"
    experts: int

    def feed_forward(self, layer: str) -> Shapes:
        moe = f"{layer}.block_sparse_moe"
        yield f"{moe}.gate.weight", (self.experts, self.hidden)
        for expert in range(self.experts):
            yield f"{moe}.experts.{expert}.w1.weight", (self.intermediate, self.hidden)
            yield f"{moe}.experts.{expert}.w2.weight", (self.hidden, self.intermediate)
            yield f"{moe}.experts.{expert}.w3.weight", (self.intermediate, self.hidden)

    def config(self) -> dict[str, object]:
        return super().config() | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": self.experts,
            "num_experts_per_tok": 2,
        }


_1B = {"hidden": 2048, "intermediate": 8192, "heads": 32, "kv_heads": 8, "vocabulary": 128_256}
_8B = {"hidden": 4096, "intermediate": 14_336, "heads": 32, "kv_heads": 8, "vocabulary": 128_256}

PRESETS: dict[str, Preset] = {
    "tiny": Llama(hidden=128, layers=2, intermediate=256, heads=4, kv_heads=2, vocabulary=512, shards=2),
    "small": Llama(hidden=768, layers=12, intermediate=3072, heads=12, kv_heads=4, vocabulary=49_152, shards=2),
    "1b": Llama(**_1B, layers=16, shards=5),
    "1b-deep": Llama(
        hidden=1024, layers=100, shards=4, intermediate=2560, heads=16, kv_heads=4, vocabulary=32000
    ),  # many small blocks, for methods whose time grows with the cube of a layer's width
    "5b": Llama(**_1B, layers=77, shards=20),
    "shard10g": Llama(**_8B, layers=21, shards=1),
    "tiny-experts": Mixtral(
        hidden=128, layers=2, intermediate=256, heads=4, kv_heads=2, vocabulary=512, experts=4, shards=2
    ),
    "experts": Mixtral(
        hidden=4096, layers=2, intermediate=15_360, heads=32, kv_heads=8, vocabulary=32_000, experts=8, shards=6
    ),
}
"""``5b`` has four times the bytes of ``1b``, ``shard10g`` one file of 10 GB, ``experts`` parameters of 2 GB."""

TINY = {"llama": "tiny", "mixtral": "tiny-experts"}
"""Family -> the preset that warms a process up for it."""
