"""Command-line options that several benchmarks share, and what they stand for."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import pagecache
from benchmarks.checkpoints import Checkpoint, make
from benchmarks.contenders import ALL, CONTENDERS, DEFAULT
from benchmarks.presets import PRESETS, TINY
from benchmarks.processes import Surroundings

_CACHES = {"warm": pagecache.warm, "cold": pagecache.cool}


def add_common(parser: argparse.ArgumentParser, *, runs: int) -> None:
    """Options of every benchmark; ``runs`` is this benchmark's default."""
    parser.add_argument("--runs", type=positive, default=runs, help="runs of each contender (default: %(default)s)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where checkpoints are made and kept")
    parser.add_argument("--threads", type=positive, help="OMP_NUM_THREADS of every contender")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there, too")


def add_loading(parser: argparse.ArgumentParser, *, preset: str) -> None:
    """Options of benchmarks that load a checkpoint; ``preset`` is this benchmark's default."""
    parser.add_argument("--preset", choices=PRESETS, default=preset, help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--page-cache", choices=_CACHES, default="warm", help="of the files, before each run")
    parser.add_argument("--workers", type=positive, help="quantdock's worker threads")


def add_contenders(parser: argparse.ArgumentParser, *, among: Sequence[str], default: Sequence[str] = DEFAULT) -> None:
    """``--contenders``; quantdock always takes part."""
    about = "; ".join(f"{name}: {CONTENDERS[name].about}" for name in among)
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=[*among, ALL],
        default=list(default),
        metavar="NAME",
        help=f"{about}; or {ALL} (default: {' '.join(default)}; quantdock always takes part)",
    )


@contextlib.contextmanager
def kept(options: argparse.Namespace) -> Iterator[Path]:
    """The folder for checkpoints: ``--cache``, or one that is gone afterwards."""
    if options.cache is not None:
        yield options.cache.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="quantdock-benchmarks-") as folder:
        yield Path(folder).resolve()


def checkpoints(options: argparse.Namespace, cache: Path) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoint of ``--preset``, and the tiny one of its family for warming up."""
    preset = PRESETS[options.preset]
    tiny = TINY[preset.family]
    return make(options.preset, preset, cache), make(tiny, PRESETS[tiny], cache)


def surroundings(options: argparse.Namespace, variables: Mapping[str, str] | None = None) -> Surroundings:
    """What ``--threads`` says, and further environment variables."""
    return Surroundings(threads=options.threads, variables=variables or {})


def prepare_page_cache(options: argparse.Namespace, files: Sequence[Path]) -> None:
    """Make the page cache what ``--page-cache`` says.

    Raises:
        PageCacheError: it can't be made cold.
    """
    _CACHES[options.page_cache](files)


def write_json(options: argparse.Namespace, data: Mapping[str, object]) -> None:
    """Write ``--json``, if asked for."""
    if options.json is not None:
        options.json.write_text(json.dumps(data, indent=2) + "\n")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return number
