"""Memory over time: a thread that looks every few milliseconds."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

INTERVAL = 0.010
"""Seconds between two looks."""
MOST = 4096
"""Samples that are kept; of more, neighbours are merged."""


class Sample(NamedTuple):
    """Bytes at one time, or the most of each between this sample and the next."""

    at: int
    """Nanoseconds on the clock of ``time.perf_counter_ns``."""
    own: int
    """Resident bytes that belong to this process alone."""
    mapped: int
    """Resident bytes of files that are mapped; the page cache's, that is."""
    in_flight: int
    """Bytes taken from the memory budget."""


Probe = Callable[[], tuple[int, int]]
"""Gives a process's own resident bytes and those of files that it maps."""


def linux_probe() -> tuple[int, int]:
    """Read ``/proc/self/statm``: size, resident and shared pages; see proc(5).

    Shared are the pages of files and of shared memory, also those of a private map that nobody has written to.
    """
    with open("/proc/self/statm", "rb") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * _PAGE, shared * _PAGE


def peak_resident() -> int:
    """Peak resident bytes of this process so far; 0 where the platform doesn't tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_probe() -> tuple[int, int]:
    """The peak of resident memory so far, for want of the present value."""
    return peak_resident(), 0


_LINUX = sys.platform == "linux"
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def usual_probe() -> tuple[Probe | None, str]:
    """What tells about memory on this platform, and what a reader has to know about it."""
    if _LINUX:
        return linux_probe, f"resident memory from /proc/self/statm every {INTERVAL * 1000:.0f} ms"
    if importlib.util.find_spec("resource") is not None:
        return peak_probe, f"{sys.platform} tells the peak of resident memory so far, not its present value"
    return None, f"{sys.platform} doesn't tell resident memory"


class Sampler:
    """Samples memory between ``start`` and ``stop``, in a thread of its own.

    However long that takes, no more than ``MOST`` samples are kept.
    """

    def __init__(self, probe: tuple[Probe | None, str] | None = None) -> None:
        self._probe, self.explained = probe or usual_probe()
        self._taken: Callable[[], int] = int
        self._samples: list[Sample] = []
        self._width = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quantdock-sampler", daemon=True)

    @property
    def samples(self) -> Sequence[Sample]:
        """What was seen so far."""
        with self._lock:
            return tuple(self._samples)

    def watch(self, taken: Callable[[], int]) -> None:
        """Ask ``taken`` for the bytes in flight from now on."""
        self._taken = taken

    def start(self) -> None:
        """Take the first sample, then go on in the background."""
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """Take the last sample."""
        self._stopped.set()
        self._thread.join()
        self.look()
        self._taken = int  # what was watched needn't live any longer

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL):
            self.look()

    def look(self) -> None:
        """Take a sample now."""
        own, mapped = (0, 0) if self._probe is None else self._probe()
        self.keep(Sample(time.perf_counter_ns(), own, mapped, self._taken()))

    def keep(self, sample: Sample) -> None:
        """Add a sample. Peaks survive when samples are merged."""
        with self._lock:
            if self._samples and sample.at - self._samples[-1].at < self._width:
                self._samples[-1] = _merged(self._samples[-1], sample)
                return
            self._samples.append(sample)
            if len(self._samples) > MOST:
                pairs = zip(self._samples[::2], [*self._samples[1::2], self._samples[-1]], strict=False)
                self._samples = [_merged(*pair) for pair in pairs]
                self._width = 2 * (self._samples[-1].at - self._samples[0].at) // MOST


def _merged(first: Sample, second: Sample) -> Sample:
    return Sample(first.at, *(max(pair) for pair in zip(first[1:], second[1:], strict=True)))
