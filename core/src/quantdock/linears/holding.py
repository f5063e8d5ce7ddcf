"""Modules that keep a parameter ``[experts, outputs, inputs]``, or its transposes, quantized, and their own code.

What the code finds under the parameter's name is a ``Stack``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from quantdock.linears.paths import HasPaths, by_dtype
from quantdock.linears.stack import Matrices, Stack
from quantdock.tensors import TensorSpec

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class KeptMatrices(Matrices, Protocol):
    """Those of a module that keeps them."""

    def path(self, dtype: torch.dtype) -> str:
        """How activations of ``dtype`` are multiplied in evaluation, where they are now: one word."""


class Reading(Protocol):
    """How a parameter's stored tensors are read; goes with its module where that is copied or pickled."""

    def matrices(self, tensors: Mapping[str, Tensor]) -> KeptMatrices:
        """What they stand for, by the names they were given to ``hold``. Cheap: nothing is decoded yet."""


@dataclass(frozen=True, kw_only=True)
class _Held:
    names: tuple[str, ...]
    reading: Reading
    swapped: bool


class Bits(nn.Module):
    """Part of a module that keeps a weight quantized: what is stored is bits to those who convert, copy or pickle it.

    Comes before other base classes.
    """

    def _names_of_bits(self) -> Iterable[str]:
        """Of parameters and buffers; some may not be there."""
        raise NotImplementedError

    def _slot(self, name: str) -> Tensor | None:
        found = self._parameters.get(name)
        return self._buffers.get(name) if found is None else found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the module; conversions to another dtype pass what is bits by."""
        kept = [self._slot(name) for name in self._names_of_bits()]

        def move(tensor: Tensor) -> Tensor:
            if not any(tensor is part for part in kept):
                return fn(tensor)
            return fn(tensor.view(_BITS[tensor.dtype.itemsize])).view(tensor.dtype)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        slots = {kind: state[kind].copy() for kind in ("_parameters", "_buffers")}
        as_bytes = {}
        for tensors in slots.values():
            for name, tensor in tensors.items():
                if tensor is not None and _is_unpicklable(tensor.dtype):
                    as_bytes[name] = tensor.dtype
                    tensors[name] = tensor.detach().view(torch.uint8)
        return state | slots | {"_as_bytes": as_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = dict(state)
        as_bytes: dict[str, torch.dtype] = own.pop("_as_bytes")
        super().__setstate__(own)  # type: ignore[no-untyped-call]
        for name, dtype in as_bytes.items():
            plain = self._slot(name)
            assert plain is not None
            if name in self._buffers:
                self._buffers[name] = plain.view(dtype)
            else:
                self._parameters[name] = nn.Parameter(plain.view(dtype), requires_grad=False)


def _is_unpicklable(dtype: torch.dtype) -> bool:
    """Whether Python can't pickle torch's storages of it (2.13); bytes it can."""
    return dtype.is_floating_point and dtype.itemsize == 1


class HoldingModule(Bits):
    """What is added to the class of a module by ``hold``. Names are such that no module's code has them already."""

    _held_plain: type
    _held: dict[str, _Held]
    _held_dtype: torch.dtype

    def _held_path(self, dtype: torch.dtype) -> str:
        """Of each parameter that is kept quantized; those that have the same way say it once."""
        return " and ".join(dict.fromkeys(self._held_matrices(held).path(dtype) for held in self._held.values()))

    def _held_matrices(self, held: _Held) -> KeptMatrices:
        found = {name: self._slot(name) for name in held.names}
        return held.reading.matrices({name: slot.detach() for name, slot in found.items() if slot is not None})

    def _held_stack(self, leaf: str) -> Stack:
        held = self._held[leaf]
        matrices = self._held_matrices(held)
        # A compiler sees plain tensors, and makes its own kernels.
        plainly = self.training or torch.compiler.is_compiling()
        return Stack(matrices, self._held_dtype, matrices.device, swapped=held.swapped, plainly=plainly)

    def _names_of_bits(self) -> Iterable[str]:
        return (name for held in self._held.values() for name in held.names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._held_dtype = fn(torch.empty(0, dtype=self._held_dtype)).dtype
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _again, (self._held_plain, tuple(self._held)), self.__getstate__()


def hold(
    module: nn.Module,
    leaf: str,
    components: Mapping[str, TensorSpec],
    reading: Reading,
    dtype: torch.dtype,
    *,
    swapped: bool = False,
) -> None:
    """Let a module keep one of its parameters quantized.

    Args:
        module: on the meta device; its class becomes one that is derived from its own.
        leaf: name of the parameter.
        components: the stored tensors. One under the parameter's own name stays a parameter, the others become buffers.
        reading: what is made of them.
        dtype: what the parameter passes for.
        swapped: whether it is ``[experts, inputs, outputs]``, the transposes of what ``reading`` makes.
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
    held[leaf] = _Held(names=tuple(components), reading=reading, swapped=swapped)
    module.__class__ = _class(plain, tuple(held))


def paths_of(module: nn.Module) -> Mapping[str, str] | None:
    """How a module multiplies activations of each dtype that models are in, see ``HasPaths``; ``None`` for one that
    has no quantized weight, or says nothing of it."""
    if isinstance(module, HoldingModule):
        return by_dtype(module._held_path)
    return module.paths() if isinstance(module, HasPaths) else None


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
