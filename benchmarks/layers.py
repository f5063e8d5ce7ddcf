"""Single quantized layers beside the same in bfloat16: a part of ``decode``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks import processes
from benchmarks.layering import PLAIN, LayersJob, LayersOutcome
from benchmarks.processes import Surroundings
from benchmarks.tables import table

FASTER = 2.5
"""At one row, int4 is to be so many times as fast as bfloat16."""
SLOWER = 1.5
"""At 256 rows, nothing is to take longer than so many times what bfloat16 takes."""
INT4 = "gptq-int4"
PRESETS = (INT4, "gptq-int8", "fp8-block")
SHAPES = ((4096, 4096), (11_008, 4096), (4096, 11_008))
"""Outputs and inputs."""
ROWS = (1, 256)
_HEADER = ("layer, out x in", "method", "path", "1 row, ms", "bf16 / it", "256 rows, ms", "it / bf16", "verdict")


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What was measured of one shape."""

    outputs: int
    inputs: int
    outcome: LayersOutcome

    def reached(self, preset: str) -> bool:
        """Whether both limits are."""
        faster, slower = 1 / self.outcome.times(preset, 0), self.outcome.times(preset, 1)
        return slower <= SLOWER and (preset != INT4 or faster >= FASTER)


def measure(shapes: Sequence[tuple[int, int]], repeats: int, copies: int, surroundings: Surroundings) -> list[Layers]:
    """Each shape in a process of its own."""
    result = []
    for outputs, inputs in shapes:
        job = LayersJob(
            outputs=outputs,
            inputs=inputs,
            presets=list(PRESETS),
            rows=list(ROWS),
            copies=copies,
            repeats=repeats,
        )
        answer, _ = processes.ask("layering", job, surroundings)
        result.append(Layers(outputs=outputs, inputs=inputs, outcome=LayersOutcome(**answer)))
    return result


def report(found: Sequence[Layers]) -> str:
    """The table and, below it, whether the limits are kept."""
    limits = f"{INT4} at least {FASTER} times as fast at one row, nothing longer than {SLOWER} times at 256"
    return f"{table(_HEADER, list(_rows(found)))}\n\nlayers: {limits}: {'reached' if kept(found) else 'NOT REACHED'}"


def kept(found: Sequence[Layers]) -> bool:
    """Whether every limit is."""
    return all(layers.reached(preset) for layers in found for preset in PRESETS)


def as_data(found: Sequence[Layers]) -> list[dict[str, object]]:
    """Everything that was measured."""
    return [dataclasses.asdict(layers) | {"reached": {p: layers.reached(p) for p in PRESETS}} for layers in found]


def _rows(found: Sequence[Layers]) -> Iterator[list[str]]:
    for layers in found:
        outcome = layers.outcome
        for name in (PLAIN, *PRESETS):
            plain = name == PLAIN
            yield [
                f"{layers.outputs} x {layers.inputs}",
                name,
                outcome.paths.get(name, ""),
                f"{outcome.milliseconds(name, 0):.2f}",
                "" if plain else f"{1 / outcome.times(name, 0):.2f}",
                f"{outcome.milliseconds(name, 1):.1f}",
                "" if plain else f"{outcome.times(name, 1):.2f}",
                "" if plain else "yes" if layers.reached(name) else "NO",
            ]
