"""The process that times single layers: takes a ``LayersJob`` as JSON and answers with a ``LayersOutcome``."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import versions

PLAIN = "bf16"
_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class LayersJob:
    """Time layers of one shape, quantized in several ways, beside the same in bfloat16."""

    outputs: int
    inputs: int
    presets: list[str]
    """quantdock's; each loads a model of such layers."""
    rows: list[int]
    """Of activations."""
    copies: int
    """Layers that take turns, so that a weight comes from memory, as it does when a model generates."""
    repeats: int


@dataclass(frozen=True, kw_only=True)
class LayersOutcome:
    """Times in seconds."""

    paths: dict[str, str]
    """Preset -> how it multiplies in bfloat16, if its layers say so."""
    seconds: dict[str, list[list[float]]]
    """Preset, or ``bf16`` -> for each number of rows, of each repeat, the time of one layer."""
    versions: Mapping[str, str]
    threads: int

    def milliseconds(self, name: str, index: int) -> float:
        """The median."""
        return 1e3 * statistics.median(self.seconds[name][index])

    def times(self, name: str, index: int) -> float:
        """How many times as long as bfloat16: the median of what was measured side by side."""
        pairs = zip(self.seconds[name][index], self.seconds[PLAIN][index], strict=True)
        return statistics.median(own / plain for own, plain in pairs)


def measure(job: LayersJob) -> LayersOutcome:
    """Write a checkpoint, load it in each way, let them take turns."""
    import torch

    models, paths = _models(job)
    seconds: dict[str, list[list[float]]] = {name: [] for name in models}
    with torch.inference_mode():
        for rows in job.rows:
            x = torch.randn(rows, job.inputs).to(torch.bfloat16)
            few = {name: layers[: job.copies if rows < 16 else 1] for name, layers in models.items()}
            for layers in few.values():
                _seconds(layers, x)
            runs = [{name: _seconds(layers, x) for name, layers in few.items()} for _ in range(job.repeats)]
            for name in models:
                seconds[name].append([run[name] for run in runs])
    return LayersOutcome(paths=paths, seconds=seconds, versions=versions(), threads=torch.get_num_threads())


def _seconds(layers: list[Callable[[Any], Any]], x: object) -> float:
    start = time.perf_counter()
    for layer in layers:
        layer(x)
    return (time.perf_counter() - start) / len(layers)


def _models(job: LayersJob) -> tuple[dict[str, list[Any]], dict[str, str]]:
    import torch
    from safetensors.torch import save_file

    import quantdock

    def build() -> torch.nn.Module:
        layers = [torch.nn.Linear(job.inputs, job.outputs, bias=False, dtype=torch.bfloat16) for _ in range(job.copies)]
        return torch.nn.Sequential(*layers)

    models, paths = {}, {}
    with tempfile.TemporaryDirectory(prefix="quantdock-benchmarks-") as folder:
        generator = torch.Generator().manual_seed(0)
        weights = {
            f"{number}.weight": torch.randn(job.outputs, job.inputs, generator=generator).mul_(_STD).bfloat16()
            for number in range(job.copies)
        }
        file = Path(folder, "model.safetensors")
        save_file(weights, file)
        del weights
        for name in (PLAIN, *job.presets):
            quantize = None if name == PLAIN else name
            model = quantdock.load(str(file), model=build, quantize=quantize, progress=False).eval()
            models[name] = [layer.forward for layer in model.children()]
            for way in quantdock.report(model).paths.values():  # that of bfloat16 comes first, and all are alike
                paths[name] = way.partition(" ")[0]
    return models, paths


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # what a library prints isn't the answer
    outcome = measure(LayersJob(**json.load(sys.stdin)))
    print(json.dumps(dataclasses.asdict(outcome)), file=answer, flush=True)
