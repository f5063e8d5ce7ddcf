"""The shared library: found, loaded, and asked for the variants that this processor can run."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import quantdock_kernels

ABI = 6
"""Which functions there are and how they are called; the library and ``quantdock.ops`` have to have the same number."""

VARIABLE = "QUANTDOCK_KERNELS"
"""Environment variable that names the best instruction set to use."""

_NAMES = ("libquantdock_kernels.so", "libquantdock_kernels.dylib")


def load(path: Path) -> ctypes.CDLL:
    """Load a build of the library.

    Raises:
        ImportError: it can't be loaded, isn't this library, or is of another ABI.
    """
    try:
        library = ctypes.CDLL(str(path))
        abi = library.qd_abi()
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"the compiled library of quantdock-kernels can't be used: {error}; install quantdock-kernels again"
        ) from error
    if abi != ABI:
        raise ImportError(
            f"{path} has ABI {abi}, expected {ABI}: it was built from other sources; install quantdock-kernels again"
        )
    library.qd_instruction_sets.restype = ctypes.c_char_p
    library.qd_prefer_large_pages.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    library.qd_prefer_large_pages.restype = None
    return library


@functools.cache
def _library() -> ctypes.CDLL:
    # An editable install has the library in one folder of the package and the Python files in another.
    folders = [Path(folder) for folder in quantdock_kernels.__path__]
    for folder in folders:
        for name in _NAMES:
            if (folder / name).is_file():
                return load(folder / name)
    raise ImportError(
        f"quantdock-kernels has no compiled library in {' or '.join(map(str, folders))}; install it again, "
        "from a wheel or with a C compiler"
    )


def prefer_large_pages(address: int, size: int) -> None:
    """Ask the system for large pages in memory that nobody has touched yet."""
    _library().qd_prefer_large_pages(address, size)


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this processor can run, best first; the last one is ``"baseline"``."""
    names: bytes = _library().qd_instruction_sets()
    return tuple(names.decode().split())


def instruction_set() -> str:
    """The instruction set that kernels use: the best one, or what ``QUANTDOCK_KERNELS`` names.

    Raises:
        ValueError: the variable names something that this processor, or this library, doesn't have.
    """
    asked = os.environ.get(VARIABLE, "")
    if not asked:
        return instruction_sets()[0]
    if asked not in instruction_sets():
        raise ValueError(
            f"{VARIABLE} is {asked!r}, expected 'off' (for quantdock to do without compiled kernels) or one of "
            f"{', '.join(instruction_sets())}"
        )
    return asked


def function(name: str, variant: str | None, *arguments: type[object]) -> Callable[..., None]:
    """A kernel by its name in C, for one instruction set or for ``instruction_set()``.

    Args:
        name: such as ``"quantize_4bit"``.
        variant: one of ``instruction_sets()``, or ``None``.
        arguments: the ctypes of its parameters.

    Raises:
        ValueError: this processor can't run that variant.
    """
    if variant is not None and variant not in instruction_sets():
        raise ValueError(f"instruction set {variant!r}: expected one of {', '.join(instruction_sets())}")
    return _function(name, variant or instruction_set(), arguments)


@functools.cache
def _function(name: str, variant: str, arguments: tuple[type[object], ...]) -> Callable[..., None]:
    found = getattr(_library(), f"qd_{variant}_{name}")
    found.argtypes = arguments
    found.restype = None
    return found  # type: ignore[no-any-return]


# A broken installation shows when the package is imported, not at the first weight.
_library()
