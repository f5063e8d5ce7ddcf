"""Which weights of a process are there in full precision, as Python's garbage collector sees them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Collection
from types import TracebackType
from typing import Self

import torch

_INTERVAL = 0.1  # seconds; a look takes some milliseconds


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
        for thing in gc.get_objects():
            # isinstance would ask the thing itself, and some answer by importing something.
            if issubclass(type(thing), torch.Tensor) and thing.dtype == self._dtype and thing.device.type != "meta":
                nbytes = thing.nbytes if tuple(thing.shape) in self._shapes else 0
                found[thing.data_ptr()] = max(found.get(thing.data_ptr(), 0), nbytes)
        return sum(found.values())

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            self.most = max(self.most, self.nbytes())
            self.looks += 1
