"""How much torch works on at a time on CPU."""

from __future__ import annotations

import torch

CHUNK = 28672
"""Elements, where torch may use several threads: a multiple of the usual block sizes, and few enough (up to 32768) that
torch runs each step in the calling thread. Steps that it would split between threads earlier than that (indexing,
rounding, searching) are avoided."""

LARGE_CHUNK = 10 * CHUNK
"""Elements, where torch is single-threaded, as in the workers of a load: the temporaries still fit the cache, and each
call is long enough that threads don't wait for one another to make the next."""


def chunk(multiple: int = 1) -> int:
    """The right one of the two for this thread, as a multiple of ``multiple``."""
    size = LARGE_CHUNK if torch.get_num_threads() == 1 else CHUNK
    return max(multiple, size // multiple * multiple)
