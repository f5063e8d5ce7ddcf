"""Python's cyclic garbage collector, told to wait while a load is planned."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_later() -> Iterator[None]:
    """Put collections off. Also a decorator.

    Importing torch and an architecture makes hundreds of thousands of objects, and planning several for each tensor.
    All of them stay. The collector would look at them again and again: a tenth of the time of the imports, and a third
    of that of planning a hundred thousand tensors, for nothing.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        # Freezing and thawing puts everything into the oldest generation. Else the next collection would take all of it
        # for young objects, and look at it after all. What is frozen already is somebody else's doing.
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        gc.enable()
