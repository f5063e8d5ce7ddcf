"""What a load shows of itself: what it is waiting for, then a bar of bytes, parameters and memory in flight."""

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


_STAGES = {
    "discover": "looking for plugins",
    "resolve_config": "reading the config",
    "find_checkpoints": "reading the headers",
    "select quantizers": "importing the quantizer",
    "build_model": "importing and building the architecture",
    "match": "matching tensors with parameters",
    "preprocess_model": "preparing the layers",
    "place": "placing",
    "cache": "looking into the cache",
}


@contextmanager
def announcing(asked: bool | Notify | None, name: str) -> Iterator[Callable[[str], object]]:
    """Say on stderr what a load waits for before it has a bar to show, under the conditions of ``progress_of``.

    On a terminal in one line that goes away; elsewhere in a line for each stage. Needs no import, so it shows at once.

    Args:
        asked: ``progress=`` of the load.
        name: of what is loaded.
    """
    if not _shows(asked):
        yield lambda stage: None
        return
    stream = sys.stderr
    before, after = ("\r\x1b[2K", "") if stream.isatty() else ("", "\n")

    waiting = True

    def announce(stage: str) -> None:
        if waiting:
            stream.write(f"{before}loading {name}: {_STAGES.get(stage, stage)}{after}")
            stream.flush()

    announce("importing torch")
    try:
        yield announce
    finally:
        waiting = False
        stream.write(before)
        stream.flush()


def _shows(asked: bool | Notify | None) -> bool:
    return not callable(asked) and (asked is True or (asked is None and sys.stderr.isatty()))


@contextmanager
def progress_of(asked: bool | Notify | None) -> Iterator[Notify | None]:
    """The callable to tell about progress.

    ``None`` shows a bar when stderr is a terminal, ``True`` always, ``False`` never; a callable is told itself.
    """
    if callable(asked):
        yield asked
    elif not _shows(asked):
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
