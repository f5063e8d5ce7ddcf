"""What happened in a load, kept with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from quantdock.errors import QuantdockError
from quantdock.ledger import Ledger
from quantdock.tables import format_bytes, format_table, grouped, groups_table

if TYPE_CHECKING:
    from quantdock.architecture import Architecture
    from quantdock.registry import Selection

_ATTRIBUTE = "_quantdock"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report of one load; print it, or take ``to_dict()``."""

    source: Mapping[str, str]
    ledger: Ledger
    predicted_nbytes: int
    """Bytes that the plan said the model would hold."""
    measured_nbytes: int
    """Bytes that the model holds, counted tensor by tensor."""
    memory_budget: int
    in_flight_peak_nbytes: int
    """Most bytes that were counted against the budget at once."""
    process_peak_nbytes: int
    """Peak resident memory of the whole process since it started, imports included; 0 where it can't be known."""
    seconds: Mapping[str, float]
    """Wall-clock time per stage."""
    workers: int
    plugins: Mapping[str, str]
    """Distribution -> version, of the plugins that were allowed."""
    refused: Mapping[str, str]
    """Distribution -> why the policy refused it."""
    policy: str
    broken: Mapping[str, str]
    """Stage plugins that couldn't be imported -> why; no part of this load needed them."""
    operations: str
    """What ran the operations on the bits of weights that plugins share: compiled kernels or torch, and why."""
    cache: Mapping[str, str]
    """What the result cache did: ``state`` (``off``, ``unused``, ``hit``, ``made`` or ``failed``), which ``entry`` it
    used or made, and the ``reason`` if it did neither."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data; parameters are grouped."""
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "ledger"}
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in plain.items()}
        return plain | {
            "groups": [dataclasses.asdict(group) for group in grouped(self.ledger.entries)],
            "ignored": dict(self.ledger.ignored),
            "allowed": dict(self.ledger.allowed),
            "coverage": self.ledger.coverage,
            "unquantized": self.ledger.unquantized,
        }

    def __str__(self) -> str:
        ledger = self.ledger
        stored = max(1, ledger.stored_nbytes)
        lines = [f"report for {self.source.get('name', '?')}", groups_table(grouped(ledger.entries)), ""]
        facts = [
            ("resident bytes", f"predicted {self.predicted_nbytes}, measured {self.measured_nbytes}"),
            ("stored bytes", f"{ledger.stored_nbytes} ({format_bytes(ledger.stored_nbytes)})"),
            (
                "in flight",
                f"peak {format_bytes(self.in_flight_peak_nbytes)} of {format_bytes(self.memory_budget)}",
            ),
            ("workers", str(self.workers)),
            ("seconds", ", ".join(f"{name} {value:.3f}" for name, value in self.seconds.items())),
            ("plugins", ", ".join(f"{name} {version}" for name, version in self.plugins.items()) or "none"),
            ("policy", self.policy),
            ("operations", self.operations),
            ("cache", cache_line(self.cache)),
        ]
        facts += [(f"covered by {m or 'none'}", f"{amount / stored:.1%}") for m, amount in ledger.coverage.items()]
        facts += [("full precision", f"{format_bytes(n)}: {reason}") for reason, n in ledger.unquantized.items()]
        facts += [("ignored", f"{name}: {reason}") for name, reason in ledger.ignored.items()]
        facts += [("allowed", f"{name}: {reason}") for name, reason in ledger.allowed.items()]
        facts += [("refused", f"{name}: {reason}") for name, reason in self.refused.items()]
        facts += [("broken", f"{name}: {reason}") for name, reason in self.broken.items()]
        lines.append(format_table(("what", "value"), facts))
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a loaded model carries with it."""

    report: Report
    architecture: Architecture
    selection: Selection
    quantization_config: Mapping[str, Any] | None


def cache_line(facts: Mapping[str, str]) -> str:
    """What the result cache did, for people."""
    texts = [facts["state"], facts.get("entry", "")[:12], facts.get("reason", "")]
    return ": ".join(text for text in texts if text)


def attach(model: torch.nn.Module, record: Record) -> None:
    """Keep ``record`` with the model; a copy of the model has it too."""
    model.__dict__[_ATTRIBUTE] = record


def record_of(model: torch.nn.Module) -> Record:
    """The record of a model that quantdock loaded.

    Raises:
        QuantdockError: it wasn't loaded by quantdock.
    """
    record = model.__dict__.get(_ATTRIBUTE)
    if not isinstance(record, Record):
        raise QuantdockError(f"this {type(model).__name__} wasn't loaded by quantdock, so it has no report")
    return record


def report(model: torch.nn.Module) -> Report:
    """The report of the load that made ``model``.

    Raises:
        QuantdockError: it wasn't loaded by quantdock.
    """
    return record_of(model).report


def measured_nbytes(model: torch.nn.Module) -> int:
    """Bytes of every tensor that the model holds, each storage region once.

    Looks where tensors are kept: parameters, buffers, attributes of modules and parameters, and the plain objects
    and containers that those point to (a quantizer's state objects, for instance).
    """
    seen: set[int] = set()
    counted: set[tuple[int, int]] = set()
    total = 0
    pending: list[object] = [model]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            key = (item.data_ptr(), item.nbytes)
            # A tensor that wraps others has no memory of its own; theirs is found among its attributes.
            if not item.is_meta and key not in counted and not hasattr(item, "__tensor_flatten__"):
                counted.add(key)
                total += item.nbytes
        pending += _held(item)
    return total


def _held(item: object) -> list[object]:
    if isinstance(item, torch.nn.Module):
        state = {key: value for key, value in vars(item).items() if key != _ATTRIBUTE}
        return list(state.values())
    if isinstance(item, dict):  # not any mapping: accelerate's read a file for every value
        return list(item.values())
    if isinstance(item, list | tuple):
        return list(item)
    if isinstance(item, torch.Tensor) or type(item).__module__.partition(".")[0] not in _LIBRARIES:
        return list(getattr(item, "__dict__", {}).values()) if not isinstance(item, type) and not callable(item) else []
    return []


_LIBRARIES = frozenset({"builtins", "torch", "re", "functools", "collections", "logging", "pathlib", "threading"})
