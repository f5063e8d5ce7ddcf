"""The memory that a worker copies through: a reused buffer on the CPU, and a pinned ring to each CUDA device.

Nothing here grows with a load: a worker has one buffer of the largest slice it has met, and ``STAGING`` pinned bytes to
each device that it has copied to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Self

import torch

from quantdock.pagecache import release
from quantdock.units import SLICE, STAGING


class Staging:
    """One worker's; never shared between threads."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._rings: dict[torch.device, _Ring] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for ring in self._rings.values():
            ring.stream.synchronize()
        self._rings.clear()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor that is valid until the next call; on the CPU it is always the same memory."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if nbytes > self._buffer.nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return self._buffer[:nbytes].view(dtype).view(shape)

    def on(self, device: torch.device | str) -> AbstractContextManager[None]:
        """Run the block's kernels on this worker's own stream of ``device``, and wait for them at the end."""
        return nullcontext() if isinstance(device, str) or device.type != "cuda" else self._streaming(device)

    @contextmanager
    def _streaming(self, device: torch.device) -> Iterator[None]:
        ring = self._ring(device)
        with torch.cuda.stream(ring.stream):
            yield
            ring.stream.synchronize()

    def copy(self, source: torch.Tensor, target: torch.Tensor, *, drop: bool) -> None:
        """Copy, cast and move ``SLICE`` bytes at a time.

        Args:
            source: on the CPU; any strides.
            target: of the same shape, on any device. To a CUDA device this only queues the last copies: inside of
                ``on`` they are finished at the end of the block.
            drop: ``source`` is a view of a mapped file; let go of its pages behind.
        """
        for part, into in _in_slices(source, target):
            if into.device.type == "cuda":
                self._ring(into.device).send(part, into)
            else:
                into.copy_(part)
            if drop:
                release(part)

    def moved(self, source: torch.Tensor, device: torch.device, *, drop: bool) -> torch.Tensor:
        """``source`` itself if it is on ``device`` already, else a copy there."""
        if source.device == device:
            return source
        target = torch.empty(source.shape, dtype=source.dtype, device=device)
        self.copy(source, target, drop=drop)
        return target

    def _ring(self, device: torch.device) -> _Ring:
        if device not in self._rings:
            self._rings[device] = _Ring(device)
        return self._rings[device]


class _Ring:
    """Pinned memory in two halves: one is filled by the CPU while the other is on its way to the device."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._halves = torch.empty(2, STAGING // 2, dtype=torch.uint8, pin_memory=True).unbind()
        self._sent = [torch.cuda.Event(), torch.cuda.Event()]  # type: ignore[no-untyped-call]
        self._next = 0

    def send(self, part: torch.Tensor, into: torch.Tensor) -> None:
        """Queue a copy; waits only for the one before the last."""
        nbytes = into.numel() * into.dtype.itemsize
        if nbytes > STAGING // 2:  # a single row that is larger than a slice
            into.copy_(part)
            return
        half, sent = self._halves[self._next], self._sent[self._next]
        self._next = 1 - self._next
        sent.synchronize()  # returns at once when it was never recorded
        pinned = half[:nbytes].view(into.dtype).view(into.shape)
        pinned.copy_(part)  # the cast happens here, on the CPU
        with torch.cuda.stream(self.stream):
            into.copy_(pinned, non_blocking=True)
            sent.record(self.stream)


def _in_slices(source: torch.Tensor, target: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both, cut along the first dimension into pieces of about ``SLICE`` bytes of the larger one."""
    nbytes = max(source.nbytes, target.nbytes)
    if source.dim() == 0 or nbytes <= SLICE:
        yield source, target
        return
    rows = max(1, SLICE * source.shape[0] // nbytes)
    if rows == 1 and source.dim() > 1 and nbytes // source.shape[0] > SLICE:
        for part, into in zip(source, target, strict=True):
            yield from _in_slices(part, into)
        return
    for start in range(0, source.shape[0], rows):
        yield source[start : start + rows], target[start : start + rows]
