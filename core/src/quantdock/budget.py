"""The bytes that may be in flight at once, on one device."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Budget:
    """Bytes in flight; taken in order, given back in any."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.peak = 0
        self.taken = 0
        self._changed = threading.Condition()

    def take(self, amount: int, stopped: Callable[[], bool], *, beside: int = 0) -> bool:
        """Wait until ``amount`` bytes are free, or everything is when it is more than the limit.

        Args:
            amount: bytes to take.
            stopped: asked while waiting; nothing is taken once it says true.
            beside: bytes that the caller has taken already and gives back only after it got these; waiting for them
                would be waiting for oneself.

        Returns:
            False when ``stopped`` turned true.
        """
        with self._changed:
            while not stopped() and self.taken > beside and self.taken + amount > self.limit:
                self._changed.wait()
            if stopped():
                return False
            self.taken += amount
            self.peak = max(self.peak, self.taken)
            return True

    def give(self, amount: int, *, wake: bool = True) -> None:
        """Give ``amount`` bytes back.

        Args:
            amount: bytes.
            wake: let a waiting ``take`` look whether there is enough now. Who says no calls ``wake`` in time.
        """
        with self._changed:
            self.taken -= amount
            if wake:
                self._changed.notify_all()

    def wake(self) -> None:
        """Let a waiting ``take`` look again: at the bytes, and at ``stopped``."""
        with self._changed:
            self._changed.notify_all()
