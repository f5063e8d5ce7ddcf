"""Tiny checkpoints of every causal language model architecture that the installed transformers knows.

Each architecture is described by the configuration class that transformers registers for it. The class' own defaults
describe a model of several billion parameters; :func:`tiny_config` shrinks every size that it recognises (see
``_SIZES``), keeps the sizes consistent with one another, and applies the few corrections that a particular
architecture needs (``_OVERRIDES``). The model is then initialised at random from a seed that depends on nothing but
the name of the architecture, every weight is moved off its initial value, and transformers writes the checkpoint.

Run the module to build all of them, and to check each one against transformers' own loader::

    python -m tests.tiny_models --out DIR [--only llama,mixtral]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

UNMAKEABLE: dict[str, str] = {
    "gemma3n": "its vision tower is a timm model: needs the timm and pillow packages",
    "gemma4_assistant": (
        "every layer reads the keys and values of another model, and transformers cannot instantiate it: its "
        "kv_sharing_modes rejects the configuration, the default one included, since no layer is left to produce them"
    ),
    "gemma4_unified_assistant": (
        "every layer reads the keys and values of another model, and transformers cannot instantiate it: its "
        "kv_sharing_modes rejects the configuration, the default one included, since no layer is left to produce them"
    ),
    "musicgen": (
        "AutoModelForCausalLM cannot build it: it passes the whole MusicgenConfig to a class that needs the decoder's "
        "configuration, and the decoder's own model type is not in the mapping"
    ),
    "musicgen_melody": (
        "AutoModelForCausalLM cannot build it: it passes the whole MusicgenMelodyConfig to a class that needs the "
        "decoder's configuration, and the decoder's own model type is not in the mapping"
    ),
}
"""Architectures of the mapping that have no tiny checkpoint here, and why."""

_FLOAT32_ONLY = frozenset({"reformer", "xlnet"})
"""Architectures that cannot be bfloat16: reformer's forward pass mixes data types, and xlnet creates its attention
weights in single precision whatever data type is asked for."""

_COMPOSITE: dict[str, str] = {
    "dots3_note": "Dots3NoteForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
}
"""Multimodal architectures whose causal LM class is the text part only. Their checkpoints hold the whole model, as
the published ones do, and the causal LM reads the text part out of it."""

_TEXT_WITH_COMPOSITE_CONFIG = frozenset({"emu3"})
"""Multimodal architectures whose causal LM class cannot find the text part in a checkpoint of the whole model. Their
checkpoints hold the weights of the text part next to the configuration of the whole model."""

_LAYER_COUNTS = frozenset({
    "decoder_layers", "depth", "encoder_layers", "n_layer", "n_layers", "num_blocks", "num_decoder_layers",
    "num_encoder_layers", "num_hidden_layers", "num_layers",
})  # fmt: skip
"""Names under which configurations keep the number of layers."""

_LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
"""Names under which configurations list the kind of each layer, one entry a layer."""

_SIZES: dict[str, int] = {
    # vocabulary and special tokens; the example inputs use none of the special tokens
    "vocab_size": 128, "decoder_vocab_size": 128, "vocab_size_per_layer_input": 128,
    "pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2, "eod_token_id": 2,
    "image_token_id": 120, "image_token_index": 120, "video_token_id": 121, "audio_token_id": 122,
    "vision_start_token_id": 123, "vision_end_token_id": 124, "boi_token_id": 123, "boi_token_index": 123,
    "eoi_token_id": 124, "eoi_token_index": 124, "boa_token_id": 125, "eoa_token_id": 126, "eoa_token_index": 126,
    # width of the residual stream
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "emb_dim": 64, "embedding_dim": 64, "embedding_size": 64,
    "word_embed_proj_dim": 64, "backbone_hidden_size": 64, "out_hidden_size": 64, "vision_output_dim": 64,
    "projector_input_dim": 64, "projector_output_dim": 64, "lru_width": 64, "attention_hidden_size": 128,
    "hidden_size_global": 64, "input_embedding_size": 32, "output_embedding_size": 96,
    "hidden_size_per_layer_input": 16, "laurel_rank": 16, "adapter_rank": 16, "router_hidden_size": 32,
    "adapter_in_dim": 64, "adapter_out_dim": 64, "adapter_input_size": 64, "downsample_hidden_size": 32,
    # width of the feed-forward blocks
    "intermediate_size": 192, "intermediate_size_mlp": 192, "dense_intermediate_size": 192, "ffn_dim": 192,
    "decoder_ffn_dim": 192, "encoder_ffn_dim": 192, "ffn_hidden_size": 192, "n_inner": 192, "dff": 192, "dim_ff": 192,
    "d_ff": 192, "d_inner": 192, "mlp_dim": 192, "feed_forward_size": 192,
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "shared_experts_intermediate_size": 128,
    "shared_intermediate_size": 128, "moe_shared_expert_intermediate_size": 128, "expert_ffn_hidden_size": 128,
    # attention heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4, "swa_num_attention_heads": 4, "conf_num_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "kv_n_heads": 2, "swa_num_key_value_heads": 2,
    "head_dim": 32, "swa_head_dim": 32, "kv_channels": 32, "d_kv": 16, "dim_head": 16, "d_head": 16,
    "attention_head_size": 16, "rotary_dim": 8,
    # latent attention and indexers
    "q_lora_rank": 32, "kv_lora_rank": 32, "o_lora_rank": 32, "o_groups": 2, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 32, "index_head_dim": 32, "index_n_heads": 4, "index_topk": 4,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "zero_expert_num": 2,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2, "moe_k": 2,
    "n_group": 2, "num_expert_group": 2, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1,
    "moe_layer_end_index": 1,
    # lengths
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "model_max_length": 64,
    "context_length": 64, "max_target_positions": 64, "max_source_positions": 64,
    "original_max_position_embeddings": 64, "sliding_window": 4, "sliding_window_size": 4, "attention_window_size": 4,
    "window_size": 4, "local_attention": 4, "attention_chunk_size": 4, "block_size": 4, "max_window_layers": 1,
    "prompt_length": 8,
    # state-space and linear attention layers
    "mamba_d_state": 16, "state_size": 16, "ssm_state_size": 16, "mamba_n_heads": 4, "mamba_num_heads": 4,
    "n_mamba_heads": 4, "mamba_d_head": 32, "mamba_head_dim": 32, "mamba_d_ssm": 128, "mamba_dt_rank": 8,
    "time_step_rank": 8, "mamba_chunk_size": 8, "chunk_size": 8, "n_groups": 2, "mamba_n_groups": 2,
    "mamba_ngroups": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_heads": 4, "linear_head_dim": 16,
    # towers for images and sound
    "image_size": 32, "crop_size": 32, "patch_size": 8, "num_position_embeddings": 16, "output_channels": 32,
    "nemo_conv_channels": 32, "ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64,
    "bias_max_distance": 16, "num_mel_bins": 16, "feature_size": 16, "position_embedding_size": 16,
    "output_proj_dims": 64,
}  # fmt: skip
"""The value that a size takes when a configuration has it and its default is a positive number."""

_SIZES_OFTEN_UNSET = frozenset({"num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id"})
"""Sizes to set as well where the default is None."""

_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "vocab_size": 260, "encoder_hash_byte_group_vocab": 64, "patch_size": 4, "local_attention_window_len": 16,
        "encoder_config": {"vocab_size": 260, "num_key_value_heads": 4},
        "decoder_config": {"vocab_size": 260, "num_key_value_heads": 4, "hidden_size_global": 64},
        "global_config": {"num_key_value_heads": 4},
        "patcher_config": {"vocab_size": 260, "num_key_value_heads": 4},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 1,
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    },
    "dots3_note_text": {
        "num_key_value_heads": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 48, "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 32,
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": 120, "<|extra_200|>": 121, "<|visual token 000000|>": 122, "<|visual token 000001|>": 123,
        },
        "vq_config": {
            "codebook_size": 16, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
            "hidden_size": 32, "num_attention_heads": 1, "attn_resolutions": [],
        },
    },
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "altup_num_inputs": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "gemma4": {"vision_config": {}, "audio_config": {"subsampling_conv_channels": [8, 4]}},
    "gemma4_text": {
        "global_head_dim": 64, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 128,
    },
    "gemma4_unified_text": {"global_head_dim": 64},
    "got_ocr2": {"vision_config": {"global_attn_indexes": [1], "image_size": 64}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "helium": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 16, "num_key_value_heads": 4},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"],
        "index_block_size": 4, "index_topk_blocks": 1,
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 4,
        "indexer_compress_ratio": 2, "hc_lowrank": 16,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2, "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 32, "pronunciation_vocab_size": 64, "shape_embed_dim": 32, "shape_vocab_size": 64,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_key_value_heads": 4,
    },
    "youtu": {"pad_token_id": None},  # transformers clears the embedding of the padding token after loading
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What to change beyond the sizes, by model type; a part of a model has its own model type. Layer kinds not among the
defaults, and values without which the model class cannot be instantiated or run."""


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """An architecture that :func:`make_tiny` can write a checkpoint of."""

    model_type: str
    class_name: str


