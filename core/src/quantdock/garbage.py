"""Python's cyclic garbage collector, told to wait while a large checkpoint is indexed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_later() -> Iterator[None]:
    """Put collections off. Also a decorator.

    Indexing and matching make several objects per tensor, all of which stay. With a hundred thousand tensors the
    collector looks at them, and at everything that torch has made, again and again: a third of the time, for nothing.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
