"""This process's resident memory, as Linux counts it."""

from __future__ import annotations

import mmap
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets VmHWM back to the resident size of now
_INTERVAL = 0.005


@dataclass(frozen=True, kw_only=True)
class Level:
    """Resident bytes: memory of the process's own, and pages of mapped files (which the kernel can take back)."""

    anonymous: int
    file: int


def level() -> Level:
    """What is resident now."""
    fields = _STATM.read_text().split()
    resident, shared = int(fields[1]) * mmap.PAGESIZE, int(fields[2]) * mmap.PAGESIZE
    return Level(anonymous=resident - shared, file=shared)


def reset_peak() -> None:
    """Let ``peak`` start from what is resident now."""
    _CLEAR_REFS.write_text(_RESET_PEAK)


def peak() -> int:
    """The kernel's own high-water mark of resident bytes since ``reset_peak``; it misses nothing."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no VmHWM; these measurements need Linux")


class Sampler:
    """Looks at the resident memory every 5 ms while its block runs, to tell which kind of memory made the peak."""

    def __init__(self) -> None:
        self.peak_anonymous = 0
        self.peak_file = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        now = level()
        self.peak_anonymous = max(self.peak_anonymous, now.anonymous)
        self.peak_file = max(self.peak_file, now.file)
