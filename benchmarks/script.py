"""What a short script does: start, import, load, use. Its parent holds the watch (``processes.start_to_ready``)."""

from __future__ import annotations

import json
import sys

from benchmarks import contenders
from benchmarks.jobs import Job

if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # what a library prints isn't the answer
    job = Job(**json.load(sys.stdin))
    loaded = contenders.loader(job)(job.folder)

    from benchmarks import contents

    contents.touch(loaded)
    print("{}", file=answer, flush=True)
