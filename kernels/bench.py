"""Nanoseconds per element of each kernel, by instruction set and threads, beside torch and bitsandbytes (if installed).

Run it as ``python kernels/bench.py [elements]``, on a machine that does nothing else. Each figure is the best of seven.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

os.environ["QUANTDOCK_KERNELS"] = "off"  # the operations of quantdock stand for torch here

import torch
from torch import Tensor

import quantdock_kernels as kernels
from quantdock import ops

Step = Callable[[Tensor], object]
BLOCKSIZE, COLUMNS = 64, 4096


def four_bit(count: int) -> tuple[Callable[[str], Step], Step, Step | None]:
    bounds = torch.linspace(-0.9, 0.9, 15)
    codes = torch.arange(16, dtype=torch.uint8)

    def call(function: Callable[..., None], **options: str) -> Step:
        packed, absmax = torch.empty(count // 2, dtype=torch.uint8), torch.empty(count // BLOCKSIZE)
        return lambda flat: function(
            flat, bounds=bounds, codes=codes, blocksize=BLOCKSIZE, packed=packed, absmax=absmax, **options
        )

    reference: Step | None = None
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes as bnb

        def reference(flat: Tensor) -> object:
            return bnb.functional.quantize_4bit(flat, quant_type="nf4")

    return lambda name: call(kernels.quantize_4bit, instruction_set=name), call(ops.quantize_blockwise_4bit), reference


def eight_bit(count: int) -> tuple[Callable[[str], Step], Step, Step | None]:
    table = (torch.arange(1 << 16) >> 8).to(torch.uint8)

    def call(function: Callable[..., None], **options: str) -> Step:
        codes, absmax = torch.empty(count, dtype=torch.uint8), torch.empty(-(-count // 256))
        return lambda flat: function(flat, table=table, blocksize=256, codes=codes, absmax=absmax, **options)

    reference: Step | None = None
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes as bnb

        def reference(flat: Tensor) -> object:
            return bnb.functional.quantize_blockwise(flat, blocksize=256)

    return lambda name: call(kernels.quantize_8bit, instruction_set=name), call(ops.quantize_blockwise_8bit), reference


def rows(count: int) -> tuple[Callable[[str], Step], Step, Step | None]:
    def call(function: Callable[..., None], **options: str) -> Step:
        codes, scales = torch.empty(count // COLUMNS, COLUMNS, dtype=torch.int8), torch.empty(count // COLUMNS)
        return lambda flat: function(flat.view(-1, COLUMNS), codes=codes, scales=scales, **options)

    reference: Step | None = None
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes as bnb

        def reference(flat: Tensor) -> object:
            return bnb.functional.int8_vectorwise_quant(flat.view(-1, COLUMNS).half())

    return lambda name: call(kernels.quantize_rows_int8, instruction_set=name), call(ops.quantize_rows_int8), reference


def nanoseconds(steps: list[Step], weights: list[Tensor]) -> float:
    """Per element, with one thread for each step."""
    best = float("inf")
    with ThreadPoolExecutor(len(steps)) as pool:
        for _ in range(7):
            start = time.perf_counter()
            list(pool.map(lambda step, flat: step(flat), steps, weights))
            best = min(best, time.perf_counter() - start)
    return best * 1e9 / sum(flat.numel() for flat in weights)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1 << 22
    count = max(COLUMNS, count // COLUMNS * COLUMNS)
    torch.set_num_threads(1)
    threads = [1] if (os.cpu_count() or 1) == 1 else [1, 2]
    print(f"{count} elements per thread; ns per element")
    for title, make in {"4-bit": four_bit, "8-bit": eight_bit, "rows int8": rows}.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            weights = [torch.randn(count).mul_(0.02).to(dtype) for _ in range(max(threads))]
            _, definition, reference = make(count)
            figures = {
                f"{name} x{n}": nanoseconds([make(count)[0](name) for _ in range(n)], weights[:n])
                for name in kernels.instruction_sets()
                for n in threads
            }
            figures["torch x1"] = nanoseconds([definition], weights[:1])
            if reference is not None:
                figures["bitsandbytes x1"] = nanoseconds([reference], weights[:1])
            listed = "  ".join(f"{name} {figure:.2f}" for name, figure in figures.items())
            print(f"{title:10} {str(dtype).removeprefix('torch.'):9} {listed}")


if __name__ == "__main__":
    main()
