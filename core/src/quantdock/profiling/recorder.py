"""What a load tells about itself while it runs, and to whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantdock.planning import Plan
    from quantdock.reporting import Report

_NOTHING: AbstractContextManager[None] = nullcontext()


class Recorder:
    """Is told what a load does. This one, for loads that nobody records, forgets it at once.

    All methods may be called from any thread.
    """

    def span(self, kind: str, label: str, nbytes: int = 0) -> AbstractContextManager[None]:
        """Time the block, in the thread that runs it; blocks may be nested.

        Args:
            kind: ``"read"``, ``"convert"``, ``"quantize"``, ``"place"``, or ``"wait"`` for a thread that can't go on.
                Any other word is shown under its own name.
            label: the parameter that the work is for.
            nbytes: bytes that the block takes in; their rate is shown for ``"read"`` and ``"quantize"``.
        """
        return _NOTHING

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time a stage of the load, such as ``"build_model"``."""
        return _NOTHING

    def watch(self, taken: Callable[[], int]) -> None:
        """From now on, ask ``taken`` for the bytes in flight as often as memory is sampled."""

    def planned(self, plan: Plan) -> None:
        """Note what the plan predicts. Nothing of the plan is kept alive."""

    def loaded(self, report: Report) -> None:
        """Note how the load ended. Nothing of the report is kept alive."""


_current: ContextVar[Recorder] = ContextVar("quantdock.profiling", default=Recorder())  # noqa: B039 - it has no state


def current() -> Recorder:
    """Who is to be told about a load that starts here.

    Threads don't inherit it: ask where the load was called, once, and hand the answer on.
    """
    return _current.get()


@contextmanager
def telling(recorder: Recorder) -> Iterator[None]:
    """Make ``recorder`` the current one inside the block."""
    token = _current.set(recorder)
    try:
        yield
    finally:
        _current.reset(token)
