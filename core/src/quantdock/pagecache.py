"""Maps of files, and advice to the kernel about their pages; only Linux is advised."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

_LINUX = sys.platform == "linux"
_PIECE = 128 * 1024
"""Bytes asked for at once in ``prefetch``: the kernel's usual read-ahead window."""
_PROBED = 1 << 20
"""Bytes between the places at which a range is probed."""
_HUGE_PAGE = 2 << 20
_FAULT_AROUND = 64 * 1024
"""Bytes around a missing page that Linux maps along with it, unless it was told otherwise."""
_MAP_FIXED = 0x10
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named by Python since 3.12


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    )  # fmt: skip
    libc.mmap.restype = ctypes.c_void_p
    return libc


def map_private(descriptor: int, nbytes: int) -> memoryview:
    """Map a whole file privately: writing to the map changes pages of this process, never the file.

    Python's own ``ACCESS_COPY`` falls short twice. The kernel counts such a map as memory that could be needed one day
    and refuses a file larger than the machine's memory, which is just the file that somebody wants to quantize while it
    loads; so no memory is reserved here. And up to Python 3.12 a map keeps a descriptor of its file open, so that a
    checkpoint of a thousand shards meets the usual limit of 1,024; so the file is mapped over a map without a file. It
    begins at a multiple of 2 MiB, where the kernel can use huge pages for it.

    A tensor made with ``torch.frombuffer`` keeps the map alive; dropping the last reference unmaps.

    Args:
        descriptor: the file, open for reading; may be closed afterwards.
        nbytes: the file's size, more than 0.

    Raises:
        OSError: the kernel refuses.
    """
    if not _LINUX:
        return memoryview(mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_COPY))
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    reserved = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=flags | mmap.MAP_ANONYMOUS, prot=protection)
    start = ctypes.addressof(ctypes.c_char.from_buffer(reserved))
    shift = -start % _HUGE_PAGE
    if _libc().mmap(start + shift, nbytes, protection, flags | _MAP_FIXED, descriptor, 0) != start + shift:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return memoryview(reserved)[shift : shift + nbytes]


def drop(address: int, nbytes: int) -> None:
    """Take the whole pages inside a range of a clean, private file map out of this process's resident memory.

    What has been read from a map stays resident until memory gets tight, so a load that maps its files would grow to
    the size of the checkpoint on top of the model. The pages themselves stay in the page cache: reading the range again
    is right and cheap. The range shrinks to page boundaries, because the pages at its ends may belong to neighbours.

    On pages that were written to, or on memory that isn't a file's, this throws values away. Nothing is raised when
    the kernel declines (pages locked in memory, for one): then the pages just stay.

    Args:
        address: first byte.
        nbytes: length in bytes.
    """
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if _LINUX and start < end:
        _libc().madvise(start, end - start, mmap.MADV_DONTNEED)


def release(tensor: torch.Tensor) -> None:
    """``drop`` the pages under a view of a mapped file, from its first element to its last, gaps included.

    The tensor stays valid, and so does every other view of these pages: what is used again is read again. The tensor
    has to come from a reader whose ``maps`` is true, and nothing may have been written to its part of the map.
    """
    drop(*_extent(tensor))


def populate(mapped: memoryview, start: int, stop: int) -> None:
    """Enter a range of a mapped file into this process's page tables, without the interpreter lock.

    A page that is only mapped costs its reader a trip into the kernel: for every gigabyte, a thread that wants to
    compute loses 30 to 50 ms. One read out of every ``_FAULT_AROUND`` bytes is enough, because the kernel enters the
    cached neighbours of the page that is asked for along with it (its ``fault_around_bytes``); that is a good third
    faster than ``MADV_POPULATE_READ``.

    Args:
        mapped: from ``map_private``.
        start: first byte.
        stop: the one after the last.
    """
    torch.frombuffer(mapped, dtype=torch.uint8, count=stop - start, offset=start)[::_FAULT_AROUND].amax()


def read_ahead(tensor: torch.Tensor) -> None:
    """Start reading the pages under a view of a mapped file, as ``prefetch`` does with a range of a file."""
    if not _LINUX:
        return
    address, nbytes = _extent(tensor)
    for piece in range(address // mmap.PAGESIZE * mmap.PAGESIZE, address + nbytes, _PIECE):
        _libc().madvise(piece, min(_PIECE, address + nbytes - piece), mmap.MADV_WILLNEED)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of the first byte of a tensor in CPU memory, and the bytes up to its last one."""
    assert tensor.device.type == "cpu", "pages of CPU memory"
    if not tensor.numel():
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.itemsize


def prefetch(file: int | str | Path, offset: int, nbytes: int) -> None:
    """Start reading a range of a file into the page cache, so that it is there when somebody gets to it.

    The kernel cuts every such request to its read-ahead window without a word, hence many small ones. Sending them can
    take a while on a busy disk, but doesn't wait for the data. It is advice: where it can't be given nothing happens,
    and what is wrong with the file comes out when it is read.

    Args:
        file: an open descriptor, or a path.
        offset: first byte.
        nbytes: length in bytes.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        if not isinstance(file, int):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                prefetch(descriptor, offset, nbytes)
            finally:
                os.close(descriptor)
            return
        if is_cached(file, offset, nbytes):
            return
        for piece in range(offset, offset + nbytes, _PIECE):
            os.posix_fadvise(file, piece, min(_PIECE, offset + nbytes - piece), os.POSIX_FADV_WILLNEED)


def is_cached(descriptor: int, offset: int, nbytes: int, *, places: int | None = None) -> bool:
    """Whether a few bytes of a range, spread over it, can be had without waiting.

    Asking for the whole of a file that is in the page cache would take a good part of the time of reading it.

    Args:
        descriptor: the file, open for reading.
        offset: first byte.
        nbytes: length in bytes.
        places: how many bytes to look at, the last not counted; one in every MiB if not given.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    byte = [bytearray(1)]
    step = _PROBED if places is None else max(1, nbytes // places)
    probed = {*range(offset, offset + nbytes, step), offset + nbytes - 1}
    try:
        return all(os.preadv(descriptor, byte, place, os.RWF_NOWAIT) == 1 for place in probed)
    except BlockingIOError:
        return False
