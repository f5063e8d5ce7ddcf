"""The model that the suite loads: small, and with one of everything that a quantizer meets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCABULARY = 32
EXPERTS = 3
EXTRA = "blocks.1.extra"
"""The linear layer of any shape."""


class Experts(nn.Module):
    """A parameter of rank 3, ``[expert, out, in]``, as fused mixture-of-experts layers have them."""

    def __init__(self, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, features, features, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,eoi->...o", x, self.weight).div_(EXPERTS)


class Block(nn.Module):
    """Linear layers with and without a bias, a norm, experts."""

    def __init__(self, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features, dtype=dtype)
        self.up = nn.Linear(features, 2 * features, dtype=dtype)
        self.down = nn.Linear(2 * features, features, bias=False, dtype=dtype)
        self.experts = Experts(features, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        return torch.as_tensor(x + self.down(nn.functional.gelu(self.up(normed))) + self.experts(normed))


class SmallModel(nn.Module):
    """Embedding, two blocks, norm, and a head that is tied to the embedding; buffers that are stored and that aren't.

    A factory for ``quantdock.load(..., model=SmallModel)``.

    Args:
        config: ``{"features": int, "dtype": str}``, and ``"linear"`` (``[in, out]``) for one more layer of any shape
            in the last block, which the forward pass doesn't use.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        features, dtype = config["features"], getattr(torch, config["dtype"])
        self.embed = nn.Embedding(VOCABULARY, features, dtype=dtype)
        self.blocks = nn.ModuleList([Block(features, dtype) for _ in range(2)])
        self.norm = nn.LayerNorm(features, dtype=dtype)
        self.head = nn.Linear(features, VOCABULARY, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        if "linear" in config:
            inputs, outputs = config["linear"]
            self.blocks[-1].extra = nn.Linear(inputs, outputs, dtype=dtype)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("positions", torch.arange(16, dtype=torch.float32) / 16, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.get_buffer("positions")[: ids.shape[-1], None].to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return torch.as_tensor(self.head(self.norm(x)))


def example_ids() -> torch.Tensor:
    """Input of the model, ``[batch, position]``."""
    return torch.arange(24).reshape(2, 12) * 7 % VOCABULARY


def write_checkpoint(
    folder: Path,
    *,
    features: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    linear: tuple[int, int] | None = None,
) -> SmallModel:
    """Write a checkpoint of the small model, and return the model that it was written from.

    Args:
        folder: made if it doesn't exist.
        features: width of the model; its linear layers are ``[2 * features, features]`` and the reverse.
        dtype: of its parameters.
        seed: of their values.
        linear: ``[in, out]`` of one more layer, ``EXTRA``.
    """
    from safetensors.torch import save_file

    config: dict[str, Any] = {"model_type": "quantdock-small", "features": features, "dtype": str(dtype)[6:]}
    if linear is not None:
        config["linear"] = list(linear)
    model = SmallModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(values * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(0.5 * values + ("norm.weight" in name))
        model.get_buffer("steps").fill_(1000 + seed)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return model