def _class_names() -> dict[str, str]:
    """Return transformers' causal LM class of every model type, without importing any model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def causal_lm_architectures() -> list[TinyModel]:
    """Return the architectures that transformers lists as causal LMs and that can be made here."""
    return [
        TinyModel(model_type=model_type, class_name=class_name)
        for model_type, class_name in _class_names().items()
        if model_type not in UNMAKEABLE
    ]


def _seed(model_type: str) -> int:
    """Return a number that depends on the model type alone."""
    return zlib.crc32(model_type.encode())


def tiny_dtype(model_type: str) -> torch.dtype:
    """Return the data type of the architecture's tiny checkpoint: bfloat16 for about half of them."""
    half = _seed(model_type) % 2 == 1 and model_type not in _FLOAT32_ONLY
    return torch.bfloat16 if half else torch.float32


def _defaults(config_class: Any, instance: Any) -> dict[str, Any]:
    """Return the default of every field of a configuration class.

    Where the class declares None, the value is the one that an instance has derived, if it has one.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        values[field.name] = None if field.default is dataclasses.MISSING else field.default
        if values[field.name] is None:
            with contextlib.suppress(AttributeError):  # some sizes vary between layers, and have no single value
                values[field.name] = getattr(instance, field.name)
    return values


def _layer_kinds(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return lists of layer kinds of one common length, at least 2, in which every kind that occurs is kept."""
    kinds = {
        name: list(dict.fromkeys(defaults[name]))
        for name in _LAYER_KINDS
        if isinstance(defaults.get(name), list | tuple)
    }
    kinds.update({name: list(overrides[name]) for name in _LAYER_KINDS if name in overrides})
    layers = max([2, *(len(names) for names in kinds.values())])
    return {name: names + names[-1:] * (layers - len(names)) for name, names in kinds.items()}


