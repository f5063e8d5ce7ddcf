"""Products with integer codes: the bits of the definition in each instruction set, in any number of threads, and close
to what they would be without rounding."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quantdock_kernels as kernels
from quantdock_kernels import products

sys.path.insert(0, str(Path(__file__).parent))
import reference_products as reference
from kernel_weights import DTYPES, every_instruction_set


@dataclass(frozen=True)
class Stored:
    """A matrix, as codes and as words."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group: int

    def matrix(self, **changes: Any) -> kernels.WordMatrix:
        parts = {
            "words": reference.packed(self.codes, self.bits),
            "scales": self.scales,
            "zeros": self.zeros,
            "bits": self.bits,
            "inputs": len(self.codes),
            "group": self.group,
        }
        return kernels.WordMatrix(**(parts | changes))

    def exact(self, x: Tensor) -> Tensor:
        of = torch.arange(len(self.codes)) // self.group
        return x.double() @ ((self.codes.double() - self.zeros.double()[of]) * self.scales.double()[of])


def stored(
    *,
    bits: int = 4,
    inputs: int = 256,
    outputs: int = 128,
    group: int = 64,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Stored:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group)
    return Stored(
        codes=torch.randint(0, 2**bits, (inputs, outputs), generator=generator).to(torch.uint8),
        scales=(0.1 * torch.rand(groups, outputs, generator=generator) + 0.01).to(dtype),
        zeros=torch.randint(0, 2**bits, (groups, outputs), generator=generator).to(torch.uint8),
        bits=bits,
        group=group,
    )


