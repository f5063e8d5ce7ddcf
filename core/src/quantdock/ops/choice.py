"""Compiled code or torch: decided once per process, and told."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING

from quantdock.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "QUANTDOCK_KERNELS"

_PACKAGE = "quantdock-kernels"
_ABI = 6
"""Which compiled functions this version calls, and how; see ``quantdock_kernels.ABI``."""


def implementation() -> str:
    """What the operations run on, such as ``"quantdock-kernels 0.1.0 (avx512)"``, or ``"torch (...)"`` and why.

    Raises:
        ConfigError: ``QUANTDOCK_KERNELS`` names an instruction set that isn't there.
    """
    return _choice()[1]


def compiled(tensor: Tensor) -> ModuleType | None:
    """The module ``quantdock_kernels`` if it is to be used on ``tensor``, which has to be in CPU memory for that.

    Raises:
        ConfigError: ``QUANTDOCK_KERNELS`` names an instruction set that isn't there.
    """
    return kernels() if tensor.device.type == "cpu" else None


def kernels() -> ModuleType | None:
    """The module ``quantdock_kernels`` if it is to be used, on tensors in CPU memory.

    Raises:
        ConfigError: ``QUANTDOCK_KERNELS`` names an instruction set that isn't there.
    """
    return _choice()[0]


@functools.cache
def _choice() -> tuple[ModuleType | None, str]:
    if os.environ.get(VARIABLE) == "off":
        return None, f"torch ({VARIABLE} is 'off')"
    try:
        found = importlib.import_module("quantdock_kernels")
    except ModuleNotFoundError as error:
        if error.name == "quantdock_kernels":
            return None, f"torch ({_PACKAGE} is not installed)"
        return None, f"torch ({_PACKAGE} can't be imported: {error})"
    except ImportError as error:
        return None, f"torch ({error})"
    if found.ABI != _ABI:
        return None, f"torch ({_PACKAGE} {found.__version__} has ABI {found.ABI}, this quantdock needs {_ABI})"
    try:
        return found, f"{_PACKAGE} {found.__version__} ({found.instruction_set()})"
    except ValueError as error:
        raise ConfigError(str(error)) from error
