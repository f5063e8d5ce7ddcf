"""Tensors that are stored quantized and pass for tensors in full precision: they decode what somebody gets to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from quantdock.errors import UnsupportedError


class Matrix(Protocol):
    """A matrix that is stored quantized, ``[outputs, inputs]``. Its methods may make new tensors for each call."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def decode(self, dtype: torch.dtype) -> Tensor:
        """``[outputs, inputs]`` in ``dtype``."""

    def multiply(self, x: Tensor, *, plainly: bool = False) -> Tensor:
        """``nn.functional.linear``: ``[..., inputs]`` to ``[..., outputs]`` in the dtype of ``x``.

        Args:
            x: activations.
            plainly: the same way for any number of rows, with and without gradients: in training, what is computed
                again on the way back has to come out as it did before.
        """


class Matrices(Protocol):
    """Matrices of one shape, such as those of a layer's experts."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``[experts, outputs, inputs]``."""

    @property
    def device(self) -> torch.device: ...

    def matrix(self, index: int) -> Matrix:
        """
        Raises:
            IndexError: there is no such one.
        """


class Stack(torch.Tensor):
    """Matrices, ``[experts, outputs, inputs]``, or one of them, that look like a tensor in full precision.

    Indexing gives one matrix, and multiplying with it decodes a part at a time. Grouped and batched multiplications do
    so for one matrix after the other. Any other function gets the decoded tensor, whole; none may change it.
    """

    stored: Matrices | Matrix
    swapped: bool
    plainly: bool

    @staticmethod
    def __new__(
        cls,
        stored: Matrices | Matrix,
        dtype: torch.dtype,
        device: torch.device,
        *,
        swapped: bool = False,
        plainly: bool = False,
    ) -> Stack:
        """
        Args:
            stored: what it decodes.
            dtype: of what this passes for.
            device: where ``stored`` is.
            swapped: whether the last two dimensions are swapped.
            plainly: see ``Matrix.multiply``.
        """
        shape = stored.shape
        seen = (*shape[:-2], shape[-1], shape[-2]) if swapped else shape
        made: Stack = torch.Tensor._make_wrapper_subclass(cls, seen, dtype=dtype, device=device)
        made.stored, made.swapped, made.plainly = stored, swapped, plainly
        made._is_param = True  # what nn.Parameter's isinstance looks at
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _SAME:
            return args[0]
        name = getattr(func, "__name__", "")
        first = next(iter((*args, *(kwargs or {}).values())), None)
        if isinstance(first, Stack) and _IN_PLACE.fullmatch(name):
            raise UnsupportedError(
                f"{name} on weights of experts that are kept quantized: they can't be changed in place; "
                "quantdock.dequantize(model) first"
            )
        known = _KNOWN.get(name)
        if known is not None:
            result = known(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*_decoded(args), **_decoded(dict(kwargs or {})))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_decoded(args), **_decoded(kwargs or {}))

    def expert(self, index: int) -> Stack:
        """One of the matrices."""
        stored: Any = self.stored
        return Stack(stored.matrix(index), self.dtype, self.device, swapped=self.swapped, plainly=self.plainly)

    def transposed(self) -> Stack:
        """The same with its last two dimensions swapped."""
        return Stack(self.stored, self.dtype, self.device, swapped=not self.swapped, plainly=self.plainly)

    def decode(self) -> Tensor:
        """What this passes for, as a plain tensor."""
        stored: Any = self.stored
        plain: Tensor = stored.decode(self.dtype) if self.dim() == 2 else dequantize_all(stored, self.dtype)
        return plain.mT if self.swapped else plain

    def times(self, input: Tensor) -> Tensor:
        """``nn.functional.linear`` with one matrix, which isn't swapped."""
        stored: Any = self.stored
        result: Tensor = stored.multiply(input, plainly=self.plainly)
        return result


def dequantize_all(matrices: Matrices, dtype: torch.dtype) -> Tensor:
    """All of them, ``[experts, outputs, inputs]`` in ``dtype``; one decoded after the other."""
    out = torch.empty(matrices.shape, dtype=dtype, device=matrices.device)
    for index, into in enumerate(out):
        into.copy_(matrices.matrix(index).decode(dtype))
    return out


def _decoded(arguments: Any) -> Any:
    return tree_map_only(Stack, Stack.decode, arguments)


_ABOUT = frozenset(
    {
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda")
    }
    | {getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "__len__")}
)
"""What can be answered without decoding anything."""

_SAME = frozenset({Tensor.data.__get__, Tensor.detach})  # type: ignore[attr-defined]

_IN_PLACE = re.compile(r"__(setitem|set|i(add|sub|mul|truediv|pow|and|or|xor))__|(?!requires_grad_|_)\w*[^_]_")
"""Names of functions that would change what isn't there."""


def _item(stack: Any, index: Any) -> Any:
    if not isinstance(stack, Stack) or stack.dim() != 3:
        return NotImplemented
    if isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64):
        if index.dim() == 1:  # of batched multiplications: one matrix per row of the input
            matrices = {number: stack.expert(number).decode() for number in set(index.tolist())}
            return torch.stack([matrices[number] for number in index.tolist()]) if matrices else NotImplemented
        index = index.item() if index.dim() == 0 else index
    return stack.expert(index) if type(index) is int else NotImplemented


def _swap(stack: Any, first: int, second: int) -> Any:
    last_two = isinstance(stack, Stack) and {first % stack.dim(), second % stack.dim()} == {
        stack.dim() - 2,
        stack.dim() - 1,
    }
    return stack.transposed() if last_two else NotImplemented


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, Stack) or not isinstance(weight, Stack) or weight.dim() != 2 or weight.swapped:
        return NotImplemented
    found = weight.times(input)
    return found if bias is None else found + bias.to(found.dtype)  # which autocast may have chosen


def _matmul(input: Any, other: Any) -> Any:
    if isinstance(input, Stack) or not isinstance(other, Stack):
        return NotImplemented
    if other.dim() == 2:
        return other.times(input) if other.swapped else NotImplemented
    return _bmm(input, other) if input.dim() == 3 else NotImplemented


def _bmm(input: Any, mat2: Any) -> Any:
    if isinstance(input, Stack) or not isinstance(mat2, Stack) or mat2.dim() != 3 or len(input) != len(mat2):
        return NotImplemented
    return torch.stack([torch.matmul(part, mat2.expert(number)) for number, part in enumerate(input)])


def _grouped(input: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows up to ``offs[0]`` times the first matrix, those up to ``offs[1]`` times the second, and so on; what is
    beyond the last one is zero."""
    if isinstance(input, Stack) or not isinstance(weight, Stack) or offs is None or weight.dim() != 3:
        return NotImplemented
    found, start = [], 0
    for number, stop in enumerate(offs.tolist()):
        if stop > start:
            part = torch.matmul(input[start:stop], weight.expert(number))
            found.append(part if bias is None else part + bias[number])
        start = max(start, stop)
    found.append(input.new_zeros(len(input) - start, weight.shape[-1]))
    return torch.cat(found).to(out_dtype or input.dtype)


_KNOWN: dict[str, Callable[..., Any]] = {
    "__getitem__": _item,
    "transpose": _swap,
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "bmm": _bmm,
    "_grouped_mm": _grouped,
    "grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
}
"""Functions that decode what they need and no more, by name: ``nn.functional``, ``torch`` and ``Tensor`` have their own
of each."""
