"""Command-line options that several benchmarks share, and what they stand for."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks import pagecache
from benchmarks.checkpoints import PRESETS, Checkpoint, make

_CACHES = {"warm": pagecache.warm, "cold": pagecache.cool}


def add_shared(parser: argparse.ArgumentParser, *, preset: str, runs: int) -> None:
    """Options of every benchmark; ``preset`` and ``runs`` are this benchmark's defaults."""
    parser.add_argument("--preset", choices=PRESETS, default=preset, help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--runs", type=_positive, default=runs, help="runs of each contender (default: %(default)s)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where checkpoints are made and kept")
    parser.add_argument("--page-cache", choices=_CACHES, default="warm", help="of the files, before each run")
    parser.add_argument("--threads", type=_positive, help="OMP_NUM_THREADS of every contender")
    parser.add_argument("--workers", type=_positive, help="quantdock's worker threads")
    parser.add_argument("--budget", help="quantdock's memory_budget, such as 96MiB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there, too")


@contextlib.contextmanager
def checkpoints(options: argparse.Namespace) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """The checkpoint of the preset, and the tiny one for warming up; gone afterwards unless ``--cache`` keeps them."""
    with contextlib.ExitStack() as stack:
        cache = options.cache
        if cache is None:
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quantdock-benchmarks-")))
        yield make(options.preset, cache.resolve()), make("tiny", cache.resolve())


def prepare_page_cache(options: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Make the page cache what ``--page-cache`` says.

    Raises:
        PageCacheError: it can't be made cold.
    """
    _CACHES[options.page_cache](checkpoint.shards)


def write_json(options: argparse.Namespace, data: Mapping[str, object]) -> None:
    """Write ``--json``, if asked for."""
    if options.json is not None:
        options.json.write_text(json.dumps(data, indent=2) + "\n")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return number
