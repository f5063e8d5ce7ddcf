"""Whole loads: the same model as transformers' ``from_pretrained(..., gguf_file=...)``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
from transformers.integrations.gguf import get_gguf_config, read_gguf_metadata

from quantdock import load
from quantdock_gguf import tokenizer
from quantdock_gguf.stage import GGUFStage
from quantdock_transformers.stage import TransformersStage

STAGES = (TransformersStage, GGUFStage)


def reference(path: Path, dtype: torch.dtype | str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )


def assert_same_model(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    assert type(ours) is type(theirs)
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype, name
        assert torch.equal(value.view(torch.uint8), wanted[name].view(torch.uint8)), name
    ids = torch.arange(7)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16, torch.float16])
def test_a_llama_is_the_one_of_transformers(tiny_llama, dtype):
    ours = load(tiny_llama, dtype=dtype, plugins=STAGES)
    assert_same_model(ours, reference(tiny_llama, dtype))


# Architectures that transformers describes by weight transforms: GGUF name -> parameter, within the model and a layer.

DENSE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{}.ffn_gate.weight": "mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "mlp.down_proj.weight",
    "blk.{}.attn_q.weight": "self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "self_attn.o_proj.weight",
}
QWEN35 = DENSE | {
    "output_norm.weight": "model.norm.weight",
    "blk.{}.attn_norm.weight": "input_layernorm.weight",
    "blk.{}.post_attention_norm.weight": "post_attention_layernorm.weight",
    "blk.{}.attn_q_norm.weight": "self_attn.q_norm.weight",
    "blk.{}.attn_k_norm.weight": "self_attn.k_norm.weight",
    "blk.{}.attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "blk.{}.attn_gate.weight": "linear_attn.in_proj_z.weight",
    "blk.{}.ssm_alpha.weight": "linear_attn.in_proj_a.weight",
    "blk.{}.ssm_beta.weight": "linear_attn.in_proj_b.weight",
    "blk.{}.ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "blk.{}.ssm_norm.weight": "linear_attn.norm.weight",
    "blk.{}.ssm_out.weight": "linear_attn.out_proj.weight",
    "blk.{}.ssm_a": "linear_attn.A_log",
    "blk.{}.ssm_dt.bias": "linear_attn.dt_bias",
}
QWEN35MOE = {name: parameter for name, parameter in QWEN35.items() if "ffn" not in name} | {
    "output.weight": "lm_head.weight",
    "blk.{}.ffn_gate_inp.weight": "mlp.gate.weight",
    "blk.{}.ffn_gate_exps.weight": "mlp.experts.gate_up_proj",
    "blk.{}.ffn_up_exps.weight": "mlp.experts.gate_up_proj",
    "blk.{}.ffn_down_exps.weight": "mlp.experts.down_proj",
    "blk.{}.ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    "blk.{}.ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "blk.{}.ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "blk.{}.ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
}
LFM2 = {
    "token_embd.weight": "model.embed_tokens.weight",
    "token_embd_norm.weight": "model.embedding_norm.weight",
    "blk.{}.attn_norm.weight": "operator_norm.weight",
    "blk.{}.ffn_norm.weight": "ffn_norm.weight",
    "blk.{}.attn_q.weight": "self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "self_attn.out_proj.weight",
    "blk.{}.attn_q_norm.weight": "self_attn.q_layernorm.weight",
    "blk.{}.attn_k_norm.weight": "self_attn.k_layernorm.weight",
    "blk.{}.ffn_gate.weight": "feed_forward.w1.weight",
    "blk.{}.ffn_up.weight": "feed_forward.w3.weight",
    "blk.{}.ffn_down.weight": "feed_forward.w2.weight",
    "blk.{}.shortconv.in_proj.weight": "conv.in_proj.weight",
    "blk.{}.shortconv.out_proj.weight": "conv.out_proj.weight",
    "blk.{}.shortconv.conv.weight": "conv.conv.weight",
}
NAMES = {"qwen35": QWEN35, "qwen35moe": QWEN35MOE, "lfm2": LFM2}
METADATA: dict[str, dict[str, Any]] = {
    "qwen35": {
        "attention.key_length": 32,
        "full_attention_interval": 2,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 16,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 64,
        "rope.dimension_sections": [2, 1, 1, 0],
        "rope.dimension_count": 8,
    },
    "lfm2": {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3},
}
METADATA["qwen35moe"] = METADATA["qwen35"] | {
    "expert_feed_forward_length": 32,
    "expert_shared_feed_forward_length": 32,
    "expert_count": 4,
    "expert_used_count": 2,
}


def new_style_file(write_gguf, folder: Path, architecture: str, kind: Kind) -> Path:
    common = {
        "context_length": 64,
        "block_count": 2,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    entries = {f"{architecture}.{key}": value for key, value in (common | METADATA[architecture]).items()}
    entries["tokenizer.ggml.tokens"] = [f"token{number}" for number in range(96)]
    path = folder / f"{architecture}.gguf"
    names = NAMES[architecture]
    write_gguf(path, architecture, entries, {name: (np.ones(1, np.float32), Kind.F32) for name in names})
    config = get_gguf_config(*read_gguf_metadata(str(path)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return write_gguf(path, architecture, entries, new_style_tensors(names, model, kind))


def new_style_tensors(names: Mapping[str, str], model: torch.nn.Module, kind: Kind):
    random, tensors = np.random.default_rng(5), {}
    shapes = {name: tuple(slot.shape) for name, slot in model.state_dict().items()}
    for block in range(2):
        for pattern, parameter in names.items():
            full = f"model.layers.{block}.{parameter}" if "{}" in pattern else parameter
            name = pattern.format(block)
            if full not in shapes or name in tensors:
                continue  # a layer has one kind of attention
            shape = shapes[full]
            if name.endswith(("gate_exps.weight", "up_exps.weight")):
                shape = (shape[0], shape[1] // 2, shape[2])
            if name.endswith(("conv1d.weight", "shortconv.conv.weight", "gate_inp_shexp.weight")):
                shape = tuple(size for size in shape if size != 1)
            values = random.standard_normal(shape, dtype=np.float32)
            values = -np.abs(values) - 0.1 if name.endswith("ssm_a") else values
            packable = len(shape) > 1 and shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 and "conv" not in name
            tensors[name] = (values, kind if packable else Kind.F32)
    return tensors


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.BF16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", NAMES)
def test_an_architecture_with_transforms_is_the_one_of_transformers(write_gguf, tmp_path, architecture, kind, dtype):
    """bf16 is where casting first or last, and unpacking in float32 or not, make a difference."""
    path = new_style_file(write_gguf, tmp_path, architecture, kind)
    ours = load(path, dtype=dtype, plugins=STAGES)
    assert_same_model(ours, reference(path, dtype))


@pytest.mark.demo
@pytest.mark.slow
def test_smollm2_is_the_one_of_transformers(smollm2_gguf):
    ours = load(smollm2_gguf, dtype=torch.bfloat16, plugins=STAGES)
    assert_same_model(ours, reference(smollm2_gguf, torch.bfloat16))


@pytest.mark.demo
@pytest.mark.slow
def test_smollm2_answers(smollm2_gguf):
    encoder = tokenizer(smollm2_gguf)
    model = load(smollm2_gguf, plugins=STAGES)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = encoder.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in encoder.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_the_tokenizer_is_the_one_in_the_file(write_gguf, tmp_path):
    tokens = ["<s>", "</s>", "h", "e", "l", "o", "he", "ll", "hell", "hello"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * 8,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    path = write_gguf(tmp_path / "words.gguf", "llama", metadata, {"w": (np.ones(1, np.float32), Kind.F32)})
    encoder = tokenizer(path)
    assert encoder.decode(encoder("hello", add_special_tokens=False).input_ids) == "hello"
