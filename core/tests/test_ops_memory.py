"""What operations need beside their results, where torch runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from quantdock import ops
from quantdock.ops import choice
from quantdock.testing import PeakBytes


@pytest.fixture(autouse=True)
def _in_a_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On torch, with a single thread: that is when pieces are largest."""
    monkeypatch.setenv(choice.VARIABLE, "off")
    choice._choice.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    choice._choice.cache_clear()


def peak(function: Callable[..., None], **arguments: object) -> int:
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    with PeakBytes(tensors) as memory:
        function(**arguments)
    return memory.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(3000, 1000), (2, 700_000), (700_000, 2)])
@pytest.mark.parametrize("group", [1, 128, 10**6])
def test_temporaries_stay_within_bounds(dtype: torch.dtype, rows: int, columns: int, group: int) -> None:
    """If this fails, raise the bound: ``working_bytes`` in ``quantdock.ops``."""
    allowed = ops.working_bytes(columns)
    assert allowed <= 24 * max(columns, 300_000)
    matrix = torch.randn(rows, columns).to(dtype)
    matrix[0, 0] = torch.nan
    groups = -(-columns // group)
    low, high = torch.empty(2, rows, groups, dtype=dtype)
    assert peak(ops.group_extremes, matrix=matrix, group=group, smallest=low, largest=high) <= allowed
    assert peak(ops.group_magnitudes, matrix=matrix, group=group, magnitudes=low) <= allowed

    scales, codes = torch.ones(rows, groups), torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    result, block = matrix.clone(), {"scales": scales, "block": (1, group)}
    assert peak(ops.encode_fp8, matrix=matrix, divide=True, codes=codes, **block) <= allowed
    assert peak(ops.decode_fp8, codes=codes, out=result, **block) <= allowed

    parameters = {"scales": scales, "shifts": scales, "zeros": scales.to(torch.uint8), "lowest": 0, "highest": 15}
    bytes_ = torch.empty(rows, columns, dtype=torch.uint8)
    assert peak(ops.quantize_affine, matrix=matrix, group=group, divide=True, codes=bytes_, **parameters) <= allowed


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("turn", [False, True])
def test_temporaries_of_words_stay_within_bounds(bits: int, turn: bool) -> None:
    length, streams = 4096, 700
    words = torch.zeros(length * bits // 32, streams, dtype=torch.int32)
    codes = torch.zeros((streams, length) if turn else (length, streams), dtype=torch.uint8)
    for function in (ops.unpack_words, ops.pack_words):
        assert peak(function, words=words, codes=codes, bits=bits, dim=0, turn=turn) <= ops.working_bytes(length)
