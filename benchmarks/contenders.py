"""Who is measured, and where. What a contender needs is imported in its own process only."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks.cases import AS_STORED, CASES
from benchmarks.jobs import Job

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

Loaded = Any
"""``torch.nn.Module | Mapping[str, torch.Tensor]``: a model, or a state dict of what was only read."""
Load = Callable[[str], Loaded]
"""Loads a folder."""

QUANTDOCK, TRANSFORMERS, FLOOR, LLAMA_CPP = "quantdock", "transformers", "floor", "llama.cpp"
FUNCTION, SUBSTITUTE = "transformers' function", "transformers, torchao"
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to get weights into memory."""

    where: str
    """``module:function``; the function takes a job, imports what it needs, and returns a ``Load``."""
    about: str
    cases: Collection[str] | None = None
    """Those it can do; ``None`` for all."""
    required: bool = False
    """It fails, the benchmark fails; any other is left out, with the reason."""
    partial: bool = False
    """It makes only some of the model's tensors; those are compared."""
    comparable: bool = True
    """It is to make the same bits; what doesn't isn't compared."""


CONTENDERS: Mapping[str, Contender] = {
    QUANTDOCK: Contender(where="loaders:quantdock", about="quantdock.load", required=True),
    TRANSFORMERS: Contender(
        where="loaders:transformers",
        about="from_pretrained",
        cases=[name for name, case in CASES.items() if case.config is not None],
        required=True,
    ),
    FLOOR: Contender(
        where="floor:floor",
        about="maps the files and runs quantdock's kernel over the weights, no model",
        cases=("nf4", "fp4", "int8"),
        partial=True,
    ),
    FUNCTION: Contender(
        where="readers:fp8_function",
        about="transformers' own Fp8Quantize on every weight of the mapped files, no model; it makes none on a CPU",
        cases=("fp8", "fp8-block"),
        partial=True,
    ),
    SUBSTITUTE: Contender(
        where="loaders:torchao_float8",
        about="from_pretrained with torchao's float8 per row, as it refuses FP8 on a CPU: other bits, as many of them",
        cases=("fp8", "fp8-row", "fp8-block"),
        comparable=False,
    ),
    "accelerate": Contender(
        where="loaders:accelerate", about="load_checkpoint_and_dispatch into an empty model", cases=(AS_STORED,)
    ),
    "safetensors": Contender(
        where="readers:safetensors", about="load_file of every shard, no model", cases=(AS_STORED,), partial=True
    ),
    "fastsafetensors": Contender(
        where="readers:fastsafetensors", about="fastsafe_open of all shards, no model", cases=(AS_STORED,), partial=True
    ),
    "instanttensor": Contender(
        where="readers:instanttensor", about="safe_open of all shards, no model", cases=(AS_STORED,), partial=True
    ),
    "runai": Contender(
        where="readers:runai", about="SafetensorsStreamer of all shards, no model", cases=(AS_STORED,), partial=True
    ),
}
"""quantdock comes first: the others are compared with it."""

DEFAULT = (QUANTDOCK, TRANSFORMERS, FLOOR, FUNCTION, SUBSTITUTE)


def chosen(names: Sequence[str], case: str) -> list[str]:
    """Those of ``names`` (or all) that can do ``case``; quantdock always and first."""
    wanted = CONTENDERS if ALL in names else [name for name in CONTENDERS if name in names or name == QUANTDOCK]
    return [name for name in wanted if (cases := CONTENDERS[name].cases) is None or case in cases]


def loader(job: Job) -> Load:
    """Import the job's contender; what comes back loads a folder."""
    module, _, function = CONTENDERS[job.contender].where.partition(":")
    make: Callable[[Job], Load] = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    return make(job)


def state_of(loaded: Loaded) -> Mapping[str, torch.Tensor]:
    """The state dict of a model, or what was only read."""
    state: Mapping[str, torch.Tensor] = loaded if isinstance(loaded, Mapping) else loaded.state_dict()
    return state


def in_turns(names: Sequence[T], run_number: int) -> list[T]:
    """The contenders in the order of this run: every other one goes backwards, so that none always comes first."""
    return list(reversed(names)) if run_number % 2 else list(names)
