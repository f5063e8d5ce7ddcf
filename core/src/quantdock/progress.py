"""A progress bar for loads: bytes, parameters and memory in flight."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a load is; ``progress=`` callables get one after each unit."""

    stored_nbytes: int
    """Bytes of stored tensors worked off so far."""
    total_nbytes: int
    parameters: int
    """Parameters finished so far."""
    total_parameters: int
    in_flight: int
    """Bytes in flight at the moment."""


Notify = Callable[[Progress], object]


@contextmanager
def progress_of(asked: bool | Notify | None) -> Iterator[Notify | None]:
    """The callable to tell about progress.

    ``None`` shows a bar when stderr is a terminal, ``True`` always, ``False`` never; a callable is told itself.
    """
    if callable(asked):
        yield asked
    elif asked is False or (asked is None and not sys.stderr.isatty()):
        yield None
    else:
        with _bar() as notify:
            yield notify


@contextmanager
def _bar() -> Iterator[Notify]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("loading"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("{task.fields[parameters]} parameters, {task.fields[in_flight]} MiB in flight"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("load", total=None, parameters="0", in_flight=0)

        def notify(progress: Progress) -> None:
            bar.update(
                task,
                completed=progress.stored_nbytes,
                total=progress.total_nbytes,
                parameters=f"{progress.parameters}/{progress.total_parameters}",
                in_flight=progress.in_flight >> 20,
            )

        yield notify
