"""Operations on tensors of another device: in torch, and without a tensor of the CPU creeping in.

The meta device stands for any other: it computes no values, but refuses operands of different devices as they do.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantdock import ops

META = torch.device("meta")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _words() -> None:
    words, unpacked = _empty(6, 40, dtype=torch.int32), _empty(64, 40, dtype=torch.uint8)
    ops.unpack_words(words, bits=3, dim=0, codes=unpacked)
    ops.pack_words(unpacked, bits=3, dim=0, words=words)


def _groups() -> None:
    matrix = _empty(300, 70, dtype=torch.bfloat16)
    ops.group_extremes(
        matrix, group=32, smallest=_empty(300, 3, dtype=matrix.dtype), largest=_empty(300, 3, dtype=matrix.dtype)
    )
    assert ops.block_magnitudes(matrix, block=(128, 32)).device == META


def _affine() -> None:
    matrix = _empty(4, 70)
    found = ops.parameters.including_zero(_empty(4, 3), _empty(4, 3), bits=4, is_symmetric=False)
    ops.quantize_affine(
        matrix,
        group=32,
        scales=found.scales,
        zeros=found.zeros,
        divide=found.divide,
        lowest=found.lowest,
        highest=found.highest,
        codes=_empty(4, 70, dtype=torch.uint8),
    )


def _fp8() -> None:
    matrix, codes = _empty(300, 70), _empty(300, 70, dtype=torch.float8_e4m3fn)
    found = ops.fp8_scales(_empty(3, 1), rule="reciprocal")
    ops.encode_fp8(matrix, scales=found.scales, block=(128, 128), divide=found.divide, codes=codes)
    ops.decode_fp8(codes, scales=found.stored, block=(128, 128), out=matrix)


def _cast() -> None:
    ops.cast(_empty(70, dtype=torch.bfloat16), out=_empty(70, dtype=torch.float16))


@pytest.mark.parametrize("run", [_words, _groups, _affine, _fp8, _cast])
def test_everything_stays_on_the_device(run: Callable[[], None]) -> None:
    run()


def test_operands_of_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"words is torch.int32 \[6, 40\] on cpu, .* expected .* on meta"):
        ops.unpack_words(torch.zeros(6, 40, dtype=torch.int32), bits=3, dim=0, codes=_empty(64, 40, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"scales is .* on cpu, .* expected .* on meta"):
        ops.encode_fp8(
            _empty(4, 6),
            scales=torch.ones(4, 1),
            block=(1, 6),
            divide=False,
            codes=_empty(4, 6, dtype=torch.float8_e4m3fn),
        )
