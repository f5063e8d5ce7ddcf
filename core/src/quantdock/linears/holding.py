"""Modules that keep a parameter ``[experts, outputs, inputs]`` quantized, and their own code.

What the code finds under the parameter's name is a ``Stack``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from quantdock.linears.stack import Matrices, Stack
from quantdock.tensors import TensorSpec

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Reading(Protocol):
    """How a parameter's stored tensors are read; goes with its module where that is copied or pickled."""

    def matrices(self, tensors: Mapping[str, Tensor]) -> Matrices:
        """What they stand for, by the names they were given to ``hold``. Cheap: nothing is decoded yet."""


@dataclass(frozen=True, kw_only=True)
class _Held:
    names: tuple[str, ...]
    reading: Reading


class HoldingModule(nn.Module):
    """What is added to the class of a module by ``hold``. Conversions to another dtype pass what is stored by."""

    _held_plain: type
    _held: dict[str, _Held]
    _held_dtype: torch.dtype

    def _held_stack(self, leaf: str) -> Stack:
        held = self._held[leaf]
        matrices = held.reading.matrices({name: self._slot(name) for name in held.names})
        return Stack(matrices, self._held_dtype, matrices.device)

    def _slot(self, name: str) -> Tensor:
        found = self._buffers.get(name, self._parameters.get(name))
        assert found is not None
        return found.detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the module. What is stored is bits to ``fn``."""
        names = [name for held in self._held.values() for name in held.names]
        kept = {id(tensor) for name in names for tensor in (self._parameters.get(name), self._buffers.get(name))}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in kept:
                return fn(tensor)
            return fn(tensor.view(_BITS[tensor.dtype.itemsize])).view(tensor.dtype)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self._held_dtype = fn(torch.empty(0, dtype=self._held_dtype)).dtype
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _again, (self._held_plain, tuple(self._held)), self.__getstate__()  # type: ignore[no-untyped-call]


def hold(
    module: nn.Module, leaf: str, components: Mapping[str, TensorSpec], reading: Reading, dtype: torch.dtype
) -> None:
    """Let a module keep one of its parameters quantized.

    Args:
        module: on the meta device; its class becomes one that is derived from its own.
        leaf: name of the parameter.
        components: the stored tensors. One under the parameter's own name stays a parameter, the others become buffers.
        reading: what is made of them.
        dtype: what the parameter passes for.
    """
    if not isinstance(module, HoldingModule):
        module._held, module._held_dtype = {}, dtype  # type: ignore[assignment]
    plain: type = module._held_plain if isinstance(module, HoldingModule) else type(module)
    held: dict[str, _Held] = module._held  # type: ignore[assignment]
    module._parameters[leaf] = None  # which keeps its place in the module's order
    for name, spec in components.items():
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        if name == leaf:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module.register_buffer(name, tensor)
    held[leaf] = _Held(names=tuple(components), reading=reading)
    module.__class__ = _class(plain, tuple(held))


def let_go(module: nn.Module, leaf: str) -> None:
    """Undo ``hold``; the parameter is left on the meta device, its values to be given."""
    assert isinstance(module, HoldingModule)
    stack = module._held_stack(leaf)
    for name in module._held.pop(leaf).names:
        module._buffers.pop(name, None)
    plain, left = module._held_plain, tuple(module._held)
    module.__class__ = _class(plain, left) if left else plain
    module._parameters[leaf] = nn.Parameter(torch.empty(stack.shape, dtype=stack.dtype, device="meta"))
    if not left:
        del module._held, module._held_dtype


@functools.cache
def _class(plain: type, leaves: tuple[str, ...]) -> type[Any]:
    found: dict[str, Any] = {leaf: property(functools.partial(_stack, leaf)) for leaf in leaves}
    found |= {"_held_plain": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(f"Quantized{plain.__name__}", (HoldingModule, plain), found)


def _stack(leaf: str, module: HoldingModule) -> Stack:
    return module._held_stack(leaf)


def _again(plain: type, leaves: tuple[str, ...]) -> Any:
    kind: Any = _class(plain, leaves)
    return kind.__new__(kind)
