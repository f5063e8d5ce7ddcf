"""Recordings of loads: what every thread did when, the memory beside it, and a page that shows both.

    from quantdock import profiling

    with profiling.record("load.html"):
        model = quantdock.load(...)

What loads import is ``quantdock.profiling.recorder`` alone, which is next to nothing; the rest comes on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from quantdock.profiling.recorder import Recorder, current

if TYPE_CHECKING:
    from quantdock.profiling.recording import Recording, record

__all__ = ["Recorder", "Recording", "current", "record"]


def __getattr__(name: str) -> object:
    if name not in ("Recording", "record"):
        raise AttributeError(f"module 'quantdock.profiling' has no attribute {name!r}")
    return getattr(importlib.import_module("quantdock.profiling.recording"), name)
