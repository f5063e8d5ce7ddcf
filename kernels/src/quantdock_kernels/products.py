"""Products with integer codes, and their full precision."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from quantdock_kernels._arguments import FLOATS, check, check_floats, check_positive
from quantdock_kernels._library import function, instruction_set, prefer_large_pages

BITS = (2, 4, 8)
"""Of codes that products can be made with; each is a part of a byte."""
BLOCK = 64
"""Outputs whose words lie together."""
_ROWS = 64  # done together
_STEP = 128  # inputs that have a power of two of their own, at most
_DIGITS = 3
_LARGE_PAGE = 1 << 21  # bytes
_OWN_SCRATCH = 1 << 15  # bytes that the library has itself
_STEP_BYTES = 4 + 4 * _DIGITS


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("words", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("group", c_int64),
        ("steps", c_int64),
        ("bits", c_int),
        ("scales_dtype", c_int),
    )


class WordMatrix:
    """A matrix ``scale * (code - zero)``, ready for products with a few rows of activations.

    Outputs come in blocks of 64, the last of which may have fewer. A block is ``[inputs / (32 / bits), its outputs]``
    words of 32 bits, and a word has the codes of consecutive inputs of an output: byte ``i`` has the codes ``i``,
    ``i + 4``, and so on, the first of them in its lowest bits.

    Args:
        words: int32 ``[inputs * outputs * bits / 32]``, one block after the other; contiguous.
        scales: float32, bfloat16 or float16 ``[groups, outputs]``; contiguous.
        zeros: uint8 ``[groups, outputs]``; contiguous.
        bits: 2, 4 or 8.
        inputs: a multiple of the codes in a word.
        group: inputs that share their parameters; a multiple of the codes in a word, or at least ``inputs``. The last
            group may be smaller.

    Raises:
        TypeError, ValueError: an argument isn't as described.
    """

    def __init__(self, words: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, inputs: int, group: int) -> None:
        if bits not in BITS:
            raise ValueError(f"bits is {bits}, expected {' or '.join(map(str, BITS))}")
        check_positive("group", group)
        codes = 32 // bits
        if inputs % codes or (group % codes and group < inputs):
            raise ValueError(f"inputs and group are {inputs} and {group}, expected multiples of {codes}")
        scales_dtype = check_floats("scales", scales, 2)
        self.inputs, self.outputs, self.group = inputs, scales.shape[1], min(group, max(1, inputs))
        shape = (-(-inputs // self.group), self.outputs)
        address = check("words", words, torch.int32, inputs // codes * self.outputs)
        check("scales", scales, scales.dtype, *shape)
        check("zeros", zeros, torch.uint8, *shape)
        scales, zeros = _in_blocks(scales), _in_blocks(zeros)
        self._kept = words, scales, zeros
        self._steps = sum(-(-min(self.group, inputs - k) // _STEP) for k in range(0, inputs, self.group))
        self._matrix = _Matrix(
            address,
            scales.data_ptr(),
            zeros.data_ptr(),
            inputs,
            self.outputs,
            self.group,
            self._steps,
            bits,
            scales_dtype,
        )
        self._address = ctypes.addressof(self._matrix)
        self._scratch = self._steps * _STEP_BYTES + inputs * _DIGITS  # bytes, for each row

    @staticmethod
    def room(count: int) -> Tensor:
        """Memory for so many words: int32 ``[count]``, uninitialised.

        If it is that large, it begins at a page of 2 MB, and has such pages where the system grants them. From memory,
        words are read some 12 % faster then.
        """
        if 4 * count < _LARGE_PAGE:
            return torch.empty(count, dtype=torch.int32, device="cpu")
        memory = torch.empty(count + _LARGE_PAGE // 4, dtype=torch.int32, device="cpu")
        words = memory[-memory.data_ptr() % _LARGE_PAGE // 4 :][:count]
        prefer_large_pages(words.data_ptr(), 4 * count)
        return words

    def multiply(self, x: Tensor, *, instruction_set: str | None = None) -> Tensor:
        """The products of each row, in as many threads as torch uses.

        Activations keep at least 21 bits below the largest of up to 128 neighbours, so a result is about as exact as a
        sum in float32. A row with an infinite activation or a NaN becomes NaN.

        Args:
            x: float32, bfloat16 or float16 ``[..., inputs]``, contiguous.
            instruction_set: one of ``instruction_sets()``, instead of ``instruction_set()``; none changes a bit.

        Returns:
            ``[..., outputs]`` in the dtype of ``x``, rounded once.

        Raises:
            TypeError, ValueError: ``x`` isn't as described.
        """
        # For a small layer, this takes as long as the product itself, so that every call of torch counts.
        given, shape = x.dtype, x.shape
        dtype = FLOATS.get(given, -1)
        if dtype < 0 or not shape or shape[-1] != self.inputs or not _plain(x):
            check_floats("x", x, max(1, len(shape)))
            check("x", x, given, *shape[:-1], self.inputs)
        rows = math.prod(shape[:-1])
        y = x.new_empty((*shape[:-1], self.outputs))
        size = min(rows, _ROWS) * self._scratch
        scratch = torch.empty(size, dtype=torch.uint8, device="cpu") if size > _OWN_SCRATCH else None
        _multiply_words(instruction_set)(
            self._address,
            x.data_ptr(),
            dtype,
            rows,
            None if scratch is None else scratch.data_ptr(),
            y.data_ptr(),
            parallel(),
            torch.get_num_threads(),
        )
        return y

    def decode(self, part: slice, dtype: torch.dtype, *, instruction_set: str | None = None) -> Tensor:
        """Some outputs in full precision, each element rounded once.

        Args:
            part: the outputs; starts at a multiple of 64.
            dtype: float32, bfloat16 or float16.
            instruction_set: as of ``multiply``.

        Returns:
            ``[inputs, n]`` in ``dtype``.

        Raises:
            ValueError: the outputs don't start there, or the dtype is another one.
        """
        first, stop, step = part.indices(self.outputs)
        if first % BLOCK or step != 1 or dtype not in FLOATS:
            raise ValueError(
                f"part and dtype are {part} and {dtype}, expected a start at a multiple of {BLOCK}, and one of "
                f"{', '.join(map(str, FLOATS))}"
            )
        count = max(0, stop - first)
        values = torch.empty(self.inputs, count, dtype=dtype, device="cpu")
        call = function("decode_words", instruction_set, *_DECODE)
        call(
            ctypes.addressof(self._matrix),
            first,
            count,
            FLOATS[dtype],
            values.data_ptr(),
            parallel(),
            torch.get_num_threads(),
        )
        return values


def pack_blocks(codes: Tensor, *, bits: int, words: Tensor, instruction_set: str | None = None) -> None:
    """Write the words that a ``WordMatrix`` has for some outputs, the first of which begins a block.

    Args:
        codes: uint8 ``[inputs, n]``, each below ``2 ** bits``; contiguous; read. ``n`` is a multiple of 64, unless the
            last outputs are among them.
        bits: 2, 4 or 8.
        words: int32 ``[inputs * n * bits / 32]``; contiguous; written.
        instruction_set: one of ``instruction_sets()``, instead of ``instruction_set()``.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    shape, code_address, word_address = _packing(codes, bits, words)
    function("pack_blocks", instruction_set, *_PACK)(code_address, *shape, bits, word_address)


