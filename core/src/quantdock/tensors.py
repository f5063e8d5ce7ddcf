"""The nouns of a load: tensors as they are described, stored and named as parameters of a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

Role = Literal["linear", "linear-transposed", "embedding", "other"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Dtype and shape of a tensor that need not exist."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Exact bytes of the tensor's values."""
        return self.numel * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(dtype=tensor.dtype, shape=tuple(tensor.shape))

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class TensorReader(ABC):
    """Gives the values of the stored tensors of one file. Used from several threads at once."""

    @abstractmethod
    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The tensor's values, with exactly ``tensor.spec``'s dtype and shape.

        A reader whose ``maps`` is true returns a view of a private map of the file: no byte is copied, and writing to
        the view never reaches the file. Any other reader returns memory of its own.
        """

    @property
    def maps(self) -> bool:
        """Whether ``read`` returns views of the mapped file instead of copies."""
        return False

    def working_bytes(self, tensor: StoredTensor) -> int:
        """Bytes in flight at the most while ``read`` runs, its result included."""
        return tensor.spec.nbytes

    def will_need(  # noqa: B027 - advice that a reader may have no use for
        self, tensor: StoredTensor, start: int = 0, nbytes: int | None = None
    ) -> None:
        """The tensor is going to be read soon; a good moment for read-ahead.

        Args:
            tensor: which one.
            start: byte of its values that it begins with.
            nbytes: how many; ``None`` for all that follow.
        """

    def populator(self, start: int, stop: int) -> Callable[[], None] | None:
        """What makes the first use of bytes ``start`` to ``stop`` of the file cheap, which stay mapped in the model.

        Called in a thread of its own, which nobody waits for. ``None`` where there is no such thing, or where it would
        have to wait for a disk.

        Raises:
            CheckpointError: the file is gone or has changed.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Give back what isn't referenced by a tensor that was read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One entry of a checkpoint, known from headers only."""

    name: str
    spec: TensorSpec
    """What ``read`` delivers."""
    file: Path
    offset: int
    """Byte offset of the values in the file; units run in this order."""
    stored_nbytes: int
    """Bytes the values take in the file (fewer than ``spec.nbytes`` for packed formats)."""
    reader: TensorReader = field(repr=False, compare=False)

    def read(self) -> torch.Tensor:
        """The values (see ``TensorReader.read``)."""
        return self.reader.read(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One slot of the skeleton: a parameter or persistent buffer, by fully qualified name; any rank."""

    name: str
    spec: TensorSpec
    """Shape, and the dtype it gets in full precision."""
    module_type: type[torch.nn.Module]
    """Class of the module that owns it."""
    role: Role = "other"
    """``linear``: the weight of an ``nn.Linear``, ``[out, in]``; ``linear-transposed``: the same as ``[in, out]``."""
    is_buffer: bool = False

    @property
    def module(self) -> str:
        """Dotted path of the owning module, empty for the root."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Name inside the owning module."""
        return self.name.rpartition(".")[2]

    def owner(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module of ``model`` that holds it.

        Raises:
            KeyError: there is no such module.
        """
        return submodule(model, self.module)


def qualified(module: str, leaf: str) -> str:
    """The dotted name of ``leaf`` in ``module``."""
    return f"{module}.{leaf}" if module else leaf


def submodule(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """``model.get_submodule(path)``, in a twentieth of the time.

    Raises:
        KeyError: there is no such module.
    """
    module: torch.nn.Module | None = model
    for leaf in path.split(".") if path else ():
        module = None if module is None else module._modules[leaf]
    if module is None:
        raise KeyError(path)
    return module
