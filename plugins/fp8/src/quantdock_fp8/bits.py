"""Modules whose tensors are bits to those who convert, copy or pickle them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_UNPICKLABLE = (torch.float8_e4m3fn, torch.float8_e8m0fnu)
"""torch can't pickle storages of these (2.13), so they go as their bytes."""


class Bits(nn.Module):
    """Part of a module that keeps codes and scales: conversions to another dtype pass them by."""

    def _bits(self) -> list[str]:
        """Names of the parameters and buffers that are bits."""
        raise NotImplementedError

    def _converted(self, fn: Callable[[Tensor], Tensor]) -> None:
        """The rest of the module has been converted with ``fn``."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the module. What is bits is bits to ``fn``, too."""
        kept = [tensor for name in self._bits() for tensor in [self._slot(name)] if tensor is not None]

        def move(tensor: Tensor) -> Tensor:
            if not any(tensor is part for part in kept):
                return fn(tensor)
            return fn(tensor.view(_BITS[tensor.dtype.itemsize])).view(tensor.dtype)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self._converted(fn)
        return self

    def _slot(self, name: str) -> Tensor | None:
        found = self._parameters.get(name)
        return self._buffers.get(name) if found is None else found

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_parameters": self._parameters.copy(), "_buffers": self._buffers.copy()}
        state["_as_bytes"] = {}
        for kind in ("_parameters", "_buffers"):
            for name, tensor in state[kind].items():
                if tensor is not None and tensor.dtype in _UNPICKLABLE:
                    state["_as_bytes"][name] = tensor.dtype
                    state[kind][name] = tensor.detach().view(torch.uint8)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        written = state.pop("_as_bytes")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, dtype in written.items():
            if name in self._buffers:
                self._buffers[name] = self.get_buffer(name).view(dtype)
            else:
                plain = self._parameters[name]
                assert plain is not None
                self._parameters[name] = nn.Parameter(plain.view(dtype), requires_grad=False)
