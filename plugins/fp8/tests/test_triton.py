"""The kernels for GPUs: what they compute, in Triton's interpreter, and that they compile, which takes no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantdock.testing import in_new_process, interpreted_kernels
from quantdock_fp8 import codes
from quantdock_fp8.activations import Activations, defined
from quantdock_fp8.few_rows import multiply_few
from quantdock_fp8.launching import Chunks
from quantdock_fp8.products import multiply_in_triton

pytest.importorskip("triton", reason="the kernels are Triton's, which comes with torch's builds for CUDA")

pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)  # numpy's, of NaNs

Block = tuple[int, int]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS: tuple[Block, ...] = ((128, 128), (1, 32), (16, 40), (3, 7), (64, 256), (1000, 1000), (1, 1000))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    with interpreted_kernels("quantdock_fp8.kernels"):
        yield


def weight_of(rows: int, columns: int, block: Block, seed: int) -> tuple[Tensor, Tensor]:
    """Codes that are numbers, all of them with the same chance, and scales over many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    picked = numbers[torch.randint(len(numbers), (rows, columns), generator=generator)].view(torch.float8_e4m3fn)
    grid = -(-rows // block[0]), -(-columns // block[1])
    return picked, torch.exp2(torch.rand(grid, generator=generator) * 12 - 14)


def decoded(weight: Tensor, scales: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype)
    codes.decode(weight, scales, block, out)
    return out


def close(found: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype) -> bool:
    """Up to a rounding of the result, and of sums in float32 of numbers whose magnitudes add up to ``magnitude``."""
    allowed = expected.abs() * torch.finfo(dtype).eps + magnitude * 1e-6 + torch.finfo(dtype).tiny
    return bool(((found.double() - expected).abs() <= allowed).all())


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    block=st.sampled_from(BLOCKS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_weights_are_decoded_to_the_same_bits(
    rows: int, columns: int, block: Block, dtype: torch.dtype, seed: int
) -> None:
    weight, scales = weight_of(rows, columns, block, seed)
    first = seed % columns
    each = torch.eye(columns, dtype=dtype)[first : first + 64]
    found = multiply_few(each, weight, scales, block, None)
    assert torch.equal(found.T, decoded(weight, scales, block, dtype)[:, first : first + 64])


@settings(deadline=None, max_examples=40)
@given(
    leading=st.sampled_from([(1,), (2, 3), (17,), (64,), (100,)]),
    rows=st.integers(1, 150),
    columns=st.integers(1, 700),
    block=st.sampled_from(BLOCKS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_products_of_few_rows(
    leading: tuple[int, ...], rows: int, columns: int, block: Block, dtype: torch.dtype, seed: int
) -> None:
    weight, scales = weight_of(rows, columns, block, seed)
    x = torch.randn(*leading, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    exact = decoded(weight, scales, block, dtype).double()
    found = multiply_few(x, weight, scales, block, None)
    assert (found.dtype, found.shape) == (dtype, (*leading, rows))
    assert close(found, x.double() @ exact.T, x.double().abs() @ exact.abs().T, dtype)
    bias = torch.randn(rows).to(dtype)
    strided = x.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(multiply_few(strided, weight, scales, block, bias), found + bias)


@pytest.mark.parametrize("block", [(128, 128), (16, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_where_it_is(block: Block, dtype: torch.dtype) -> None:
    weight, scales = weight_of(130, 300, block, 0)
    weight.view(torch.uint8)[3, 5], weight.view(torch.uint8)[4, 299] = 0x7F, 0xFF
    scales[-1, -1], scales[-1, 0] = float("nan"), float("inf")
    found = multiply_few(torch.ones(1, 300, dtype=dtype), weight, scales, block, None)[0]
    last = 130 // block[0] * block[0]
    assert found.isnan().nonzero().flatten().tolist() == [3, 4, *range(last, 130)]


def test_two_scales_of_one_row_do_not_mix() -> None:
    """Zeros beyond the edge of a group, times an infinite scale, would be NaN."""
    weight, _ = weight_of(4, 50, (1, 40), 0)
    weight = weight.float().abs().clamp(min=1).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, float("inf")]]).expand(4, 2).contiguous()
    found = multiply_few(torch.ones(1, 50), weight, scales, (1, 40), None)
    assert found.isinf().all()


@settings(deadline=None, max_examples=40)
@given(
    count=st.sampled_from([1, 5, 17, 70]),
    rows=st.integers(1, 150),
    columns=st.integers(1, 700),
    block=st.sampled_from(BLOCKS),
    static=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_products_of_codes(
    count: int, rows: int, columns: int, block: Block, static: bool, dtype: torch.dtype, seed: int
) -> None:
    weight, scales = weight_of(rows, columns, block, seed)
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    own, own_scales = Activations(static=static).quantize(x, block, torch.tensor(0.01) if static else None)
    found = multiply_in_triton(own, own_scales, weight, scales, block, dtype)
    assert (found.dtype, found.shape) == (dtype, (count, rows))
    positive = [each.float().abs().to(torch.float8_e4m3fn) for each in (own, weight)]
    magnitude = defined(positive[0], own_scales, positive[1], scales, block)
    assert close(found, defined(own, own_scales, weight, scales, block).double(), magnitude, dtype)


def test_codes_that_are_no_numbers_are_seen() -> None:
    weight, scales = weight_of(40, 300, (16, 40), 0)
    weight.view(torch.uint8)[7, 123] = 0x7F
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    x[1, 299] = float("nan")
    own, own_scales = Activations().quantize(x, (16, 40), None)
    found = multiply_in_triton(own, own_scales, weight, scales, (16, 40), torch.float32)
    expected = torch.zeros(3, 40, dtype=torch.bool)
    expected[1], expected[:, 7] = True, True
    assert torch.equal(found.isnan(), expected)


@settings(deadline=None)
@given(columns=st.integers(1, 20000), block=st.sampled_from(BLOCKS), tiles=st.integers(1, 12), rows=st.integers(1, 80))
def test_chunks_cover_every_column_once(columns: int, block: Block, tiles: int, rows: int) -> None:
    chunks = Chunks.of(columns, block)
    group = min(block[1], columns)
    assert (chunks.per_group - 1) * chunks.size < group <= chunks.per_group * chunks.size
    assert chunks.count == chunks.per_group * -(-columns // group)
    each = chunks.each(tiles, rows, columns, CPU)
    splits = -(-chunks.count // each)
    assert splits * each >= chunks.count > (splits - 1) * each
    assert splits == 1 or 16 * rows * splits <= columns


COMPILE = """
import json, os, sys
os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from quantdock_fp8 import kernels

INTEGERS = ["rows", "inputs", "outputs", "block_rows", "block_columns", "across", "per_group", "chunks", "each"]
ALIGNED = ["inputs", "outputs", "block_rows", "block_columns"]

def made(function, pointers, integers, constants, capability, aligned):
    signature = pointers | dict.fromkeys(integers, "i32") | dict.fromkeys(constants, "constexpr")
    names = [name for name in signature if name in pointers or (aligned and name in ALIGNED)]
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(function, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return compile(source, target=target, options={"num_warps": 4, "num_stages": 3})

found = {}
for capability in map(int, sys.argv[2:]):
    for dtype, chunk in (("bf16", 128), ("fp16", 128), ("fp32", 32)):
        for tall, even in ((16, True), (64, True), (16, False)):
            pointers = {"x": "*" + dtype, "codes": "*u8", "scales": "*fp32", "out": "*fp32"}
            constants = {"HARDWARE": capability >= 89, "WIDE": False, "EVEN": even, "BM": tall, "BN": 64, "BK": chunk}
            kernel = made(kernels.multiply_decoded, pointers, INTEGERS, constants, capability, even)
            name = f"{capability} {dtype} {tall} {even}"
            found[name] = [kernel.metadata.shared, kernel.asm["ptx"], len(kernel.asm["cubin"])]
    for tall, wide in ((16, 64), (64, 128)) if capability >= 89 else ():
        pointers = {"x": "*u8", "own_scales": "*fp32", "codes": "*u8", "scales": "*fp32", "out": "*bf16"}
        integers = [*INTEGERS[:3], "own_down", "own_across", *INTEGERS[3:]]
        constants = {"WIDE": False, "BM": tall, "BN": wide, "BK": 128}
        kernel = made(kernels.multiply_codes, pointers, integers, constants, capability, True)
        found[f"{capability} codes {tall}"] = [kernel.metadata.shared, kernel.asm["ptx"], len(kernel.asm["cubin"])]
json.dump(found, sys.stdout)
"""


@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_every_kernel_compiles(tmp_path: Path, capability: int) -> None:
    found = json.loads(in_new_process("-c", COMPILE, str(tmp_path), str(capability)))
    assert len(found) == (11 if capability >= 89 else 9)
    for name, (shared, ptx, size) in found.items():
        assert size > 0, name
        assert shared <= 99 * 1024, name  # what a block may have on any of these
        assert ".ftz" not in ptx, name  # subnormal products stay what they are
        assert ("e4m3" in ptx or "f8f6f4" in ptx) == (capability >= 89), name  # instructions for 8 bits
        assert name.endswith("False") or "cp.async" in ptx, name  # one chunk is loaded while another is multiplied