def _has_size(name: str, default: Any) -> bool:
    """Tell whether the size of this name is to be set in a configuration whose default for it is ``default``."""
    if default is None:
        return name in _SIZES_OFTEN_UNSET
    if name.endswith("token_id"):
        return True
    return isinstance(default, int) and not isinstance(default, bool) and default > 0


def _shrink(config_class: Any, overrides: Mapping[str, Any]) -> Any:
    """Return a small instance of a configuration class, with small instances of the configurations inside it."""
    instance = config_class()
    overrides = {**_OVERRIDES.get(config_class.model_type, {}), **overrides}
    defaults = _defaults(config_class, instance)

    arguments: dict[str, Any] = dict(_layer_kinds(defaults, overrides))
    layers = max([2, *(len(kinds) for kinds in arguments.values())])
    for name, default in defaults.items():
        if name in _LAYER_COUNTS and isinstance(default, int):
            arguments[name] = layers
        elif name in _SIZES and _has_size(name, default):
            arguments[name] = _SIZES[name]
    if "kv_lora_rank" in defaults and "num_key_value_heads" in arguments:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]  # latent attention has no groups
    if "is_decoder" in defaults:
        arguments["is_decoder"] = True

    for name, part_class in config_class.sub_configs.items():
        part = getattr(instance, name, None)
        if part is not None:
            arguments[name] = _shrink(type(part), overrides.get(name, {}))
        elif name in overrides:
            arguments[name] = _shrink(part_class, overrides[name])
    done = {*config_class.sub_configs, *_LAYER_KINDS}
    arguments.update({name: value for name, value in overrides.items() if name not in done})
    return config_class(**arguments)


