"""Names, conversions and configs: the same parameters as transformers' own GGUF loader makes, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from quantdock import Conversion, TensorSpec
from quantdock_gguf.config import derived_config
from quantdock_gguf.header import read_header
from quantdock_gguf.naming import parameter_names
from quantdock_gguf.reader import GGUFTensorReader
from quantdock_gguf.routing import ProcessorRouting

COMMON: dict[str, Any] = {
    "context_length": 64,
    "block_count": 2,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 16,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bloom": {},
    "falcon": {},
    "gemma2": {"attention.key_length": 16, "attention.sliding_window": 32},
    "gemma3": {"attention.key_length": 16, "attention.sliding_window": 32},
    "gpt2": {},
    "llama": {},
    "mamba": {"ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 4, "ssm.inner_size": 128},
    "minimax-m2": {"attention.key_length": 16, "expert_count": 4, "expert_used_count": 2, "expert_gating_func": 2},
    "nemotron": {},
    "phi3": {},
    "qwen2": {},
    "qwen2moe": {"expert_count": 4, "expert_used_count": 2},
    "qwen3": {},
    "qwen3moe": {"attention.key_length": 16, "expert_count": 4, "expert_used_count": 2},
    "stablelm": {},
    "starcoder2": {},
    "t5": {"attention.key_length": 16, "attention.relative_buckets_count": 32, "decoder_start_token_id": 0},
}
KINDS = (Kind.Q8_0, Kind.F16, Kind.Q4_0, Kind.BF16, Kind.F32, Kind.Q5_1)


def metadata(architecture: str) -> dict[str, Any]:
    entries = {f"{architecture}.{key}": value for key, value in (COMMON | SPECIAL[architecture]).items()}
    return entries | {
        "general.name": f"a tiny {architecture}",
        "tokenizer.ggml.tokens": [f"token{number}" for number in range(96)],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def skeleton(config: Mapping[str, Any]) -> torch.nn.Module:
    native = AutoConfig.for_model(**config)
    auto = AutoModelForSeq2SeqLM if config["model_type"] == "t5" else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(native)


def stored_shape(architecture: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What llama.cpp's converters make of a parameter's shape."""
    if name.endswith(("ffn_gate_exps", "ffn_up_exps")):
        return (shape[0], shape[1] // 2, shape[2])
    if name.endswith(("ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")):
        return tuple(size for size in shape if size != 1)
    parts = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")
    return shape[::-1] if architecture == "gpt2" and name.endswith(parts) else shape


def tiny_tensors(architecture: str, names: Mapping[str, str], model: torch.nn.Module):
    """Random values under GGUF's names for every parameter, in all sorts of types."""
    random, shapes = np.random.default_rng(3), {name: tuple(slot.shape) for name, slot in model.state_dict().items()}
    tied = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    tensors: dict[str, tuple[np.ndarray, Kind]] = {}
    seen: set[str] = set()
    for name, parameter in names.items():
        fused = name.endswith(("gate_exps", "up_exps", "down_exps"))
        if parameter not in shapes or (parameter in seen and not fused) or parameter in tied:
            continue
        seen.add(parameter)
        shape = stored_shape(architecture, name, shapes[parameter])
        values = random.standard_normal(shape, dtype=np.float32)
        if "ssm_a" in name:
            values = -np.abs(values) - 0.1
        kind = KINDS[len(tensors) % len(KINDS)] if len(shape) > 1 else Kind.F32
        if shape[-1] % GGML_QUANT_SIZES[kind][0]:
            kind = Kind.F32
        tensors[f"{name}.weight" if fused else name] = (values, kind)
    return tensors


NOTHING = {name: (np.ones(1, np.float32), Kind.F32) for name in ("one", "two")}


@pytest.fixture
def tiny_model(write_gguf, tmp_path):
    """Architecture -> (file, meta model, transformers' config)."""

    def make(architecture: str) -> tuple[Path, torch.nn.Module, dict[str, Any]]:
        entries = metadata(architecture)
        draft = write_gguf(tmp_path / "draft.gguf", architecture, entries, NOTHING)
        config = load_gguf_checkpoint(str(draft))["config"]
        model = skeleton(config)
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
        names = get_gguf_hf_weights_map(model, processor)
        path = write_gguf(tmp_path / "tiny.gguf", architecture, entries, tiny_tensors(architecture, names, model))
        config = load_gguf_checkpoint(str(path))["config"]
        return path, skeleton(config), config

    return make


def evaluate(conversion: Conversion, values: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A conversion, done by hand."""
    sources = {name: values[name] for name in conversion.sources}
    if conversion.function is not None:
        return conversion.function(sources)
    assert conversion.assemblies is not None
    made = {}
    for target, assembly in conversion.assemblies.items():
        made[target] = torch.empty(assembly.shape, dtype=conversion.targets[target].dtype)
        for piece in assembly.pieces:
            made[target][piece.into].copy_(piece.of(sources[piece.source]))
    return made


def convert_all(model: torch.nn.Module, config: Mapping[str, Any], reader: GGUFTensorReader) -> dict[str, torch.Tensor]:
    """What every parameter is made to be, by hand, before it is cast to the dtype of its slot."""
    header = reader.header
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config)
    names = parameter_names(model, processor, [header])
    stored = {tensor.name: tensor for tensor in reader.tensors()}
    slots = {name: TensorSpec.of(slot) for name, slot in model.state_dict().items()}
    routing = ProcessorRouting(processor=processor, names=names).route(
        {name: tensor.spec for name, tensor in stored.items()}, slots
    )
    assert not routing.unmatched
    values = {name: tensor.read() for name, tensor in stored.items()}
    made: dict[str, torch.Tensor] = {}
    for conversion in routing.conversions:
        results = evaluate(conversion, values)
        shapes = {name: tuple(value.shape) for name, value in results.items()}
        assert shapes == {name: spec.shape for name, spec in conversion.targets.items()}
        assert shapes == {name: slots[name].shape for name in results}
        made |= results
    return made


@pytest.mark.parametrize("architecture", SPECIAL)
def test_parameters_are_those_of_transformers_bit_for_bit(tiny_model, architecture):
    path, model, config = tiny_model(architecture)
    header = read_header(path)
    assert derived_config([header]) == config
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    assert parameter_names(model, processor, [header]) == get_gguf_hf_weights_map(model, processor)

    wanted = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    made = convert_all(model, config, GGUFTensorReader(header))
    assert made.keys() == wanted.keys()
    for name, value in made.items():
        assert torch.equal(value.float().view(torch.int32), wanted[name].view(torch.int32)), name
    for name, value in convert_all(model, config, GGUFTensorReader(header, dtype=torch.bfloat16)).items():
        assert torch.equal(value.to(torch.bfloat16), wanted[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2moe", "gemma2"])
def test_what_a_processor_leaves_alone_is_only_renamed(tiny_model, architecture):
    path, model, config = tiny_model(architecture)
    header = read_header(path)
    processor = TENSOR_PROCESSORS[architecture](config=config)
    names = parameter_names(model, processor, [header])
    stored = {tensor.name: tensor.spec for tensor in GGUFTensorReader(header).tensors()}
    slots = {name: TensorSpec.of(slot) for name, slot in model.state_dict().items()}
    routing = ProcessorRouting(processor=processor, names=names).route(stored, slots)
    changed = {conversion.sources for conversion in routing.conversions if not conversion.is_rename}
    touched = {
        "llama": ("attn_q.", "attn_k."),
        "qwen2moe": ("ffn_gate_exps", "ffn_gate_inp_shexp"),
        "gemma2": ("norm.",),
    }[architecture]
    assert {sources[0] for sources in changed} == {name for name in stored if any(part in name for part in touched)}


def test_gemma4_has_the_names_of_transformers(write_gguf, tmp_path):
    """Only the names: its embeddings have one size whatever the file says, too large for a test."""
    entries = {f"gemma4.{key}": value for key, value in COMMON.items()} | {"gemma4.attention.key_length": 16}
    path = write_gguf(tmp_path / "names.gguf", "gemma4", entries, NOTHING)
    config = load_gguf_checkpoint(str(path))["config"]
    assert derived_config([read_header(path)]) == config
    model, processor = skeleton(config), TensorProcessor(config=config)
    assert parameter_names(model, processor, [read_header(path)]) == get_gguf_hf_weights_map(model, processor)
