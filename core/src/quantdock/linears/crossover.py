"""Up to how many rows of activations kernels for packed integers are faster than dequantizing.

Their time grows with the rows. Dequantizing takes the same time for any number of rows, and then comes a product in
bfloat16, whose time depends on what the CPU has for it. Where it has nothing, that product alone takes longer than the
kernels do, for any number of rows. Measured with torch 2.13 and one thread on weights of 576 x 576 to 4096 x 11008,
between which the row counts hardly differ (256 rows by 4096 x 4096 take ``words`` 85 ms, a product in bfloat16 104);
without bfloat16 by telling oneDNN not to use it. The line of AMX is worked
out from the times of the kernels and of products in bfloat16 on a CPU that has it, and of dequantizing on one that
hasn't.

For GPUs the numbers are worked out, not measured: dequantizing 4096 x 4096 moves some 230 MB through memory for any
number of rows, torch's kernel reads the codes again for every 16 rows and the Triton one for every 64.
"""

from __future__ import annotations

import functools
import sys

import torch

ROWS: dict[str, dict[str, int]] = {
    "AMX": {"words": 32, "int4pack": 24, "int8pack": 16},
    "AVX512_BF16": {"words": sys.maxsize, "int4pack": 256, "int8pack": 128},
    "": {"words": sys.maxsize, "int4pack": sys.maxsize, "int8pack": sys.maxsize},
}
"""What the CPU multiplies bfloat16 with (``""`` for nothing) -> path -> most rows."""

DEVICE_ROWS = {"int4pack": 128, "triton": 256}
"""Path -> most rows, on GPUs."""


@functools.cache
def multiplies_with() -> str:
    """This CPU's line of ``ROWS``."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512_BF16" if torch.cpu._is_avx512_bf16_supported() else ""


def most_rows(path: str) -> int:
    """Of activations, on this CPU."""
    return ROWS[multiplies_with()][path]
