"""Checkpoints of a trillion parameters, to be planned and never loaded: 100,000 tensors in 1,000 files of holes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.presets import Preset, Shapes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Deepseek(Preset):
    """DeepSeek-V3, whose shape Kimi-K2 has, too: stored expert by expert, held as one parameter of all experts."""

    family: ClassVar[str] = "deepseek"
    experts: int
    expert_width: int
    dense_width: int
    heads: int
    query_rank: int = 1536
    key_rank: int = 512
    rope: int = 64
    head: int = 128
    vocabulary: int = 163_840

    def shapes(self) -> Shapes:
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for index in range(self.layers):
            layer = f"model.layers.{index}"
            yield f"{layer}.input_layernorm.weight", (self.hidden,)
            yield from self._attention(f"{layer}.self_attn")
            yield f"{layer}.post_attention_layernorm.weight", (self.hidden,)
            if not index:
                yield from self._feed_forward(f"{layer}.mlp", self.dense_width)
                continue
            yield f"{layer}.mlp.gate.weight", (self.experts, self.hidden)
            yield f"{layer}.mlp.gate.e_score_correction_bias", (self.experts,)
            yield from self._feed_forward(f"{layer}.mlp.shared_experts", self.expert_width)
            for expert in range(self.experts):
                yield from self._feed_forward(f"{layer}.mlp.experts.{expert}", self.expert_width)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def _attention(self, attention: str) -> Shapes:
        yield f"{attention}.q_a_proj.weight", (self.query_rank, self.hidden)
        yield f"{attention}.q_a_layernorm.weight", (self.query_rank,)
        yield f"{attention}.q_b_proj.weight", (self.heads * (self.head + self.rope), self.query_rank)
        yield f"{attention}.kv_a_proj_with_mqa.weight", (self.key_rank + self.rope, self.hidden)
        yield f"{attention}.kv_a_layernorm.weight", (self.key_rank,)
        yield f"{attention}.kv_b_proj.weight", (self.heads * 2 * self.head, self.key_rank)
        yield f"{attention}.o_proj.weight", (self.hidden, self.heads * self.head)

    def _feed_forward(self, block: str, width: int) -> Shapes:
        yield f"{block}.gate_proj.weight", (width, self.hidden)
        yield f"{block}.up_proj.weight", (width, self.hidden)
        yield f"{block}.down_proj.weight", (self.hidden, width)

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_width,
            "moe_intermediate_size": self.expert_width,
            "num_hidden_layers": self.layers,
            "first_k_dense_replace": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": self.query_rank,
            "kv_lora_rank": self.key_rank,
            "qk_rope_head_dim": self.rope,
            "qk_nope_head_dim": self.head,
            "v_head_dim": self.head,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "num_mtp_layers": 0,
            "dtype": "bfloat16",
        }


@dataclass(frozen=True, kw_only=True)
class Linears(Preset):
    """Square linear layers and nothing else, for a model that comes from a factory."""

    family: ClassVar[str] = "linears"
    per_layer: int

    def shapes(self) -> Shapes:
        for layer in range(self.layers):
            for index in range(self.per_layer):
                yield f"layers.{layer}.{index}.weight", (self.hidden, self.hidden)

    def config(self) -> dict[str, object]:
        return {"hidden": self.hidden, "layers": self.layers, "per_layer": self.per_layer, "dtype": "bfloat16"}


def linears(config: Mapping[str, Any]) -> torch.nn.Module:
    """The module of a ``Linears`` checkpoint, from its config."""
    from torch import nn

    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleList(nn.Linear(config["hidden"], config["hidden"], bias=False) for _ in range(config["per_layer"]))
        for _ in range(config["layers"])
    )
    return model


FACTORIES: dict[str, Callable[[Mapping[str, Any]], torch.nn.Module]] = {"linears": linears}
"""Family -> what is given as ``model=``; other families come from transformers."""

GIANTS: dict[str, dict[str, Preset]] = {
    "trillion": {
        "deepseek": Deepseek(
            hidden=7168, layers=66, experts=512, expert_width=1408, dense_width=18_432, heads=64, shards=1000
        ),
        "linears": Linears(hidden=3200, layers=100, per_layer=1000, shards=1000),
    },
    "tiny": {
        "deepseek": Deepseek(
            hidden=64, layers=2, experts=4, expert_width=32, dense_width=64, heads=2, vocabulary=128, shards=2
        ),
        "linears": Linears(hidden=64, layers=2, per_layer=4, shards=2),
    },
}
"""Size -> family -> preset."""
