"""Tensors in floats of 8 or 4 bits that pass for tensors in full precision; an expert is decoded when it is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from quantdock import UnsupportedError
from quantdock_fp8.weight import Weight


class Stack(torch.Tensor):
    """A matrix, or one per expert, that is stored in floats of 8 or 4 bits and looks like a tensor in full precision.

    Indexing gives the matrix of one expert, and multiplying decodes it a part at a time, as ``Fp8Linear`` does it.
    Grouped and batched multiplications do so for one expert after the other. Any other function gets the decoded
    tensor, whole.
    """

    stored: Weight
    swapped: bool

    @staticmethod
    def __new__(cls, stored: Weight, dtype: torch.dtype, *, swapped: bool = False) -> Stack:
        """
        Args:
            stored: ``[rows, columns]`` or ``[experts, rows, columns]``.
            dtype: of what this passes for.
            swapped: whether it passes for its transpose.
        """
        *outer, rows, columns = stored.shape
        shape = (*outer, columns, rows) if swapped else (*outer, rows, columns)
        made: Stack = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=stored.codes.device)
        made.stored, made.swapped = stored, swapped
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
                f"{name} on the weights of experts that are kept in few bits: they can't be changed in place; "
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
        """The matrix of one expert."""
        return Stack(self.stored.expert(index), self.dtype, swapped=self.swapped)

    def transposed(self) -> Stack:
        """The same with its last two dimensions swapped."""
        return Stack(self.stored, self.dtype, swapped=not self.swapped)

    def decode(self) -> Tensor:
        """What this passes for, as a plain tensor."""
        plain = self.stored.decode(self.dtype)
        return plain.mT if self.swapped else plain


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
    return weight.stored.times(input, bias)


def _matmul(input: Any, other: Any) -> Any:
    if isinstance(input, Stack) or not isinstance(other, Stack):
        return NotImplemented
    if other.dim() == 2:
        return other.stored.times(input) if other.swapped else NotImplemented
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
