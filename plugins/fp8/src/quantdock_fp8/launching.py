"""What launches of the kernels have in common."""

from __future__ import annotations

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from quantdock_fp8.tiling import Block

_PROGRAMS = 2
"""For each multiprocessor, so that one loads while another multiplies. Worked out, not measured."""

_INTERPRETED = 4
"""Multiprocessors that Triton's interpreter passes for having."""

SMALLEST, LARGEST = 32, 128
"""Columns of a chunk: as many as instructions for 8 bits take at least, and a cache line."""

HARDWARE = (8, 9)
"""The first compute capability with instructions for float8_e4m3fn."""


@functools.cache
def installed() -> bool:
    """Whether there is Triton, which comes with torch's builds for CUDA."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_instructions(device: torch.device) -> bool:
    """Whether a device converts and multiplies float8_e4m3fn by itself."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= HARDWARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """How the columns of a matrix are gone along."""

    size: int
    """Columns of a chunk, a power of two."""
    per_group: int
    """Of each group of columns that share scales; the last may be smaller."""
    count: int

    @classmethod
    def of(cls, columns: int, block: Block, largest: int = LARGEST) -> Chunks:
        """Those of a matrix whose scales are for ``block``."""
        group = min(block[1], columns)
        size = max(SMALLEST, min(largest, power_of_two(group)))
        per_group = -(-group // size)
        return cls(size=size, per_group=per_group, count=-(-columns // group) * per_group)

    def each(self, tiles: int, rows: int, columns: int, device: torch.device) -> int:
        """Chunks that a program takes: fewer, so that there are more of them, if ``tiles`` don't fill the device.

        The sums of all splits are written and read again in float32, 8 bytes for each byte of ``rows / columns`` of the
        weight. With a split for 16 times ``rows`` columns at most, that is half the weight's own bytes.
        """
        wanted = _PROGRAMS * _processors(device) // tiles
        splits = max(1, min(wanted, columns // (16 * rows), self.count))
        return -(-self.count // splits)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def power_of_two(number: int) -> int:
    """The first that isn't smaller."""
    return 1 << (number - 1).bit_length()


def on(device: torch.device) -> AbstractContextManager[object]:
    """What a launch on ``device`` has to be in: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def room(splits: int, rows: int, outputs: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """For the sums of each split, ``[splits, rows, outputs]``: in float32 if there is something left to add up, and for
    the interpreter, which doesn't round."""
    return x.new_empty((splits, rows, outputs), dtype=dtype if splits == 1 and x.is_cuda else torch.float32)


def summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """``[rows, outputs]`` of what ``room`` gave; always in the same order, so that the result is always the same."""
    return (parts[0] if len(parts) == 1 else parts.sum(0)).to(dtype)
