"""Helpers of the bitsandbytes tests; they need no checkpoint and no core beyond its public names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import nn

from quantdock import Parameter, TensorSpec
from quantdock_bnb.quantizer import BitsAndBytesQuantizer


@pytest.fixture(autouse=True)
def _quiet_bitsandbytes() -> Iterator[None]:
    """It logs a warning in each 8-bit forward that isn't in float16."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


class Transposed(nn.Module):
    """A linear layer that stores its weight ``[in, out]``, like GPT-2's."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features).to(dtype))
        self.bias = nn.Parameter(torch.randn(out_features).to(dtype))


def parameters_of(model: nn.Module) -> dict[str, Parameter]:
    """Every parameter of a model, as the core would describe it."""
    roles = {nn.Linear: "linear", Transposed: "linear-transposed", nn.Embedding: "embedding"}
    result = {}
    for name, value in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        role = roles.get(type(module), "other") if name.endswith("weight") else "other"
        result[name] = Parameter(
            name=name,
            spec=TensorSpec.of(value),
            module_type=type(module),
            role=role,  # type: ignore[arg-type]
        )
    return result


Load = Callable[[BitsAndBytesQuantizer, nn.Module], nn.Module]


@pytest.fixture
def load() -> Load:
    """Do to a model on CPU what the core does while loading it: swap, quantize, install, finish."""

    def run(quantizer: BitsAndBytesQuantizer, model: nn.Module) -> nn.Module:
        values = {name: value.detach() for name, value in model.named_parameters()}
        described = parameters_of(model)
        quantizer.parameters = {n: p for n, p in described.items() if quantizer.refusal(p) is None}
        skeleton = model.to("meta")
        quantizer.preprocess_model(skeleton)
        for name, parameter in described.items():
            if name in quantizer.parameters:
                components = quantizer.quantize_param(parameter, values[name])
                assert components is not None
                assert quantizer.layout(parameter).fits({n: TensorSpec.of(t) for n, t in components.items()})
                quantizer.install(skeleton, parameter, components)
            else:
                module = skeleton.get_submodule(parameter.module)
                module.register_parameter(parameter.leaf, nn.Parameter(values[name]))
        quantizer.postprocess_model(skeleton)
        return skeleton.eval()

    return run


def held_bytes(module: nn.Module) -> int:
    """Bytes of the different tensors that a layer's weight is made of, wherever bitsandbytes keeps them."""
    weight = module.weight
    found = [weight.data, *_tensors(vars(weight)), *_tensors(vars(getattr(module, "state", object)))]
    state = getattr(weight, "quant_state", None)
    for part in (state, getattr(state, "state2", None), getattr(module, "stored_state", None)):
        found += _tensors(vars(part)) if part is not None else []
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in found}.values())


def _tensors(attributes: Mapping[str, object]) -> list[torch.Tensor]:
    return [value for value in attributes.values() if isinstance(value, torch.Tensor)]


@pytest.fixture
def tools() -> type:
    """The helpers above, for test files, which can't import each other."""

    class Tools:
        Transposed = Transposed
        parameters_of = staticmethod(parameters_of)
        held_bytes = staticmethod(held_bytes)

    return Tools
