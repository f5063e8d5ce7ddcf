"""Small mixtures of experts, and checkpoints of them with every weight in GPTQ form, packed here bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, INNER, EXPERTS = 128, 64, 4
FAMILIES = ("qwen3_moe", "mixtral")
PARTS = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


def model_of(family: str, *, experts: int = EXPERTS, inner: int = INNER, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A small mixture of experts, with weights large enough to make a difference."""
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.auto import AutoModelForCausalLM

    common: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "head_dim": 32,
    }
    if family == "mixtral":
        config: Any = MixtralConfig(**common, num_local_experts=experts, intermediate_size=inner)
    else:
        config = Qwen3MoeConfig(**common, num_experts=experts, moe_intermediate_size=inner)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("gate.weight", "norm.weight")):
                parameter.mul_(4)
    return model.eval()


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to store weights."""

    bits: int = 4
    group_size: int = 32
    sym: bool = True
    less_one: bool = True
    scale_dtype: torch.dtype = torch.float16
    index: str = "in order"
    """Or ``anywhere``, of each weight its own, or ``none``."""

    def config(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.index == "anywhere",
            "checkpoint_format": "gptq" if self.less_one else "gptq_v2",
        }


FORMS = {
    "4 bits": Form(),
    "act order": Form(index="anywhere", sym=False, group_size=64),
    "gptq_v2": Form(sym=False, less_one=False),
    "8 bits": Form(bits=8, group_size=-1),
    "3 bits": Form(bits=3, sym=False),
    "no index, other scales": Form(index="none", scale_dtype=torch.bfloat16),
}


def stored(weight: Tensor, form: Form, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a weight ``[out, in]``, and in float32 what they stand for."""
    outputs, inputs = weight.shape
    size, top = inputs if form.group_size == -1 else form.group_size, 2**form.bits - 1
    index = torch.arange(inputs) // size
    if form.index == "anywhere":
        index = index[torch.randperm(inputs, generator=generator)]
    groups = inputs // size
    scales = torch.stack([weight[:, index == group].float().abs().amax(1) * 2 / top for group in range(groups)])
    scales = scales.to(form.scale_dtype)
    zeros = torch.full((groups, outputs), 2 ** (form.bits - 1))
    if not form.sym:
        zeros = torch.randint(1, top, (groups, outputs), generator=generator)
    codes = (weight.t().float() / scales[index].float()).round().add(zeros[index]).clamp(0, top).long()
    value = (codes - zeros[index]) * scales[index].float()
    tensors = {
        "qweight": words(codes, form.bits),
        "qzeros": words((zeros - int(form.less_one)).t(), form.bits).t().contiguous(),
        "scales": scales,
    }
    if form.index != "none":
        tensors["g_idx"] = index.int()
    return tensors, value.t()


def words(codes: Tensor, bits: int) -> Tensor:
    """int64 ``[codes, streams]`` to int32 words, bit by bit."""
    places = codes[:, None] >> torch.arange(bits)[:, None] & 1
    stream = places.reshape(-1, 32, codes.shape[1])
    values = (stream << torch.arange(32)[:, None]).sum(1)
    return torch.where(values >= 2**31, values - 2**32, values).int()


def is_quantized(name: str) -> bool:
    return name.endswith(".weight") and ("experts." in name or "self_attn." in name) and "norm" not in name


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def write(folder: Path, model: Any, form: Form, change: Change = lambda config, tensors: None) -> dict[str, Tensor]:
    """Store a model with its weights in GPTQ form, and return what they stand for, in the model's dtype."""
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    tensors, plain = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if is_quantized(name):
            parts, value = stored(tensor, form, generator)
            tensors |= {name.removesuffix("weight") + part: made for part, made in parts.items()}
            plain[name] = value.to(tensor.dtype)
        else:
            tensors[name] = plain[name] = tensor
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = form.config()
    change(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return plain


def reference(folder: Path, model: Any, plain: dict[str, Tensor]) -> Any:
    """transformers' model with weights in full precision."""
    from transformers.models.auto import AutoModelForCausalLM

    model.save_pretrained(folder)
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(torch.arange(24).view(2, 12)).logits).float()


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )


def same_files(one: Path, other: Path) -> bool:
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    return before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
