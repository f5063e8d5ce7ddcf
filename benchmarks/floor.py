"""What quantizing alone costs: a program that does nothing else, with the same compiled kernels.

It maps the files, runs the kernel over every quantized weight in two threads, into memory that it allocates on the way,
and gives nothing back. It builds no model, checks nothing and bounds no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch

from benchmarks import readers
from benchmarks.contenders import Load
from benchmarks.jobs import Job

_THREADS = 2
_BLOCKSIZE = 64

_State = dict[str, torch.Tensor]
_Kernel = Callable[[str, torch.Tensor], _State]
"""Name and weight to what is stored for it, under the names of a state dict."""


def floor(job: Job) -> Load:
    """The floor of ``job.case``."""
    kernel = _int8() if job.case == "int8" else _four_bits(job.case)
    read = readers.safetensors(job)

    def load(folder: str) -> _State:
        state: _State = read(folder)
        names = [name for name in state if name.endswith(readers.QUANTIZED)]
        with ThreadPoolExecutor(job.workers or _THREADS) as threads:
            for made in threads.map(kernel, names, [state[name] for name in names]):
                state |= made
        return state

    return load


def _kernels() -> ModuleType:
    """The compiled ones; without them there is no floor to speak of."""
    import quantdock_kernels

    return quantdock_kernels


def _four_bits(quant_type: str) -> _Kernel:
    from quantdock_bnb import fourbit

    kernels, code = _kernels(), fourbit.code_of(quant_type)
    assert code is not None, "the installed bitsandbytes has other codes than quantdock's kernels"

    def quantize(name: str, weight: torch.Tensor) -> _State:
        flat = weight.view(-1)
        packed = torch.empty(flat.numel() // 2, dtype=torch.uint8)
        absmax = torch.empty(flat.numel() // _BLOCKSIZE, dtype=torch.float32)
        kernels.quantize_4bit(
            flat, bounds=code.bounds, codes=code.codes, blocksize=_BLOCKSIZE, packed=packed, absmax=absmax
        )
        return {name: packed.unsqueeze(1), f"{name}.absmax": absmax}

    return quantize


def _int8() -> _Kernel:
    kernels = _kernels()

    def quantize(name: str, weight: torch.Tensor) -> _State:
        codes = torch.empty(weight.shape, dtype=torch.int8)
        scales = torch.empty(weight.shape[0], dtype=torch.float32)
        kernels.quantize_rows_int8(weight, codes=codes, scales=scales)
        return {name: codes, f"{name.removesuffix('weight')}SCB": scales}

    return quantize
