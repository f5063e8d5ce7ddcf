"""Bytes that torch operations of this thread hold at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, follows every storage that an operation returns for as long as it lives.

    It sees what reaches torch's dispatcher, whatever the device. It doesn't see memory that an operation takes and
    gives back inside, nor what is allocated past torch.

    Args:
        given: tensors that are there already, and don't count.

    Attributes:
        peak: most bytes that were alive at once, results included.
    """

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._note(tensor.untyped_storage())
        self._alive = {key: held for key, held in self._alive.items() if not expired(held[0])}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._given:
            self._alive[storage._cdata] = (weak(storage), storage.nbytes())


def weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    """A reference that doesn't keep the storage alive."""
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def expired(reference: StorageWeakRef) -> bool:
    """Whether the storage is gone."""
    return bool(reference.expired())  # type: ignore[no-untyped-call]
