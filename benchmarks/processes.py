"""Puts a question to a fresh process and holds the watch until it answers."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.jobs import Job, Outcome

_ROOT = Path(__file__).resolve().parent.parent
_TAIL = 12
"""Lines of a failed process's standard error that are kept."""
_QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


class ProcessError(Exception):
    """A process didn't come through; the message holds the end of what it wrote."""

    @property
    def reason(self) -> str:
        """Its last line: the exception that ended it."""
        return str(self).splitlines()[-1]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the process finds."""

    threads: int | None = None
    """For torch and everything else that listens to ``OMP_NUM_THREADS``; ``None`` for their default."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of the environment, beside the parent's."""
    python: str = sys.executable
    """The interpreter, whose environment has what the contender needs."""

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment."""
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        return {**os.environ, **_QUIET, **threads, **self.variables}


def ask(module: str, question: Any, surroundings: Surroundings) -> tuple[dict[str, Any], float]:
    """Run a module of this package on a question.

    Args:
        module: reads the question (a dataclass, as JSON) from standard input and prints one line of JSON.
        question: what to do.
        surroundings: threads and environment.

    Returns:
        The answer, and the seconds from the process's start until it came.

    Raises:
        ProcessError: the process failed.
    """
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        with subprocess.Popen(
            [surroundings.python, "-m", f"benchmarks.{module}"],
            cwd=_ROOT,
            env=surroundings.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(dataclasses.asdict(question)))
            process.stdin.close()
            line = process.stdout.readline()
            seconds = time.perf_counter() - start
        errors.seek(0)
        if process.returncode or not line:
            tail = "\n".join(errors.read().decode(errors="replace").strip().splitlines()[-_TAIL:])
            raise ProcessError(f"{question}: exit status {process.returncode}\n{tail}")
    return json.loads(line), seconds


def measure(job: Job, surroundings: Surroundings) -> Outcome:
    """One load, imports apart (see ``ask`` for what it raises)."""
    answer, _ = ask("worker", job, surroundings)
    return Outcome(**answer)


def start_to_ready(job: Job, surroundings: Surroundings) -> float:
    """Seconds from the start of a process until its model is in memory, imports and all (see ``ask``)."""
    _, seconds = ask("script", job, surroundings)
    return seconds
