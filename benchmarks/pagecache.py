"""Put files into the kernel's page cache, or take them out and look whether they are gone."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

_CHUNK = 1 << 24
_COLD_ENOUGH = 0.01


class PageCacheError(Exception):
    """The page cache isn't as it was asked to be."""


def warm(files: Sequence[Path]) -> None:
    """Read the files once."""
    buffer = bytearray(_CHUNK)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def cool(files: Sequence[Path]) -> None:
    """Ask the kernel to forget the files, and check that it did.

    Raises:
        PageCacheError: pages are still there (somebody has the files mapped, or they aren't on a disk).
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    left = resident_share(files)
    if left > _COLD_ENOUGH:
        raise PageCacheError(f"{left:.0%} of the checkpoint stays in the page cache, so this run can't be called cold")


def resident_share(files: Sequence[Path]) -> float:
    """Which part of the files' pages the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    present = pages = 0
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY)
        held = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        if libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), held):
            raise OSError(ctypes.get_errno(), "mincore", str(file))
        del first
        mapped.close()
        present += sum(page & 1 for page in held)
        pages += len(held)
    return present / max(1, pages)
