"""Modules that keep the weights of a layer's experts in floats of 8 or 4 bits, in the place of a parameter
``[experts, rows, columns]``.

A module keeps its own code. What it finds under the parameter's name is a ``Stack``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantdock import TensorSpec
from quantdock_fp8.bits import Bits
from quantdock_fp8.stack import Stack
from quantdock_fp8.weight import Coding, Weight


@dataclass(frozen=True, kw_only=True)
class Held:
    """One parameter of a module that is kept so."""

    names: tuple[str, ...]
    """Of its components."""
    coding: Coding


class Fp8Experts(Bits):
    """What is added to the class of a module that has such parameters; made by ``hold``, undone by ``let_go``."""

    _fp8_plain: type
    _fp8_held: dict[str, Held]
    _fp8_dtype: torch.dtype

    def _fp8_stack(self, leaf: str) -> Stack:
        held = self._fp8_held[leaf]
        found = {name: self._slot(name) for name in held.names}
        stored = {name: tensor.detach() for name, tensor in found.items() if tensor is not None}
        return Stack(Weight.of(stored, held.coding), self._fp8_dtype, swapped=held.coding.swapped)

    def _bits(self) -> list[str]:
        return [name for held in self._fp8_held.values() for name in held.names]

    def _converted(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._fp8_dtype = fn(torch.empty(0, dtype=self._fp8_dtype)).dtype

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _again, (self._fp8_plain, tuple(self._fp8_held)), self.__getstate__()


def hold(
    module: nn.Module, leaf: str, components: Mapping[str, TensorSpec], coding: Coding, dtype: torch.dtype
) -> None:
    """Let a module keep one of its parameters in floats of 8 or 4 bits.

    Args:
        module: on the meta device; its class becomes one that is derived from its own.
        leaf: name of the parameter.
        components: the stored tensors; what has the parameter's own name stays a parameter, the others become buffers.
        coding: which of them is what.
        dtype: what the parameter passes for.
    """
    if not isinstance(module, Fp8Experts):
        module._fp8_held, module._fp8_dtype = {}, dtype  # type: ignore[assignment]
    plain: type = module._fp8_plain if isinstance(module, Fp8Experts) else type(module)
    held: dict[str, Held] = module._fp8_held  # type: ignore[assignment]
    module._parameters[leaf] = None  # which keeps its place among the others
    for name, spec in components.items():
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        if name == leaf:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module.register_buffer(name, tensor)
    held[leaf] = Held(names=tuple(components), coding=coding)
    module.__class__ = _class(plain, tuple(held))


def let_go(module: nn.Module, leaf: str) -> None:
    """Undo ``hold``; the parameter is left on the meta device."""
    assert isinstance(module, Fp8Experts)
    held = module._fp8_held.pop(leaf)
    for name in held.names:
        module._buffers.pop(name, None)
    plain, left = module._fp8_plain, tuple(module._fp8_held)
    module.__class__ = _class(plain, left) if left else plain
    if not left:
        del module._fp8_held, module._fp8_dtype


@functools.cache
def _class(plain: type, leaves: tuple[str, ...]) -> type[Any]:
    found: dict[str, Any] = {leaf: property(functools.partial(_stack, leaf)) for leaf in leaves}
    found |= {"_fp8_plain": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(f"Fp8{plain.__name__}", (Fp8Experts, plain), found)


def _stack(leaf: str, module: Fp8Experts) -> Stack:
    return module._fp8_stack(leaf)


def _again(plain: type, leaves: tuple[str, ...]) -> Any:
    kind: Any = _class(plain, leaves)
    return kind.__new__(kind)
