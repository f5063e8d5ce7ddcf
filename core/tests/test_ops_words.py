"""Packed words and casts: what the operations are defined to compute."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdock import ops

AWQ = [0, 2, 4, 6, 1, 3, 5, 7]


@settings(deadline=None, max_examples=100)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    dim=st.sampled_from([0, 1]),
    turn=st.booleans(),
    streams=st.integers(1, 12),
    length=st.integers(1, 70),
    seed=st.integers(0, 2**32),
)
def test_a_stream_of_bits(bits: int, dim: int, turn: bool, streams: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = -(-length * bits // 32)
    words = torch.randint(-(2**31), 2**31, (count, streams), generator=generator).to(torch.int32)
    expected = torch.empty(length, streams, dtype=torch.uint8)
    for stream in range(streams):
        number = sum((word & 0xFFFFFFFF) << 32 * index for index, word in enumerate(words[:, stream].tolist()))
        for k in range(length):
            expected[k, stream] = (number >> k * bits) & ((1 << bits) - 1)
    words = words.t().contiguous() if dim else words
    expected = expected.t().contiguous() if dim != turn else expected
    codes = torch.empty_like(expected)
    ops.unpack_words(words, bits=bits, dim=dim, turn=turn, codes=codes)
    assert torch.equal(codes, expected)

    noise = torch.randint(0, 256, codes.shape, generator=generator, dtype=torch.uint8) << bits
    packed = torch.empty_like(words)
    ops.pack_words(codes | noise, bits=bits, dim=dim, turn=turn, words=packed)
    again = torch.empty_like(codes)
    ops.unpack_words(packed, bits=bits, dim=dim, turn=turn, codes=again)
    assert torch.equal(again, expected)
    unused = 32 * count - length * bits
    last = packed[:, -1] if dim else packed[-1]
    assert not (last.long() & 0xFFFFFFFF).bitwise_right_shift(32 - unused).any()


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_order_of_awq(dim: int, turn: bool) -> None:
    natural = torch.randint(0, 16, (5, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = torch.zeros(5, 3, dtype=torch.int64)
    for nibble, column in enumerate(AWQ):
        words |= natural.view(5, 3, 8)[:, :, column].long() << 4 * nibble
    words = (words - (words >> 31 << 32)).to(torch.int32)
    words = words if dim else words.t().contiguous()
    expected = natural if dim != turn else natural.t().contiguous()
    codes, packed = torch.empty_like(expected), torch.empty_like(words)
    ops.unpack_words(words, bits=4, dim=dim, turn=turn, interleaved=True, codes=codes)
    ops.pack_words(expected, bits=4, dim=dim, turn=turn, interleaved=True, words=packed)
    assert torch.equal(codes, expected)
    assert torch.equal(packed, words)


def test_what_is_wrong_is_refused() -> None:
    words, codes = torch.zeros(2, 3, dtype=torch.int32), torch.full((16, 3), 9, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bits is 5, expected 2 or 3 or 4 or 8"):
        ops.unpack_words(words, bits=5, dim=0, codes=codes)
    with pytest.raises(ValueError, match="bits is 8, expected 4"):
        ops.unpack_words(words, bits=8, dim=0, codes=codes, interleaved=True)
    with pytest.raises(ValueError, match="dim is -1, expected 0 or 1"):
        ops.unpack_words(words, bits=4, dim=-1, codes=codes)
    with pytest.raises(ValueError, match=r"words is torch.int32 \[2, 3\].*expected torch.int32 \[4, 3\]"):
        ops.unpack_words(words, bits=8, dim=0, codes=codes)
    with pytest.raises(ValueError, match=r"codes are \[12, 3\], expected a multiple of 8 along the streams"):
        ops.unpack_words(words, bits=4, dim=0, codes=codes[:12], interleaved=True)
    with pytest.raises(ValueError, match=r"codes is torch.uint8.*not contiguous"):
        ops.unpack_words(words, bits=4, dim=0, codes=codes.t().contiguous().t())
    assert (codes == 9).all()
    with pytest.raises(ValueError, match=r"flat is torch.float32 and out is torch.float32"):
        ops.cast(torch.ones(3), out=torch.ones(3))
    with pytest.raises(ValueError, match=r"out is torch.float16 \[2\]"):
        ops.cast(torch.ones(3), out=torch.ones(2).half())


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.floats(width=32), max_size=50))
def test_a_cast_is_to_nearest(values: list[float]) -> None:
    for source in (torch.float32, torch.bfloat16, torch.float16):
        for target in (torch.float32, torch.bfloat16, torch.float16):
            if source == target:
                continue
            flat = torch.tensor(values, dtype=torch.float64).to(source)
            out = torch.empty(len(values), dtype=target)
            ops.cast(flat, out=out)
            expected = flat.double().to(target)
            assert torch.equal(out.isnan(), expected.isnan())
            numbers = ~expected.isnan()
            assert torch.equal(out[numbers].view(torch.uint8), expected[numbers].view(torch.uint8))
