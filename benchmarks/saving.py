"""The process that quantizes a checkpoint and saves it: takes a ``SaveJob`` as JSON and answers when it is done."""

from __future__ import annotations

import json
import sys

import quantdock
from benchmarks.jobs import SaveJob

if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # what a library prints isn't the answer
    job = SaveJob(**json.load(sys.stdin))
    quantdock.save(quantdock.load(job.folder, quantize=job.quantize, device_map="cpu", progress=False), job.target)
    print("{}", file=answer, flush=True)
