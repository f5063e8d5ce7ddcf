"""A plain module and its checkpoint: what core does without any plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


class Plain(nn.Module):
    """An embedding, two layers with bias, a norm, a head tied to the embedding, and buffers of both kinds."""

    def __init__(self, config: Mapping[str, object] | None = None) -> None:
        super().__init__()
        width = int(str((config or {}).get("width", 32)))
        self.embed = nn.Embedding(48, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 48, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.arange(1, width + 1) / width, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden)) * self.scale
        return self.head(self.norm(hidden))


IDS = torch.arange(12).reshape(2, 6)


def write_plain(folder: Path, *, dtype: torch.dtype = torch.float32, drop: str = "head.weight") -> Plain:
    """Write a checkpoint of a seeded ``Plain`` without the tensor ``drop``; returns the model it was made from."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Plain()
    model.steps += 5
    model.to(dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != drop}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"width": 32}))
    return model.eval()
