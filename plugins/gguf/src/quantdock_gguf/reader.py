"""The values of a GGUF file's tensors, one tensor at a time, unpacked a few blocks at a time."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from quantdock import CheckpointError, StoredTensor, TensorReader, TensorSpec, UnsupportedError
from quantdock_gguf.header import Header, TensorInfo, fingerprint_of, open_file

Bytes: TypeAlias = npt.NDArray[np.uint8]

CHUNK: Final = 1 << 17
"""Values unpacked at a time: enough that numpy's loops outweigh its calls, few enough to stay in a core's cache."""

_SCRATCH_PER_VALUE = 24
_SCRATCH_BASE = 1 << 20
"""What unpacking takes at the most besides the packed values and the result.

Measured over every type of ``gguf`` 0.19 with tracemalloc: 12 (BF16) to 19.5 (IQ types, Q5_K) bytes a value at full
chunks, and up to 30 at a sixteenth of one, where fixed costs weigh more; the first use of an IQ type adds up to 0.6 MB
to build its table. transformers' torch code takes 4 to 17 bytes a value.
"""

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.I8: torch.int8,
    GGMLQuantizationType.I16: torch.int16,
    GGMLQuantizationType.I32: torch.int32,
    GGMLQuantizationType.I64: torch.int64,
}


class GGUFTensorReader(TensorReader):
    """Reads the tensors of one GGUF file.

    Plain types are delivered as they are stored (``gguf`` itself would widen F16 and BF16). Blocks are unpacked by
    ``gguf.dequantize`` to float32; packed weights are delivered in the dtype of the model, cast chunk by chunk, so that
    no float32 copy of a large tensor is ever made.

    The file is read with ``pread`` and never mapped: its pages don't count as this process's memory, and a file that
    shrinks meanwhile is an error instead of a crash.
    """

    def __init__(self, header: Header, *, dtype: torch.dtype = torch.float32, compute_in_dtype: bool = False) -> None:
        """Open the file that ``header`` was read from.

        Args:
            header: of the file.
            dtype: in which packed weights are delivered.
            compute_in_dtype: unpack with transformers' torch code in ``dtype`` throughout, for the types it has. That
                rounds more than once, and is what transformers does for some architectures.

        Raises:
            CheckpointError: the file can't be opened, or was changed since its header was read.
        """
        self.header = header
        self._dtype = dtype
        self._compute_in_dtype = compute_in_dtype and dtype != torch.float32
        self._infos = {info.name: info for info in header.tensors}
        self._descriptor = open_file(header.file)
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        if fingerprint_of(self._descriptor) != header.fingerprint:
            raise CheckpointError("was changed while it was being opened", file=header.file)

    def tensors(self) -> Iterator[StoredTensor]:
        """The file's tensors in the order of their values.

        Raises:
            UnsupportedError: there is one of a type that can't be unpacked.
        """
        for info in sorted(self.header.tensors, key=lambda info: info.start):
            yield StoredTensor(
                name=info.name,
                spec=TensorSpec(dtype=self._delivered(info), shape=info.shape),
                file=self.header.file,
                offset=info.start,
                stored_nbytes=info.nbytes,
                reader=self,
            )

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        info = self._infos[tensor.name]
        values = torch.empty(tensor.spec.numel, dtype=tensor.spec.dtype)
        if info.kind in _PLAIN:
            self._fill(values.view(torch.uint8).numpy(), info, 0)
        else:
            self._unpack(values, info)
        return values.view(info.shape)

    def working_bytes(self, tensor: StoredTensor) -> int:
        info = self._infos[tensor.name]
        if info.kind in _PLAIN:
            return tensor.spec.nbytes
        block, block_bytes = _block(info.kind)
        packed = min(info.nbytes, CHUNK // block * block_bytes)
        return tensor.spec.nbytes + packed + _SCRATCH_PER_VALUE * min(CHUNK, tensor.spec.numel) + _SCRATCH_BASE

    def will_need(self, tensor: StoredTensor, start: int = 0, nbytes: int | None = None) -> None:
        if hasattr(os, "posix_fadvise") and self._closing.alive:
            info = self._infos[tensor.name]
            left = info.nbytes - start
            count = left if nbytes is None else min(left, nbytes)
            os.posix_fadvise(self._descriptor, info.start + start, count, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        self._closing()

    def _delivered(self, info: TensorInfo) -> torch.dtype:
        if info.kind in _PLAIN:
            return _PLAIN[info.kind]
        if not _can_unpack(info.kind):
            raise UnsupportedError(
                f"{self.header.file}: tensor {info.name!r} is {info.kind.name}, which the gguf package can't unpack; "
                "requantize the file to another type"
            )
        # Some tensors are stored with an offset or as a logarithm, and have to be computed with in float32 before they
        # are rounded. Those aren't weights of this form, which are only ever moved.
        return self._dtype if info.name.endswith(".weight") and len(info.shape) > 1 else torch.float32

    def _unpack(self, values: torch.Tensor, info: TensorInfo) -> None:
        block, block_bytes = _block(info.kind)
        step = CHUNK // block * block_bytes
        packed = np.empty(min(step, info.nbytes), dtype=np.uint8)
        for start in range(0, info.nbytes, step):
            part = packed[: min(step, info.nbytes - start)]
            self._fill(part, info, start)
            first = start // block_bytes * block
            target = values[first : first + part.size // block_bytes * block]
            if self._compute_in_dtype and info.kind in _torch_kinds():
                target.copy_(_unpack_by_torch(part, info.kind, self._dtype))
                continue
            # Scales that are infinite or NaN in the file give NaN, as they do in the library; numpy would warn.
            with np.errstate(all="ignore"):
                target.copy_(torch.from_numpy(dequantize(part, info.kind)))

    def _fill(self, target: Bytes, info: TensorInfo, skip: int) -> None:
        if not self._closing.alive:
            raise CheckpointError("was closed", file=self.header.file, tensor=info.name)
        view, done = memoryview(target.data), 0
        while done < len(view):
            try:
                got = os.preadv(self._descriptor, [view[done:]], info.start + skip + done)
            except OSError as error:
                raise CheckpointError(
                    f"can't be read ({error.strerror})", file=self.header.file, tensor=info.name
                ) from error
            if not got:
                raise CheckpointError(
                    "ends before its values do: the file has shrunk", file=self.header.file, tensor=info.name
                )
            done += got


def _block(kind: GGMLQuantizationType) -> tuple[int, int]:
    """Values and bytes of a block."""
    values, packed = GGML_QUANT_SIZES[kind]
    return int(values), int(packed)


@cache
def _can_unpack(kind: GGMLQuantizationType) -> bool:
    """Whether ``gguf`` has code for this type; it knows the block sizes of more."""
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@cache
def _torch_kinds() -> frozenset[int]:
    from transformers.integrations.gguf.dequant import GGML_BLOCK

    return frozenset(GGML_BLOCK)


def _unpack_by_torch(packed: Bytes, kind: GGMLQuantizationType, dtype: torch.dtype) -> torch.Tensor:
    from transformers.integrations.gguf.dequant import dequantize as dequantize_by_torch

    values: torch.Tensor = dequantize_by_torch(torch.from_numpy(packed), int(kind), dtype)
    return values