def activations(kind: str, rows: int, inputs: int, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    if kind == "outliers" and x.numel():
        x[:, inputs // 3] *= 300
    elif kind == "sizes":
        x *= torch.logspace(-30, 30, max(1, inputs))
    elif kind == "tiny":
        x *= 1e-37
    elif kind == "zeros":
        x[:, ::2] = 0
        x[: rows // 2] = -0.0
    elif kind == "not finite" and x.numel():
        x[0, inputs // 2], x[-1, -1] = torch.inf, torch.nan
    return x.to(dtype)


KINDS = ("usual", "outliers", "sizes", "tiny", "zeros", "not finite")


@every_instruction_set
@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(products.BITS),
    words=st.integers(0, 24),
    group=st.sampled_from([1, 2, 5, 8, 16, 100]),
    outputs=st.integers(0, 200),
    rows=st.sampled_from([0, 1, 2, 3, 6, 7, 64, 131]),
    scales=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_bits(
    instruction_set: str,
    bits: int,
    words: int,
    group: int,
    outputs: int,
    rows: int,
    scales: torch.dtype,
    dtype: torch.dtype,
    kind: str,
    seed: int,
) -> None:
    codes = 32 // bits
    made = stored(bits=bits, inputs=words * codes, outputs=outputs, group=group * codes, dtype=scales, seed=seed)
    x = activations(kind, rows, words * codes, dtype, seed)
    found = made.matrix().multiply(x, instruction_set=instruction_set)
    expected = reference.multiply(x, made.codes, made.scales, made.zeros, made.group)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))
    for into in DTYPES:
        start = outputs // 2 // products.BLOCK * products.BLOCK
        decoded = made.matrix().decode(slice(start, None), into, instruction_set=instruction_set)
        whole = reference.decode(made.codes, made.scales, made.zeros, made.group, into)
        assert torch.equal(decoded, whole[:, start:])


@every_instruction_set
@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(products.BITS),
    words=st.integers(0, 24),
    outputs=st.integers(0, 200),
    seed=st.integers(0, 99),
)
def test_packing(instruction_set: str, bits: int, words: int, outputs: int, seed: int) -> None:
    made = stored(bits=bits, inputs=words * 32 // bits, outputs=outputs, seed=seed)
    packed, unpacked = torch.full((words * outputs,), -1, dtype=torch.int32), torch.full_like(made.codes, 255)
    kernels.pack_blocks(made.codes, bits=bits, words=packed, instruction_set=instruction_set)
    assert torch.equal(packed, reference.packed(made.codes, bits))
    kernels.unpack_blocks(packed, bits=bits, codes=unpacked, instruction_set=instruction_set)
    assert torch.equal(unpacked, made.codes)


@pytest.mark.parametrize("kind", ["usual", "outliers", "zeros"])
@pytest.mark.parametrize("bits", products.BITS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float16, 4e-4), (torch.bfloat16, 3e-3)])
def test_as_exact_as_a_sum_in_float32(bits: int, dtype: torch.dtype, bound: float, kind: str) -> None:
    """Nothing but the result is rounded to the activations' dtype, outliers beside them or not."""
    made = stored(bits=bits, inputs=4096, outputs=192, group=128)
    x = activations(kind, 3, 4096, dtype, seed=1)
    found, expected = made.matrix().multiply(x).double(), made.exact(x)
    assert (found - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("count", [0, 5, 1 << 19, (1 << 20) + 3])
def test_room_for_words(count: int) -> None:
    words = kernels.WordMatrix.room(count)
    assert (words.dtype, words.shape) == (torch.int32, (count,))
    assert count < 1 << 19 or words.data_ptr() % (1 << 21) == 0
    words.fill_(7)  # all of it is there
    assert int(words.sum()) == 7 * count


def test_activations_have_any_dimensions() -> None:
    matrix, x = stored().matrix(), activations("usual", 6, 256, torch.bfloat16, seed=3)
    expected = matrix.multiply(x)
    for shape in ((6, 1), (1, 6), (2, 1, 3)):
        assert torch.equal(matrix.multiply(x.view(*shape, 256)), expected.view(*shape, 128))
    assert torch.equal(matrix.multiply(x[2]), expected[2])


def test_a_row_that_takes_more_room_than_the_library_has() -> None:
    made = stored(inputs=16384, outputs=70, group=128)
    x = activations("usual", 1, 16384, torch.bfloat16, seed=4)
    expected = reference.multiply(x, made.codes, made.scales, made.zeros, made.group)
    assert torch.equal(made.matrix().multiply(x), expected)


def test_threads_change_nothing() -> None:
    made, before = stored(inputs=512, outputs=1000), torch.get_num_threads()
    x = activations("usual", 5, 512, torch.bfloat16, seed=2)
    expected = reference.multiply(x, made.codes, made.scales, made.zeros, made.group)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(made.matrix().multiply(x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP runtime on other systems")
def test_threads_are_torchs() -> None:
    assert products.parallel()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 3}, ValueError, "bits is 3, expected 2 or 4 or 8"),
        ({"group": 0}, ValueError, "group is 0, expected a positive number"),
        ({"group": 12}, ValueError, "inputs and group are 256 and 12, expected multiples of 8"),
        ({"inputs": 260}, ValueError, "inputs and group are 260 and 64, expected multiples of 8"),
        ({"inputs": 512}, ValueError, "words has shape (4096,), expected (8192,)"),
        ({"words": torch.zeros(4096)}, TypeError, "words is torch.float32, expected torch.int32"),
        ({"scales": torch.zeros(3, 128)}, ValueError, "scales has shape (3, 128), expected (4, 128)"),
        ({"scales": torch.zeros(4, 128, dtype=torch.float64)}, TypeError, "scales is torch.float64"),
        ({"zeros": torch.zeros(4, 128, dtype=torch.int8)}, TypeError, "zeros is torch.int8"),
        ({"zeros": torch.zeros(4, 256, dtype=torch.uint8)[:, ::2]}, ValueError, "zeros has strides (256, 2)"),
    ],
)
def test_wrong_matrices(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        stored().matrix(**change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 255), ValueError, "x has shape (2, 255), expected (2, 256)"),
        (torch.zeros(()), ValueError, "x has shape (), expected 1 dimensions"),
        (torch.zeros(2, 3, 128), ValueError, "x has shape (2, 3, 128), expected (2, 3, 256)"),
        (torch.zeros(2, 256, dtype=torch.float64), TypeError, "x is torch.float64"),
        (torch.zeros(2, 256, device="meta"), TypeError, "x is torch.strided on meta"),
        (torch.zeros(256, 2).t(), ValueError, "x has strides (1, 2)"),
        (torch.zeros(2, 512)[:, :256], ValueError, "x has strides (512, 1), expected it contiguous"),
        (torch._neg_view(torch.zeros(2, 256)), TypeError, "negated view"),
    ],
)
def test_wrong_activations(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        stored().matrix().multiply(x)
    assert message in str(caught.value)


@pytest.mark.parametrize(("part", "dtype"), [(slice(32, 64), torch.float32), (slice(0, 64), torch.float64)])
def test_wrong_parts(part: slice, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="expected a start at a multiple of 64"):
        stored().matrix().decode(part, dtype)
