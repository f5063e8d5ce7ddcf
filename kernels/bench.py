"""Nanoseconds per element of each kernel, by instruction set and threads, beside torch and bitsandbytes (if installed).

Run it as ``python kernels/bench.py [elements [kernel ...]]``, on a machine that does nothing else. Each figure is the
best of seven.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

os.environ["QUANTDOCK_KERNELS"] = "off"  # the operations of quantdock stand for torch here

import torch
from torch import Tensor

import quantdock_kernels as kernels
from quantdock import ops

BLOCKSIZE, COLUMNS, GROUP, TILE = 64, 4096, 128, (128, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A kernel, and the operation of the same arguments."""

    title: str
    kernel: Callable[..., None]
    operation: Callable[..., None]
    dtype: torch.dtype
    arguments: Callable[[Tensor], dict[str, object]]
    """From a vector of weights."""
    reference: Callable[[Tensor], object] | None = None


def blockwise(dtype: torch.dtype) -> Iterator[Case]:
    def four_bit(flat: Tensor) -> dict[str, object]:
        packed, absmax = torch.empty(len(flat) // 2, dtype=torch.uint8), torch.empty(len(flat) // BLOCKSIZE)
        bounds, codes = torch.linspace(-0.9, 0.9, 15), torch.arange(16, dtype=torch.uint8)
        return {
            "flat": flat,
            "bounds": bounds,
            "codes": codes,
            "blocksize": BLOCKSIZE,
            "packed": packed,
            "absmax": absmax,
        }

    def eight_bit(flat: Tensor) -> dict[str, object]:
        codes, absmax = torch.empty(len(flat), dtype=torch.uint8), torch.empty(-(-len(flat) // 256))
        table = (torch.arange(1 << 16) >> 8).to(torch.uint8)
        return {"flat": flat, "table": table, "blocksize": 256, "codes": codes, "absmax": absmax}

    def rows(flat: Tensor) -> dict[str, object]:
        matrix = flat.view(-1, COLUMNS)
        return {
            "matrix": matrix,
            "codes": torch.empty(matrix.shape, dtype=torch.int8),
            "scales": torch.empty(len(matrix)),
        }

    references: list[Callable[[Tensor], object] | None] = [None, None, None]
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes import functional

        references = [
            lambda flat: functional.quantize_4bit(flat, quant_type="nf4"),
            lambda flat: functional.quantize_blockwise(flat, blocksize=256),
            lambda flat: functional.int8_vectorwise_quant(flat.view(-1, COLUMNS).half()),
        ]
    yield Case("quantize_4bit", kernels.quantize_4bit, ops.quantize_blockwise_4bit, dtype, four_bit, references[0])
    yield Case("quantize_8bit", kernels.quantize_8bit, ops.quantize_blockwise_8bit, dtype, eight_bit, references[1])
    yield Case("quantize_rows_int8", kernels.quantize_rows_int8, ops.quantize_rows_int8, dtype, rows, references[2])


def grouped(dtype: torch.dtype) -> Iterator[Case]:
    def results(flat: Tensor, *names: str) -> dict[str, object]:
        matrix = flat.view(-1, COLUMNS)
        made = {name: torch.empty(len(matrix), COLUMNS // GROUP, dtype=dtype) for name in names}
        return {"matrix": matrix, "group": GROUP, **made}

    def affine(flat: Tensor) -> dict[str, object]:
        matrix = flat.view(-1, COLUMNS)
        shape = len(matrix), COLUMNS // GROUP
        return {
            "matrix": matrix,
            "group": GROUP,
            "scales": torch.full(shape, 0.01),
            "shifts": None,
            "zeros": torch.full(shape, 8, dtype=torch.uint8),
            "divide": True,
            "lowest": 0,
            "highest": 15,
            "codes": torch.empty(matrix.shape, dtype=torch.uint8),
        }

    extremes = ("smallest", "largest")
    yield Case(
        "group_extremes", kernels.group_extremes, ops.group_extremes, dtype, lambda flat: results(flat, *extremes)
    )
    yield Case(
        "group_magnitudes",
        kernels.group_magnitudes,
        ops.group_magnitudes,
        dtype,
        lambda flat: results(flat, "magnitudes"),
    )
    yield Case("quantize_affine", kernels.quantize_affine, ops.quantize_affine, dtype, affine)


def fp8(dtype: torch.dtype) -> Iterator[Case]:
    def encode(flat: Tensor) -> dict[str, object]:
        matrix = flat.view(-1, COLUMNS)
        grid = -(-len(matrix) // TILE[0]), COLUMNS // TILE[1]
        codes = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
        return {"matrix": matrix, "scales": torch.full(grid, 1e4), "block": TILE, "divide": False, "codes": codes}

    def decode(flat: Tensor) -> dict[str, object]:
        codes = flat.view(-1, COLUMNS).float().mul_(1e4).to(torch.float8_e4m3fn)
        grid = -(-len(codes) // TILE[0]), COLUMNS // TILE[1]
        out = torch.empty(codes.shape, dtype=dtype)
        return {"codes": codes, "scales": torch.full(grid, 1e-4), "block": TILE, "out": out}

    yield Case("encode_fp8", kernels.encode_fp8, ops.encode_fp8, dtype, encode)
    yield Case("decode_fp8", kernels.decode_fp8, ops.decode_fp8, dtype, decode)


def casts(dtype: torch.dtype) -> Iterator[Case]:
    for target in (torch.bfloat16, torch.float16):
        if dtype not in (target, torch.float32):

            def arguments(flat: Tensor, target: torch.dtype = target) -> dict[str, object]:
                return {"flat": flat, "out": torch.empty(len(flat), dtype=target)}

            yield Case(f"cast to {name_of(target)}", kernels.cast, ops.cast, dtype, arguments)


def words() -> Iterator[Case]:
    for dim, turn, bits, awq in (
        *((dim, turn, 4, False) for dim in (0, 1) for turn in (False, True)),
        (0, True, 3, False),
        (1, True, 4, True),
    ):

        def arguments(
            flat: Tensor, dim: int = dim, turn: bool = turn, bits: int = bits, awq: bool = awq
        ) -> dict[str, object]:
            rows = len(flat) // COLUMNS
            length = rows if dim == turn else COLUMNS  # of a stream
            count = -(-length * bits // 32)
            shape = (len(flat) // length, count) if dim else (count, len(flat) // length)
            codes = torch.zeros(rows, COLUMNS, dtype=torch.uint8)
            return {
                "words": torch.zeros(shape, dtype=torch.int32),
                "codes": codes,
                "bits": bits,
                "dim": dim,
                "turn": turn,
                "interleaved": awq,
            }

        what = f"{bits} bits{' awq' if awq else ''} dim={dim}{' turn' if turn else ''}"
        yield Case(f"unpack_words {what}", kernels.unpack_words, ops.unpack_words, torch.float32, arguments)
        yield Case(f"pack_words {what}", kernels.pack_words, ops.pack_words, torch.float32, arguments)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def nanoseconds(steps: list[Step], count: int) -> float:
    """Per element, with one thread for each step."""
    best = float("inf")
    with ThreadPoolExecutor(len(steps)) as pool:
        for _ in range(7):
            start = time.perf_counter()
            list(pool.map(lambda step: step(), steps))
            best = min(best, time.perf_counter() - start)
    return best * 1e9 / (count * len(steps))


def step(function: Callable[..., None], arguments: dict[str, object], **options: str) -> Step:
    return lambda: function(**arguments, **options)


def measure(case: Case, count: int, threads: list[int]) -> dict[str, float]:
    weights = [torch.randn(count).mul_(0.02).to(case.dtype) for _ in range(max(threads))]
    arguments = [case.arguments(flat) for flat in weights]
    figures = {
        f"{name} x{n}": nanoseconds([step(case.kernel, some, instruction_set=name) for some in arguments[:n]], count)
        for name in kernels.instruction_sets()
        for n in threads
    }
    figures["torch x1"] = nanoseconds([step(case.operation, arguments[0])], count)
    if case.reference is not None:
        reference, flat = case.reference, weights[0]
        figures["bitsandbytes x1"] = nanoseconds([lambda: reference(flat)], count)
    return figures


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1 << 22
    count = max(COLUMNS * 32, count // (COLUMNS * 32) * COLUMNS * 32)
    wanted = sys.argv[2:]
    torch.set_num_threads(1)
    threads = [1] if (os.cpu_count() or 1) == 1 else [1, 2]
    print(f"{count} elements per thread; ns per element")
    cases = [case for make in (blockwise, grouped, fp8, casts) for dtype in DTYPES for case in make(dtype)]
    for case in [*cases, *words()]:
        if not wanted or any(case.title.startswith(name) for name in wanted):
            figures = "  ".join(f"{name} {value:.2f}" for name, value in measure(case, count, threads).items())
            kind = "" if "words" in case.title else name_of(case.dtype)
            print(f"{case.title:34} {kind:9} {figures}", flush=True)


if __name__ == "__main__":
    main()
