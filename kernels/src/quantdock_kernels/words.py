"""Small integers packed in words of 32 bits."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from quantdock_kernels._arguments import check
from quantdock_kernels._library import function

BITS = (2, 3, 4, 8)
"""The sizes of codes that can be packed."""


def unpack_words(
    words: Tensor,
    *,
    bits: int,
    dim: int,
    codes: Tensor,
    turn: bool = False,
    interleaved: bool = False,
    instruction_set: str | None = None,
) -> None:
    """See ``quantdock.ops.unpack_words``.

    Args:
        words: int32 matrix whose streams run along ``dim``; contiguous; read.
        bits: of a code.
        dim: 0 if the words of a stream are below each other, 1 if they are side by side.
        codes: uint8 matrix, the streams along the same dimension, or the other one if ``turn``; contiguous; written.
        turn: whether streams change from rows to columns, or the other way.
        interleaved: the order of codes in a word, which has 4 bits then.
        instruction_set: one of ``instruction_sets()``, instead of ``instruction_set()``.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    _convert("unpack_words", words, codes, bits, dim, turn, interleaved, instruction_set)


def pack_words(
    codes: Tensor,
    *,
    bits: int,
    dim: int,
    words: Tensor,
    turn: bool = False,
    interleaved: bool = False,
    instruction_set: str | None = None,
) -> None:
    """See ``quantdock.ops.pack_words``. Arguments are those of ``unpack_words``, but codes are read and words written.

    Raises:
        TypeError, ValueError: an argument isn't as described; nothing has been written.
    """
    _convert("pack_words", words, codes, bits, dim, turn, interleaved, instruction_set)


def _convert(
    name: str,
    words: Tensor,
    codes: Tensor,
    bits: int,
    dim: int,
    turn: bool,
    interleaved: bool,
    instruction_set: str | None,
) -> None:
    if bits not in BITS or (interleaved and bits != 4):
        raise ValueError(f"bits is {bits}, expected {4 if interleaved else ' or '.join(map(str, BITS))}")
    if dim not in (0, 1):
        raise ValueError(f"dim is {dim}, expected 0 or 1")
    if codes.dim() != 2:
        raise ValueError(f"codes have shape {tuple(codes.shape)}, expected 2 dimensions")
    code_dim = 1 - dim if turn else dim
    streams, length = codes.shape[1 - code_dim], codes.shape[code_dim]
    if interleaved and length % 8:
        raise ValueError(f"codes have shape {tuple(codes.shape)}, expected a multiple of 8 along dimension {code_dim}")
    count = -(-length * bits // 32)
    word_address = check("words", words, torch.int32, *((streams, count) if dim else (count, streams)))
    code_address = check("codes", codes, torch.uint8, *codes.shape)
    source, target = (word_address, code_address) if name == "unpack_words" else (code_address, word_address)
    call = function(name, instruction_set, c_void_p, *[c_int64] * 4, *[c_int] * 4, c_void_p)
    call(
        source,
        streams,
        length,
        count if dim else streams,
        length if code_dim else streams,
        bits,
        dim == 0,
        code_dim == 0,
        interleaved,
        target,
    )
