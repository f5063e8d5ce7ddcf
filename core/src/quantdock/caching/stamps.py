"""Stamps: whether a file is still the one it was, without reading it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

Stamp = tuple[int, int, int, int]
"""Size in bytes, time of the last write and of the last change of any kind (both in nanoseconds), and inode."""

_TICK = 20_000_000
"""Nanoseconds in which two writes may get the same time: twice the coarsest clock tick that Linux keeps time by."""
_COARSE = 2_000_000_000
"""The same where a file system keeps whole seconds (two of them, on FAT)."""


def stamp(path: Path) -> Stamp:
    """The stamp of a file, links followed.

    The time of the last change of any kind (``ctime``) is what nobody can set: a file that is written over keeps its
    size and inode, and its time of writing can be put back, as ``rsync`` and ``cp -p`` do.

    Raises:
        OSError: it can't be looked at.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def settled_stamps(paths: Iterable[Path]) -> list[Stamp]:
    """Stamps that any later write will change.

    File systems keep times in ticks, so a file that is written twice within one keeps its stamp. Of a file that was
    changed this very moment the stamp is taken once the tick is over.

    Raises:
        OSError: a file can't be looked at.
    """
    return [_settled(path) for path in paths]


def _settled(path: Path) -> Stamp:
    for _ in range(3):
        found = stamp(path)
        changed = max(found[1], found[2])
        age = time.time_ns() - changed
        tick = _TICK if changed % 1_000_000_000 else _COARSE
        if not -_COARSE < age < tick:  # a time far ahead is another machine's clock, and tells nothing
            return found
        time.sleep((tick - max(age, 0)) / 1e9)
    return stamp(path)


def tree(folder: Path, suffixes: tuple[str, ...]) -> tuple[list[tuple[str, int, int]], int]:
    """Name below ``folder``, size and time of writing of every file whose name ends in one of ``suffixes``; and when
    one of them was changed last in any way."""
    found, latest = [], 0
    for root, _, names in os.walk(folder):
        for name in names:
            if name.endswith(suffixes):
                path = Path(root, name)
                size, written, changed, _ = stamp(path)
                found.append((path.relative_to(folder).as_posix(), size, written))
                latest = max(latest, changed)
    return sorted(found), latest
