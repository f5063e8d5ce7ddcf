"""What the tests of bits share: weights of many kinds, and results with something around them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import quantdock_kernels as kernels
from quantdock import ops
from quantdock.ops import choice

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 171
every_instruction_set = pytest.mark.parametrize("instruction_set", kernels.instruction_sets())


@pytest.fixture(autouse=True, scope="module")
def definitions() -> Iterator[None]:
    """In a file that imports this, the operations run on torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(choice.VARIABLE, "off")
        choice._choice.cache_clear()
        assert ops.implementation().startswith("torch")
        yield
    choice._choice.cache_clear()


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_floats(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but for which of the many NaNs it is."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    ordinary = ~expected.isnan()
    return torch.equal(found.isnan(), ~ordinary) and torch.equal(bits(found[ordinary]), bits(expected[ordinary]))


def some_weights(generator: torch.Generator, kind: str, count: int, dtype: torch.dtype) -> Tensor:
    """Weights that start at any element of their memory, not only where a vector would like them to."""
    start = int(torch.randint(0, 9, (1,), generator=generator))
    normal = torch.randn(count + start, generator=generator)
    match kind:
        case "patterns":  # of which some hundredth is NaNs, quiet and signalling
            size = 4 if dtype == torch.float32 else 2
            values = torch.randint(0, 256, ((count + start) * size,), generator=generator, dtype=torch.uint8)
            return values.view(dtype)[start:]
        case "infinities":
            normal[torch.rand(len(normal), generator=generator) < 0.01] = float("inf")
            normal[torch.rand(len(normal), generator=generator) < 0.01] = float("-inf")
        case "zeros":
            normal = normal.sign() * 0.0
        case "denormals":
            normal = normal * (1e-40 if dtype != torch.float16 else 1e-7)
        case "wide":
            normal = normal * torch.exp2(torch.randint(-140, 120, normal.shape, generator=generator))
        case "ternary":
            normal = normal.round().clamp(-1, 1)
    return normal.to(dtype)[start:]


KINDS = ["normal", "patterns", "infinities", "zeros", "denormals", "wide", "ternary"]
weights = {
    "kind": st.sampled_from(KINDS),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 2**32),
}


def guarded(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    """A result, and the memory that it is in the middle of."""
    count = torch.Size(shape).numel()
    memory = torch.full(((count + 64) * dtype.itemsize,), GUARD, dtype=torch.uint8).view(dtype)
    return memory[32 : 32 + count].view(shape), memory


def nothing_else_was_written(result: Tensor, memory: Tensor) -> None:
    count = result.numel()
    assert (bits(memory[:32]) == GUARD).all()
    assert (bits(memory[32 + count :]) == GUARD).all()


def some_matrix(generator: torch.Generator, kind: str, rows: int, columns: int, gap: int, dtype: torch.dtype) -> Tensor:
    """Rows of weights that start anywhere, with something else between them."""
    return some_weights(generator, kind, rows * (columns + gap), dtype).view(rows, columns + gap)[:, :columns]


def some_scales(generator: torch.Generator, *shape: int) -> Tensor:
    """Sizes from 2^-20 to 2^20, and a few that are no size at all."""
    scales = torch.rand(shape, generator=generator).add(0.5)
    scales *= torch.exp2(torch.randint(-20, 21, shape, generator=generator))
    for odd in (0.0, -1.0, float("inf"), float("nan"), 1e-40, 3e38):
        scales[torch.rand(shape, generator=generator) < 0.02] = odd
    return scales
