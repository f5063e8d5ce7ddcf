"""What a worker process is asked to do, and what it answers; both travel as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Job:
    """One load by one contender."""

    contender: str
    case: str
    folder: str
    warm_up: str
    """A tiny checkpoint that is loaded first, so that nothing is imported any more when the load is measured."""
    memory_budget: str | None = None
    """For quantdock; ``None`` for its default."""
    workers: int | None = None
    """For quantdock; ``None`` for its default."""
    sample: bool = False
    """Tell anonymous memory from mapped files; costs the load a little time."""
    checksums: bool = False


@dataclass(frozen=True, kw_only=True)
class SaveJob:
    """Make a quantized checkpoint."""

    folder: str
    quantize: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the worker measured; memory in bytes, time in seconds."""

    start_seconds: float
    """From a bare interpreter until the tiny checkpoint is loaded: every import that a load needs, early or late."""
    load_seconds: float
    touch_seconds: float
    """Reading a byte of every page of the model afterwards."""
    cpu_seconds: float
    """Processor time of all threads for both of these; other tasks on the machine stretch it less than wall time."""
    level: int
    """Resident before the load."""
    peak: int
    """Highest resident during the load."""
    settled: int
    """Resident when the load was over, no page touched yet."""
    peak_touched: int
    """Highest resident until every page of the model had been read."""
    peak_anonymous: int | None
    peak_file: int | None
    """Of what was sampled, over the level before the load, touching included; not necessarily at the same moment."""
    model_nbytes: int
    """Bytes of the model's tensors."""
    predicted_nbytes: int | None = None
    """What quantdock's plan said the model would take."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """quantdock's own account of the load."""
    checksums: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0

    @property
    def ready_seconds(self) -> float:
        """Until the weights are in memory, whether the loader or the first use of a mapped weight brings them in."""
        return self.load_seconds + self.touch_seconds

    @property
    def growth(self) -> int:
        """Peak over the level before the load, every page of the model in memory."""
        return self.peak_touched - self.level

    @property
    def overhead(self) -> int:
        """Peak beyond what the model itself takes, with every page of it in memory."""
        return self.growth - self.model_nbytes

    @property
    def passing(self) -> int:
        """What the load had resident at its peak and gave back: the stricter look, where a part of the model is only
        mapped and so leaves room under ``overhead``."""
        return self.peak - self.settled

    @property
    def beyond(self) -> int:
        """The larger of these two: what the load took beside its model."""
        return max(self.overhead, self.passing)


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """Plan one load, or only build its model."""

    family: str
    folder: str
    warm_up: str
    quantize: str | None
    build_only: bool


@dataclass(frozen=True, kw_only=True)
class PlanOutcome:
    """What planning took; memory in bytes, time in seconds."""

    start_seconds: float
    """Imports and the tiny plan, from a bare interpreter."""
    seconds: float
    growth: int
    """Peak over the level before."""
    held: int
    """Resident with the plan made, over the level before."""
    planned_nbytes: int | None
    """What the plan says the model will take."""
    stages: Mapping[str, float]
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class DecodeJob:
    """Load a model and let it generate, one token at a time."""

    load: Job
    prompt: int
    """Tokens that are there at the start."""
    tokens: int
    """To generate after them, whatever they are."""
    repeats: int
    dtype: str | None = None
    """What the model is loaded in, as it is stored otherwise; ``None`` for what the load's case says."""


@dataclass(frozen=True, kw_only=True)
class DecodeOutcome:
    """How fast a model is; the best of the repeats counts, which other tasks on the machine disturb least."""

    prefill_seconds: list[float]
    """For the whole prompt at once, each repeat."""
    decode_seconds: list[float]
    """For all generated tokens but the first, which comes from the prompt, each repeat."""
    tokens: list[int]
    """What was generated: always the likeliest."""
    logits: list[float]
    """The first ones after the prompt, if the contender tells."""
    versions: Mapping[str, str]
    threads: int
