"""GPTQ and AWQ checkpoints through quantdock and through transformers with gptqmodel: a part of ``decode``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import packed, processes
from benchmarks.cases import AS_STORED
from benchmarks.contenders import QUANTDOCK, TRANSFORMERS, in_turns
from benchmarks.jobs import DecodeJob, DecodeOutcome, Job
from benchmarks.options import surroundings
from benchmarks.tables import table

FASTER = 1.4
"""quantdock is to generate so many times as fast."""
APART = 0.05
"""Logits of the two may be so far apart, as a part of their norm: both compute in bfloat16."""
DTYPES = ("float16", "bfloat16")
"""What the model is loaded in: first as such checkpoints are stored, which is transformers' default."""
ADVISED = "bfloat16"
"""What quantdock's plugins advise for CPUs."""
_HEADER = ("checkpoint", "contender", "dtype", "prefill tok/s", "decode tok/s", "ms per token", "logits apart")

Key = tuple[str, str]
"""Contender and dtype."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was measured of one checkpoint."""

    method: str
    runs: dict[Key, list[DecodeOutcome]]
    left_out: str
    """Why transformers was; empty if it wasn't."""

    def prefill(self, key: Key) -> float:
        """Median seconds for the prompt."""
        return median(seconds for one in self.runs[key] for seconds in one.prefill_seconds)

    def decode(self, key: Key) -> float:
        """Median seconds for the tokens after it."""
        return median(seconds for one in self.runs[key] for seconds in one.decode_seconds)

    def faster(self, ours: str, theirs: str) -> float:
        """How many times as fast quantdock's model generates in one dtype as transformers' does in another."""
        return self.decode((TRANSFORMERS, theirs)) / self.decode((QUANTDOCK, ours))

    def apart(self, key: Key) -> float:
        """Distance of the logits after the prompt from those of quantdock in the same dtype."""
        own, base = self.runs[key][0].logits, self.runs[QUANTDOCK, key[1]][0].logits
        return math.dist(own, base) / math.hypot(*base)

    @property
    def reached(self) -> bool:
        """Whether quantdock as advised is fast enough beside transformers' default, and both say the same."""
        if self.left_out:
            return True
        alike = all(self.apart((TRANSFORMERS, dtype)) <= APART for dtype in DTYPES)
        return alike and self.faster(ADVISED, DTYPES[0]) >= FASTER


def measure(method: str, cache: Path, options: argparse.Namespace) -> Generation:
    """All contenders on one checkpoint, each in a process of its own.

    Raises:
        ProcessError: quantdock failed.
    """
    folder = packed.make(method, options.packed, cache)
    runs: dict[Key, list[DecodeOutcome]] = {}
    left_out = ""
    for number in range(options.runs):
        for contender, dtype in in_turns([(name, d) for d in DTYPES for name in (QUANTDOCK, TRANSFORMERS)], number):
            if contender == TRANSFORMERS and left_out:
                continue
            load = Job(contender=contender, case=AS_STORED, folder=str(folder), warm_up="")
            job = DecodeJob(
                load=load, prompt=options.prompt, tokens=options.tokens, repeats=options.repeats, dtype=dtype
            )
            around = surroundings(options, {"GPTQMODEL_CPU_WORKERS": "2"})  # it fails with its default on two cores
            if contender == TRANSFORMERS and options.reference_python is not None:
                around = dataclasses.replace(around, python=str(options.reference_python))
            try:
                answer, _ = processes.ask("decoding", job, around)
            except processes.ProcessError as error:
                if contender == QUANTDOCK:
                    raise
                left_out = error.reason
                continue
            runs.setdefault((contender, dtype), []).append(DecodeOutcome(**answer))
        print(f"{method}: run {number + 1} of {options.runs}", file=sys.stderr, flush=True)
    if left_out:
        runs = {key: own for key, own in runs.items() if key[0] == QUANTDOCK}
    return Generation(method=method, runs=runs, left_out=left_out)


def report(found: Sequence[Generation], options: argparse.Namespace) -> str:
    """The table and, below it, whether the limit is kept."""
    lines = [table(_HEADER, [row for one in found for row in _rows(one, options)]), ""]
    for one in found:
        if one.left_out:
            lines.append(f"{one.method}: transformers left out: {one.left_out}")
            continue
        verdict = "reached" if one.reached else "NOT REACHED"
        same = ", ".join(f"{one.faster(dtype, dtype):.2f} with both in {dtype}" for dtype in DTYPES)
        lines.append(
            f"{one.method}: as advised (quantdock in {ADVISED}, transformers in {DTYPES[0]}, as it loads it), "
            f"quantdock generates {one.faster(ADVISED, DTYPES[0]):.2f} times as fast; {FASTER} times: {verdict}; {same}"
        )
    return "\n".join(lines)


def as_data(found: Sequence[Generation]) -> list[dict[str, object]]:
    """Everything that was measured."""
    return [
        {
            "checkpoint": one.method,
            "left_out": one.left_out,
            "reached": one.reached,
            "lines": [
                {"contender": contender, "dtype": dtype, "outcomes": [dataclasses.asdict(run) for run in runs]}
                for (contender, dtype), runs in one.runs.items()
            ],
        }
        for one in found
    ]


def _rows(one: Generation, options: argparse.Namespace) -> Iterator[list[str]]:
    for contender, dtype in sorted(one.runs, key=lambda key: (DTYPES.index(key[1]), key[0] != QUANTDOCK)):
        key = (contender, dtype)
        each = one.decode(key) / (options.tokens - 1)
        yield [
            one.method,
            contender if contender == QUANTDOCK else f"{contender} + gptqmodel",
            dtype,
            f"{options.prompt / one.prefill(key):.1f}",
            f"{1 / each:.2f}",
            f"{1e3 * each:.2f}",
            "" if contender == QUANTDOCK else f"{one.apart(key):.1%}",
        ]
