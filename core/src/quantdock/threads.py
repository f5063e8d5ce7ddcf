"""Torch's own threads inside the engine's workers.

A worker runs torch single-threaded: several workers with a pool of threads each would get in one another's way, and a
step that torch splits between threads waits for the slowest of them. How torch adds up a long reduction depends on the
number of threads, though, and so do its last bits; ``caller_threads`` is for those.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_worker = threading.local()


@contextmanager
def worker_threads(callers: int) -> Iterator[None]:
    """Run torch single-threaded in this thread; where ``load`` was called it has ``callers`` threads."""
    _worker.callers = callers
    torch.set_num_threads(1)
    try:
        yield
    finally:
        del _worker.callers


@contextmanager
def caller_threads() -> Iterator[None]:
    """Run torch with as many threads as where ``load`` was called, for bits that depend on it.

    For a quantizer that has to equal a library which computes, say, the mean of a long vector in the caller's thread.
    Outside of the engine's workers nothing changes.
    """
    callers: int | None = getattr(_worker, "callers", None)
    if callers is None:
        yield
        return
    torch.set_num_threads(callers)
    try:
        yield
    finally:
        torch.set_num_threads(1)
