"""Mapped files enter the process's page tables while the load still has other things to do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from quantdock.errors import CheckpointError
from quantdock.tensors import TensorReader
from quantdock.units import Unit

_GAP = 1 << 20
"""Bytes that belong to nothing mapped, and are populated all the same, between two ranges that are."""

_PIECE = 1 << 30
"""Bytes populated at a time, in 30 to 50 ms."""

Range = tuple[TensorReader, int, int]


def populate_in_background(units: Iterable[Unit]) -> None:
    """Populate what the model will hold as views of mapped files; returns at once.

    Nobody waits for the thread: whoever uses a page before it gets there maps that page himself, as ever. It needs the
    interpreter only between pieces, which is why there are as few of them as possible. It is no daemon, because those
    are killed inside of torch when a program ends, which aborts the process; it stops after a piece instead.
    """
    work: list[Callable[[], None]] = []
    for reader, start, stop in mapped_ranges(units):
        with suppress(CheckpointError):  # a file that is gone or has changed: the load will say so, and where
            for first in range(start, stop, _PIECE):
                work += filter(None, [reader.populator(first, min(first + _PIECE, stop))])
    if work:
        threading.Thread(target=_populate, args=(work,), name="quantdock-populate", daemon=False).start()


def mapped_ranges(units: Iterable[Unit]) -> list[Range]:
    """Reader, first byte, and the one after the last, of everything that stays a view; neighbours are joined.

    Args:
        units: in file order.
    """
    found: list[Range] = []
    for unit in units:
        if unit.in_flight or str(unit.device) != "cpu":
            continue
        for source in unit.sources:
            if not source.reader.maps:
                continue
            start, stop = source.offset, source.offset + source.stored_nbytes
            if found and found[-1][0] is source.reader and start - found[-1][2] <= _GAP:
                start, stop = min(start, found[-1][1]), max(stop, found[-1][2])
                found.pop()
            found.append((source.reader, start, stop))
    return found


def _populate(work: Iterable[Callable[[], None]]) -> None:
    for populate in work:
        if not threading.main_thread().is_alive():
            return
        populate()