def tiny_config(model_type: str) -> Any:
    """Return the transformers configuration of the architecture's tiny checkpoint."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrink(CONFIG_MAPPING[model_type], {})


def _float_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the floating-point parameters and saved buffers of a model, each once however many names it has."""
    saved = set(model.state_dict())
    yield from ((name, tensor) for name, tensor in model.named_parameters() if tensor.is_floating_point())
    yield from (
        (name, tensor) for name, tensor in model.named_buffers() if tensor.is_floating_point() and name in saved
    )


def _cast_as_loaded(model: Any, dtype: torch.dtype) -> None:
    """Give the tensors that transformers loads in another data type than the model's that data type."""
    from transformers.core_model_loading import build_glob_alternation

    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    if not plan:
        return
    alternatives, pattern_of_group, _ = build_glob_alternation(list(plan))
    for name, tensor in _float_tensors(model):
        match = alternatives.search(name)
        if match is not None and match.lastgroup is not None:
            tensor.data = tensor.data.to(plan[pattern_of_group[match.lastgroup]])


def _perturb(model: Any, seed: int) -> None:
    """Move every weight and saved buffer off the value that it was initialised with.

    Norms are not left at exactly one then, nor biases at zero, and a weight that is put in the wrong place changes what
    the model computes.
    """
    generator = torch.Generator().manual_seed(seed)
    routed = any("expert" in name for name, _ in model.named_parameters())
    spread = getattr(model.get_input_embeddings(), "weight", None) if routed else None
    with torch.no_grad():
        for name, tensor in _float_tensors(model):
            noise = torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.ndim > 1 else 0.05)
            if tensor is spread:
                noise *= 10  # tokens far enough apart that they are routed to different experts
            elif name.endswith("running_var"):
                noise.abs_()
            elif name.endswith("balancing_biases"):
                noise[-1] = 0  # transformers resets the last one after loading
            tensor.nan_to_num_(nan=0.0, posinf=8.0, neginf=-8.0)  # unset memory, or bounds that are infinite
            tensor.add_(noise.to(tensor.dtype))
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):  # the experts of each token, all zero when initialised
                table.copy_(torch.rand(table.shape, generator=generator).mul(_SIZES["num_experts"]).long())


def tiny_model(model_type: str) -> Any:
    """Return the model whose weights :func:`make_tiny` saves: the same ones at every call."""
    import transformers

    config = tiny_config(model_type)
    if model_type in _TEXT_WITH_COMPOSITE_CONFIG:
        config = config.get_text_config()
    model_class = getattr(transformers, _COMPOSITE.get(model_type, _class_names()[model_type]))
    dtype = tiny_dtype(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(model_type))
        model = model_class._from_config(config, dtype=dtype)
    _cast_as_loaded(model, dtype)
    _perturb(model, _seed(model_type))
    return model.eval()


def make_tiny(model_type: str, folder: Path) -> Path:
    """Write the architecture's tiny checkpoint into a folder, and return the folder.

    About every tenth checkpoint is split into several files.
    """
    model = tiny_model(model_type)
    if _seed(model_type) % 10 == 0:
        model.save_pretrained(folder, max_shard_size="100KB")
    else:
        model.save_pretrained(folder)
    if model_type in _TEXT_WITH_COMPOSITE_CONFIG:
        config = tiny_config(model_type)
        config.dtype = tiny_dtype(model_type)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    return folder