def unpack_blocks(words: Tensor, *, bits: int, codes: Tensor, instruction_set: str | None = None) -> None:
    """What ``pack_blocks`` undoes. Arguments are the same, but words are read and codes written.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    shape, code_address, word_address = _packing(codes, bits, words)
    function("unpack_blocks", instruction_set, *_PACK)(word_address, *shape, bits, code_address)


def _packing(codes: Tensor, bits: int, words: Tensor) -> tuple[tuple[int, int], int, int]:
    """The shape of the codes and both addresses."""
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, expected {' or '.join(map(str, BITS))}")
    if codes.dim() != 2 or codes.shape[0] * bits % 32:
        raise ValueError(
            f"codes have shape {tuple(codes.shape)}, expected 2 dimensions, and a multiple of {32 // bits} inputs"
        )
    inputs, outputs = codes.shape
    code_address = check("codes", codes, torch.uint8, inputs, outputs)
    return (inputs, outputs), code_address, check("words", words, torch.int32, inputs * bits // 32 * outputs)


_MULTIPLY = (c_void_p, c_void_p, c_int, c_int64, c_void_p, c_void_p, c_void_p, c_int)
_DECODE = (c_void_p, c_int64, c_int64, c_int, c_void_p, c_void_p, c_int)
_PACK = (c_void_p, c_int64, c_int64, c_int, c_void_p)


def _in_blocks(parameters: Tensor) -> Tensor:
    """``[groups, outputs]`` with the outputs of a block together, or each group of a block would be on another page."""
    return torch.cat([block.reshape(-1) for block in torch.split(parameters, BLOCK, dim=1)])


def _plain(x: Tensor) -> bool:
    return x.is_cpu and x.layout is torch.strided and x.is_contiguous() and not x.is_neg()


@functools.cache
def _multiply_words(instruction_set: str | None) -> Callable[..., None]:
    return function("multiply_words", instruction_set, *_MULTIPLY)


def has_fast_products() -> bool:
    """Whether products are made for this processor's vectors (``instruction_set()``), and in torch's threads."""
    return instruction_set() != "baseline" and parallel() is not None


@functools.cache
def parallel() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP runtime that torch has loaded, if it is one that has it.

    Threads of a second runtime would compete for the processor with torch's, which wait for work by running.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        return None
