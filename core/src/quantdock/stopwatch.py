"""Seconds per stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from quantdock.profiling import current


class Stopwatch:
    """Adds up wall-clock seconds under names, and tells a recording of the load when each began and ended.

    Args:
        announce: told each stage's name when it begins.
    """

    def __init__(self, announce: Callable[[str], object] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._announce = announce

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's time under ``name``."""
        started = time.perf_counter()
        if self._announce is not None:
            self._announce(name)
        try:
            with current().stage(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
