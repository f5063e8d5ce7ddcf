"""What modules that multiply in more than one way tell of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Those that models are in."""


class HasPaths(ABC):
    """A module that chooses how to multiply by its weight, its device and the dtype of activations; the report of a
    load says what it chose."""

    @abstractmethod
    def path(self, dtype: torch.dtype) -> str:
        """How activations of ``dtype`` are multiplied in evaluation, where the module is now: one word."""

    def paths(self) -> Mapping[str, str]:
        """What ``path`` says for each dtype that models are in."""
        return by_dtype(self.path)


def by_dtype(path: Callable[[torch.dtype], str]) -> dict[str, str]:
    """What is said for each dtype that models are in, by their names: ``bfloat16`` and so on."""
    return {str(dtype).removeprefix("torch."): path(dtype) for dtype in DTYPES}
