"""Runs contenders, each load in a fresh process, in turns."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.jobs import Job, Outcome

_ROOT = Path(__file__).resolve().parent.parent
_TAIL = 12
"""Lines of a failed worker's standard error that are kept."""


class ContenderError(Exception):
    """A worker didn't come through; the message holds the end of what it wrote."""


def run(job: Job, *, threads: int | None = None) -> Outcome:
    """Do one job in a process of its own.

    Args:
        job: what to do.
        threads: for torch and everything else that listens to ``OMP_NUM_THREADS``; ``None`` for their default.

    Raises:
        ContenderError: the process failed.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker"],
        cwd=_ROOT,
        env=environment,
        input=json.dumps(dataclasses.asdict(job)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-_TAIL:])
        raise ContenderError(f"{job.contender}, {job.case}: exit status {done.returncode}\n{tail}")
    return Outcome(**json.loads(done.stdout))


def in_turns(contenders: list[str], run_number: int) -> list[str]:
    """The contenders in the order of this run: every other one goes backwards, so that none always comes first."""
    return contenders[::-1] if run_number % 2 else list(contenders)
