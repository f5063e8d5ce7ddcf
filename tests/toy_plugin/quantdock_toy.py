"""Symmetric int8 weights, rounded to nearest, one scale per output row: a complete quantdock plugin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from quantdock import (
    Capabilities,
    ConfigError,
    Layout,
    Parameter,
    QuantizationConfig,
    Quantizer,
    TensorSpec,
    hookimpl,
    runtime,
)


def quantize(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a matrix; the largest value of each row becomes 127."""
    rows = tensor.float()
    scale = rows.abs().amax(dim=1).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (rows / scale[:, None]).round_().to(torch.int8), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (weight * scale[:, None]).to(dtype)


class ToyLinear(nn.Module):
    """A linear layer that keeps its weight as int8 and dequantizes it on the way."""

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty_like(linear.weight, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty_like(linear.weight[:, 0], dtype=torch.float32))
        self.bias, self.compute_dtype = linear.bias, compute_dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = dequantize(self.weight, self.weight_scale, self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return nn.functional.linear(x.to(self.compute_dtype), weight, bias).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class ToyConfig(QuantizationConfig):
    """The checkpoint's ``quantization_config``: bits per weight, and the dtype that layers compute in."""

    quant_method: ClassVar[str] = "toy"
    bits: int = 8
    compute_dtype: torch.dtype = runtime(torch.float32)

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise ConfigError(f"ToyConfig.bits is {self.bits!r}, expected 8")


INT8 = ToyConfig()


class ToyQuantizer(Quantizer[ToyConfig]):
    config_class = ToyConfig
    capabilities = Capabilities(dequantize=True)

    def refusal(self, parameter: Parameter) -> str | None:
        return None if parameter.role == "linear" else "not the weight of a linear layer"

    def layout(self, parameter: Parameter) -> Layout:
        codes = TensorSpec(dtype=torch.int8, shape=parameter.spec.shape)
        scales = TensorSpec(dtype=torch.float32, shape=parameter.spec.shape[:1])
        working = 8 * parameter.spec.numel  # the rows and their quotient, in float32
        return Layout(components={"weight": codes, "weight_scale": scales}, working_bytes=working)

    def companions(self) -> Mapping[str, str]:
        return {"weight_scale": "weight"}

    @hookimpl
    def preprocess_model(self, model: nn.Module) -> None:
        for path in {parameter.module for parameter in self.parameters.values()}:
            model.set_submodule(path, ToyLinear(model.get_submodule(path), self.config.compute_dtype))

    @hookimpl
    def quantize_param(self, parameter: Parameter, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        weight, scale = quantize(tensor)
        return {"weight": weight, "weight_scale": scale}

    def dequantize(self, components: Mapping[str, torch.Tensor], parameter: Parameter) -> torch.Tensor:
        return dequantize(components["weight"], components["weight_scale"], parameter.spec.dtype)
