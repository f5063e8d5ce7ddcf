"""Checkpoints in GPTQ's and AWQ's formats, of random codes: any word of 32 bits is eight codes of 4 bits."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.presets import PRESETS, Llama

if TYPE_CHECKING:
    import torch

GROUP = 128
"""Inputs that share a scale."""
_STD = 0.02
"""Of the weights: scales are that of a code's distance from the zero point, 4.6, less."""
_ZERO = 0x77777777
"""Eight zero points of 7; GPTQ stores them less one."""
_PARTS = ("self_attn", "mlp")

SHAPES: Mapping[str, Llama] = {
    "wide": Llama(hidden=4096, layers=2, intermediate=11_008, heads=32, kv_heads=32, vocabulary=2048, shards=1),
    "tiny": PRESETS["tiny"],  # type: ignore[dict-item]
}
"""``wide``: layers of a Llama of 7 billion parameters, two of its 32, and a head that hardly counts."""

CONFIGS: Mapping[str, Mapping[str, object]] = {
    "gptq": {"quant_method": "gptq", "desc_act": False, "sym": True, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "zero_point": True, "version": "gemm"},
}
"""Method -> its part of ``config.json``, beside bits and groups."""


def make(method: str, shape: str, cache: Path) -> Path:
    """The folder of a checkpoint in ``cache``, in float16 as such checkpoints are; written now if it isn't there."""
    folder = cache / f"packed-{method}-{shape}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{folder.name}-") as aside:
            whole = Path(aside, "whole")
            whole.mkdir()
            _write(method, SHAPES[shape], whole)
            whole.rename(folder)
    return folder


def _write(method: str, shape: Llama, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, sizes in shape.shapes():
        if len(sizes) == 1:
            tensors[name] = torch.ones(sizes, dtype=torch.float16)
        elif any(f".{part}." in name for part in _PARTS):
            parts = _linear(method, sizes[0], sizes[1], generator)
            tensors |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
        else:
            tensors[name] = torch.randn(sizes, generator=generator).mul_(_STD).half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"bits": 4, "group_size": GROUP, **CONFIGS[method]}
    config = shape.config() | {"dtype": "float16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _linear(method: str, outputs: int, inputs: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    import torch

    groups = inputs // GROUP
    shape = (inputs // 8, outputs) if method == "gptq" else (inputs, outputs // 8)
    words = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    scales = torch.rand(groups, outputs, generator=generator).add_(1.5).mul_(_STD / 2 / 4.6)
    result = {
        "qweight": words,
        "qzeros": torch.full((groups, outputs // 8), _ZERO, dtype=torch.int32),
        "scales": scales.half(),
    }
    if method == "gptq":
        result["g_idx"] = torch.arange(inputs, dtype=torch.int32) // GROUP
    return result
