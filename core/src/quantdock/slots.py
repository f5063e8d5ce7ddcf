"""What a model holds, module by module: the walks that ``nn.Module`` offers, in one pass.

``state_dict``, ``named_parameters`` and the like cost tens of microseconds a module, and planning needs several of
them; a model can have a hundred thousand modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from quantdock.tensors import qualified


class Slot(NamedTuple):
    """One entry of a state dict."""

    name: str
    tensor: torch.Tensor
    module: nn.Module
    """The one that owns it."""


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its paths, parents before children, as ``named_modules(remove_duplicate=False)``."""
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        yield path, module
        stack += [
            (qualified(path, leaf), child) for leaf, child in reversed(module._modules.items()) if child is not None
        ]


def slots(model: nn.Module) -> list[Slot]:
    """The tensors of ``model.state_dict(keep_vars=True)``, in its order; a module's extra state is no tensor."""
    modules = list(walk(model))
    if all(_is_plain(module) for _, module in modules):
        return [
            Slot(qualified(path, leaf), tensor, module)
            for path, module in modules
            for leaf, tensor in _own(module).items()
        ]
    by_path = dict(modules)
    return [
        Slot(name, tensor, by_path.get(path) or model.get_submodule(path))
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
        for path in [name.rpartition(".")[0]]
    ]


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every buffer under each of its names, persistent or not."""
    return {
        qualified(path, leaf): buffer
        for path, module in walk(model)
        for leaf, buffer in module._buffers.items()
        if buffer is not None
    }


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    hidden = module._non_persistent_buffers_set
    kept: dict[str, torch.Tensor] = {leaf: tensor for leaf, tensor in module._parameters.items() if tensor is not None}
    for leaf, buffer in module._buffers.items():
        if buffer is not None and leaf not in hidden:
            kept[leaf] = buffer
    return kept


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's part of a state dict is its own tensors by their own names."""
    kind = type(module)
    return (
        kind.state_dict is nn.Module.state_dict
        and kind._save_to_state_dict is nn.Module._save_to_state_dict
        and kind.get_extra_state is nn.Module.get_extra_state
        and not module._state_dict_hooks
        and not module._state_dict_pre_hooks
        and not {"state_dict", "_save_to_state_dict"} & module.__dict__.keys()
    )
