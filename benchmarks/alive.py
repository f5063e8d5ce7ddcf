"""Which weights of a process are there in full precision, as Python's garbage collector sees them."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Collection
from types import TracebackType
from typing import Self

import torch

_INTERVAL = 0.1  # seconds; a look takes some milliseconds
_UNDISTURBED = 2.0  # seconds, far more than a look takes


class Alive:
    """Looks, many times, at how much memory tensors of certain shapes have, and remembers the most.

    Args:
        shapes: of weights.
        dtype: of full precision.
    """

    def __init__(self, shapes: Collection[tuple[int, ...]], dtype: torch.dtype) -> None:
        self.most = 0
        """Bytes."""
        self.looks = 0
        self._shapes, self._dtype = frozenset(shapes), dtype
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def nbytes(self) -> int:
        """Of such tensors in memory now; two that share their memory count once."""
        found: dict[int, int] = {}
        for tensor in _tensors():
            if tensor.dtype == self._dtype and tensor.device.type != "meta":
                nbytes = tensor.nbytes if tuple(tensor.shape) in self._shapes else 0
                found[tensor.data_ptr()] = max(found.get(tensor.data_ptr(), 0), nbytes)
        return sum(found.values())

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            self.most = max(self.most, self.nbytes())
            self.looks += 1


def _tensors() -> list[torch.Tensor]:
    """All there are.

    The garbage collector also lists tuples that another thread is about to make, which Python can't finish while
    anybody else refers to them (a SystemError). So no other thread runs until those references are gone.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_UNDISTURBED)
    try:
        time.sleep(2 * interval)  # by then, those that wait for their turn have taken notice
        # isinstance would ask the things themselves, and some answer by importing something.
        return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    finally:
        sys.setswitchinterval(interval)
