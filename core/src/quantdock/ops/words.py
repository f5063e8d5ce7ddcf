"""Small integers packed in words of 32 bits, as GPTQ, AWQ and compressed-tensors store them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from quantdock.ops.arguments import expect, expect_matrix
from quantdock.ops.blocks import row_pieces
from quantdock.ops.choice import compiled

BITS = (2, 3, 4, 8)
"""The sizes of codes that can be packed."""

_INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ has the codes of a word, in units of 4 bits."""


def unpack_words(
    words: Tensor, *, bits: int, dim: int, codes: Tensor, turn: bool = False, interleaved: bool = False
) -> None:
    """From streams of words to a byte per code.

    A stream holds code ``k`` in its bits ``k * bits`` to ``(k + 1) * bits``, counted from the lowest bit of its first
    word: a code of 3 bits may be in two words. GPTQ's ``qweight`` has its streams along dimension 0 and its ``qzeros``
    along 1, compressed-tensors' ``weight_packed`` along 1. AWQ's ``qweight`` and ``qzeros`` have theirs along 1, with
    the codes 0, 2, 4, 6, 1, 3, 5, 7 of each eight in that order.

    Args:
        words: int32 ``[ceil(length * bits / 32), streams]`` for ``dim=0``, ``[streams, ceil(length * bits / 32)]`` for
            ``dim=1``, contiguous; not changed. Compiled code needs it on CPU.
        bits: 2, 3, 4 or 8.
        dim: the dimension along which the words of a stream are.
        codes: uint8 matrix on the same device, contiguous, written: the codes of a stream are along ``dim``, too, or
            along the other dimension if ``turn``.
        turn: whether the matrix is transposed.
        interleaved: AWQ's order; ``bits`` is 4, and ``length`` a multiple of 8.

    Raises:
        ValueError: an argument isn't as described; nothing has been written.
    """
    _expect(words, bits, dim, codes, turn, interleaved)
    kernels = compiled(codes)
    if kernels is not None:
        kernels.unpack_words(words, bits=bits, dim=dim, codes=codes, turn=turn, interleaved=interleaved)
        return
    for part, out in _streams(words, dim, codes, turn):
        for place in _places(bits, interleaved):
            target = out[:, place.code :: place.codes]
            shift = place.bit
            found = part[:, place.word :: place.words][:, : target.shape[1]] >> shift
            if shift + bits > 32:
                rest = part[:, place.word + 1 :: place.words][:, : target.shape[1]]
                found = (found & ((1 << (32 - shift)) - 1)) | (rest << (32 - shift))
            target.copy_(found & ((1 << bits) - 1))


def pack_words(
    codes: Tensor, *, bits: int, dim: int, words: Tensor, turn: bool = False, interleaved: bool = False
) -> None:
    """From a byte per code to streams of words: what ``unpack_words`` undoes. The arguments are the same.

    Of each code, the lowest bits count. The bits after the last code of a stream are 0.

    Raises:
        ValueError: an argument isn't as described; nothing has been written.
    """
    _expect(words, bits, dim, codes, turn, interleaved)
    kernels = compiled(codes)
    if kernels is not None:
        kernels.pack_words(codes, bits=bits, dim=dim, words=words, turn=turn, interleaved=interleaved)
        return
    words.zero_()
    for part, source in _streams(words, dim, codes, turn):
        for place in _places(bits, interleaved):
            values = source[:, place.code :: place.codes].to(torch.int32) & ((1 << bits) - 1)
            part[:, place.word :: place.words][:, : values.shape[1]] |= values << place.bit
            if place.bit + bits > 32:
                part[:, place.word + 1 :: place.words][:, : values.shape[1]] |= values >> (32 - place.bit)


class _Place(NamedTuple):
    """Where codes are, that are a whole number of words apart."""

    code: int
    codes: int
    """Code ``code`` of each ``codes``..."""
    word: int
    words: int
    """...is in word ``word`` of each ``words``..."""
    bit: int
    """...from this bit on."""


def _places(bits: int, interleaved: bool) -> Iterator[_Place]:
    codes, words = 32 // math.gcd(32, bits), bits // math.gcd(32, bits)
    for code in range(codes):
        first = 4 * _INTERLEAVED[code] if interleaved else code * bits
        yield _Place(code, codes, first // 32, words, first % 32)


def _streams(words: Tensor, dim: int, codes: Tensor, turn: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Some streams at a time, as rows."""
    words = words if dim else words.t()
    codes = codes if dim != turn else codes.t()
    for rows in row_pieces(*codes.shape):
        yield words[rows], codes[rows]


def _expect(words: Tensor, bits: int, dim: int, codes: Tensor, turn: bool, interleaved: bool) -> None:
    if bits not in BITS or (interleaved and bits != 4):
        raise ValueError(f"bits is {bits}, expected {4 if interleaved else ' or '.join(map(str, BITS))}")
    if dim not in (0, 1):
        raise ValueError(f"dim is {dim}, expected 0 or 1")
    expect_matrix("codes", codes, (torch.uint8,))
    expect("codes", codes, torch.uint8, *codes.shape, device=codes.device)
    length, streams = codes.shape if dim == turn else codes.shape[::-1]
    if interleaved and length % 8:
        raise ValueError(f"codes are {list(codes.shape)}, expected a multiple of 8 along the streams")
    count = -(-length * bits // 32)
    expect("words", words, torch.int32, *((streams, count) if dim else (count, streams)), device=codes.device)
