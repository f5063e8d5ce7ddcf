"""Codes in words of 32 bits, as GPTQ stores them: a stream of bits, from the lowest bit of the first word on."""

from __future__ import annotations

import torch
from torch import Tensor

from quantdock import ops


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 ``[words, streams]`` to uint8 ``[codes, streams]``; a code may be in two words."""
    codes = words.new_empty(len(words) * 32 // bits, words.shape[1], dtype=torch.uint8)
    ops.unpack_words(words.contiguous(), bits=bits, dim=0, codes=codes)
    return codes


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``[codes, streams]`` to int32 ``[words, streams]``; the codes fill whole words."""
    words = codes.new_empty(len(codes) * bits // 32, codes.shape[1], dtype=torch.int32)
    ops.pack_words(codes.contiguous(), bits=bits, dim=0, words=words)
    return words


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``[streams, codes]`` to int32 ``[words, streams]``; the codes fill whole words."""
    words = codes.new_empty(codes.shape[1] * bits // 32, len(codes), dtype=torch.int32)
    ops.pack_words(codes, bits=bits, dim=0, words=words, turn=True)
    return words


def decode_zeros(words: Tensor, bits: int, *, less_one: bool) -> Tensor:
    """``qzeros``, int32 ``[groups, words]``, to uint8 ``[groups, outputs]``.

    Args:
        words: the tensor as stored.
        bits: per zero point.
        less_one: whether they are stored less one, as in the checkpoint format ``gptq``. One is added to the codes of
            a word as to a single number, since they were made so: gptqmodel subtracts and adds 0x11111111 (for 4 bits)
            and lets a zero borrow from the code above. Codes of 3 bits, which no word holds whole, wrap on their own.
    """
    if less_one and 32 % bits == 0:
        words = words + _ones(bits)
    zeros = unpack(words.t(), bits).t()
    return (zeros + 1) & 7 if less_one and bits == 3 else zeros


def encode_zeros(zeros: Tensor, bits: int, *, less_one: bool) -> Tensor:
    """What ``decode_zeros`` undoes: uint8 ``[groups, outputs]`` to int32 ``[groups, words]``."""
    if less_one and bits == 3:
        zeros = (zeros - 1) & 7
    words = pack(zeros.t(), bits).t()
    return (words - _ones(bits) if less_one and 32 % bits == 0 else words).contiguous()


def _ones(bits: int) -> int:
    """A one for every code of a word; for 2, 4 and 8 bits it fits a signed word."""
    return sum(1 << shift for shift in range(0, 32, bits))
