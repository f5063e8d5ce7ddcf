"""Words of 32 bits: what GPTQ stores, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdock_gptq import words

BITS = st.sampled_from([2, 3, 4, 8])


@settings(deadline=None, max_examples=100)
@given(bits=BITS, blocks=st.integers(1, 3), streams=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_a_stream_of_bits(bits: int, blocks: int, streams: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (32 * blocks, streams), generator=generator, dtype=torch.uint8)
    packed = words.pack(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.int32, (bits * blocks, streams))
    for stream in range(streams):
        number = sum(code << bits * place for place, code in enumerate(codes[:, stream].tolist()))
        found = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(packed[:, stream].tolist()))
        assert found == number
    assert torch.equal(words.unpack(packed, bits), codes)


@settings(deadline=None, max_examples=100)
@given(bits=BITS, less_one=st.booleans(), groups=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_zero_points_come_back(bits: int, less_one: bool, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.randint(0, 2**bits, (groups, 64), generator=generator, dtype=torch.uint8)
    packed = words.encode_zeros(zeros, bits, less_one=less_one)
    assert (packed.dtype, packed.shape) == (torch.int32, (groups, 2 * bits))
    assert torch.equal(words.decode_zeros(packed, bits, less_one=less_one), zeros)


@pytest.mark.parametrize(
    ("bits", "less_one", "word"),
    [
        (4, True, 0x77777777),
        (4, False, 0x88888888),
        (8, True, 0x7F7F7F7F),
        (2, True, 0x55555555),
        (2, False, 0xAAAAAAAA),
    ],
)
def test_zero_points_of_symmetric_weights(bits: int, less_one: bool, word: int) -> None:
    """The words that every symmetric GPTQ checkpoint has."""
    zeros = torch.full((1, 32), 2 ** (bits - 1), dtype=torch.uint8)
    packed = words.encode_zeros(zeros, bits, less_one=less_one)
    assert {value & 0xFFFFFFFF for value in packed.flatten().tolist()} == {word}


def test_a_zero_borrows_from_the_code_above() -> None:
    """As gptqmodel has it, which subtracts 0x11111111 from a word: zero points 0, 5, 0, 0, ... become 0x...f3f."""
    zeros = torch.tensor([[0, 5, 1, 1, 1, 1, 1, 1]], dtype=torch.uint8)
    packed = words.encode_zeros(zeros, 4, less_one=True)
    assert packed.tolist() == [[0x11111150 - 0x11111111]]
    assert torch.equal(words.decode_zeros(packed, 4, less_one=True), zeros)
