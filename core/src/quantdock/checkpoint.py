"""The weight files of a source, as an index of stored tensors read from headers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quantdock.tensors import StoredTensor


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What ``find_checkpoints`` returns: every stored tensor, validated, not one value read."""

    format: str
    """``safetensors``, ``pickle``, or what a plugin calls its own."""
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all values, as stored."""
        return sum(tensor.stored_nbytes for tensor in self.tensors.values())

    @property
    def float_dtype(self) -> torch.dtype | None:
        """Dtype of the first floating tensor of 16 bits or more, which is how ``dtype="auto"`` reads a checkpoint."""
        for tensor in self.tensors.values():
            if tensor.spec.dtype.is_floating_point and tensor.spec.dtype.itemsize >= 2:
                return tensor.spec.dtype
        return None

    def close(self) -> None:
        """Close the files; tensors that were read stay valid."""
        for reader in {id(tensor.reader): tensor.reader for tensor in self.tensors.values()}.values():
            reader.close()