def example_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return inputs for a forward pass: eight tokens, none of which is a special one.

    Architectures that read more than tokens, if it is given, get that as well, so that the weights concerned matter:
    the output of an encoder, and what else is known about each token.
    """
    generator = torch.Generator().manual_seed(0)
    accepted = inspect.signature(model.forward).parameters
    inputs = {"input_ids": torch.randint(3, 100, (1, 8), generator=generator)}
    crossing = any(name.endswith(("encoder_attn", "cross_attn")) for name, _ in model.named_modules())
    for name in ("encoder_hidden_states", "encoder_outputs", "cross_attention_states"):
        if crossing and name in accepted:
            inputs[name] = torch.randn(1, 5, _SIZES["hidden_size"], generator=generator).to(model.dtype)
    for name in ("input_shape_ids", "input_pronunciation_ids"):
        if name in accepted:
            inputs[name] = torch.randint(3, 60, (1, 8), generator=generator)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def logits_of(model: Any) -> torch.Tensor:
    """Return the logits that a model computes for the example inputs."""
    arguments: dict[str, Any] = {**example_inputs(model)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    model.eval()
    with torch.no_grad():
        logits = model(**arguments).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def _saved_tensors(model_type: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of the saved model under the names that they have in the causal LM."""
    saved: dict[str, torch.Tensor] = tiny_model(model_type).state_dict()
    if model_type in _COMPOSITE:
        of_text = {name.replace("language_model.", ""): name for name in saved if "language_model." in name}
        saved = {name: saved[of_text.get(name, name)] for name in names if of_text.get(name, name) in saved}
    return saved


def _problems(model_type: str, folder: Path) -> list[str]:
    """Load a tiny checkpoint with transformers, and return what differs from the model that was saved."""
    from transformers import AutoModelForCausalLM

    problems = []
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    for kind, names in info.items():
        if names and not (kind == "unexpected_keys" and model_type in _COMPOSITE):
            problems.append(f"{kind}: {list(names)[:3]}")
    if model.dtype != tiny_dtype(model_type):
        problems.append(f"loaded as {model.dtype}")

    loaded = model.state_dict()
    saved = _saved_tensors(model_type, list(loaded))
    if loaded.keys() != saved.keys():
        problems.append(f"other tensors: {sorted(loaded.keys() ^ saved.keys())[:3]}")
    for name in sorted(loaded.keys() & saved.keys()):
        if loaded[name].dtype != saved[name].dtype:
            problems.append(f"{name} is {loaded[name].dtype}, was {saved[name].dtype}")
        elif not torch.equal(loaded[name], saved[name]):
            problems.append(f"{name} differs")

    logits = logits_of(model)
    if not torch.isfinite(logits).all():
        problems.append("logits are not finite")
    if not torch.equal(logits, logits_of(model)):
        problems.append("logits differ between calls")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the tiny checkpoints, check each, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write one checkpoint folder per model into")
    parser.add_argument("--only", default="", help="model types to build, separated by commas")
    options = parser.parse_args(arguments)
    only = set(options.only.split(",")) - {""}

    from transformers.utils import logging

    logging.disable_progress_bar()
    chosen = [tiny for tiny in causal_lm_architectures() if not only or tiny.model_type in only]
    good, building = 0, 0.0
    for tiny in chosen:
        folder = options.out / tiny.model_type
        seconds, problems = 0.0, []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                start = time.perf_counter()
                make_tiny(tiny.model_type, folder)
                seconds = time.perf_counter() - start
                problems = _problems(tiny.model_type, folder)
            except Exception as error:  # noqa: BLE001 - whatever it is goes into the table
                problems.append(f"{type(error).__name__}: {error}")
                traceback.print_exc()
        building += seconds
        files = list(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        if size >= 3_000_000:
            problems.append("too large")
        good += not problems
        problems += sorted({f"warning: {entry.category.__name__}: {entry.message}" for entry in caught})
        dtype = str(tiny_dtype(tiny.model_type)).removeprefix("torch.")
        numbers = f"{dtype:9} {size:9} bytes {len(files):3} file(s) {seconds:5.2f} s"
        print(f"{tiny.model_type:26} {tiny.class_name:46} {numbers}  {'; '.join(problems) or 'ok'}", flush=True)
    print(f"{good} of {len(chosen)} are as they should be; {building:.0f} s of building")
    print(f"{len(UNMAKEABLE)} cannot be made: {', '.join(sorted(UNMAKEABLE))}")
    return 0 if good == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
