"""What happened in a load, kept with the model."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """What was calibrated with how many samples and tokens, and the bytes that were kept of them; empty for nothing."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Module -> how it multiplies activations of each dtype where it is now; of those that choose between the paths of
    ``quantdock.linears``."""

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
        facts += [("calibration", f"{name} {value}") for name, value in self.calibration.items()]
        facts += [("multiplies by", f"{way}: {count} modules") for way, count in Counter(self.paths.values()).items()]
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
    """The report of the load that made ``model``; the paths are those of the model as it is now.

    Raises:
        QuantdockError: it wasn't loaded by quantdock.
    """
    return dataclasses.replace(record_of(model).report, paths=_paths(model))


def _paths(model: torch.nn.Module) -> dict[str, str]:
    linears = sys.modules.get("quantdock.linears")
    if linears is None:  # nobody has made such a module, and a load that needs none doesn't import it
        return {}
    result = {}
    for name, module in model.named_modules():
        paths = linears.paths_of(module)
        if paths is not None:
            dtypes: dict[str, list[str]] = {}
            for dtype, path in paths.items():
                dtypes.setdefault(path, []).append(dtype)
            result[name] = ", ".join(f"{path} in {' and '.join(each)}" for path, each in dtypes.items())
    return result


def measured_nbytes(model: torch.nn.Module) -> int:
    """Bytes of every tensor that the model holds, each storage region once.

    Looks where tensors are kept: parameters, buffers, attributes of modules and parameters, and the plain objects
    and containers that those point to (a quantizer's state objects, for instance).
    """
    seen: set[int] = set()
    counted: set[tuple[int, int]] = set()
    total = 0
    ways: dict[type, Callable[[Any], Iterable[object]]] = {}
    pending: list[object] = [model]
    with torch._C.DisableTorchFunctionSubclass():  # what is asked here, no subclass answers in a way of its own
        while pending:
            item = pending.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            kind = type(item)
            look = ways.get(kind) or ways.setdefault(kind, _way_into(kind))
            if look is _in_tensor:
                assert isinstance(item, torch.Tensor)
                if not item.is_meta:
                    key = (item.data_ptr(), item.nbytes)
                    if key not in counted:
                        counted.add(key)
                        total += key[1]
            # Of the 10,000 objects in a model of 16 blocks, 6,000 are plain values and 3,000 hooks' dicts without any.
            pending += [
                held for held in look(item) if (of := type(held)) not in _PLAIN and (of not in _CONTAINERS or held)
            ]
    return total


def _way_into(kind: type) -> Callable[[Any], Iterable[object]]:
    """What gives the objects that one of type ``kind`` holds."""
    if hasattr(kind, "__tensor_flatten__"):
        return _in_object  # a tensor that wraps others has no memory of its own; theirs is found among its attributes
    if issubclass(kind, torch.Tensor):
        return _in_tensor
    if issubclass(kind, torch.nn.Module):
        return _in_module
    if issubclass(kind, dict):  # not any mapping: accelerate's read a file for every value
        return kind.values
    if issubclass(kind, list | tuple):
        return iter
    callable_ = any("__call__" in base.__dict__ for base in kind.__mro__)  # hasattr would find type's own
    if kind.__module__.partition(".")[0] in _LIBRARIES or issubclass(kind, type) or callable_:
        return _in_nothing
    return _in_object


def _in_object(item: Any) -> Iterable[object]:
    return getattr(item, "__dict__", {}).values()


def _in_tensor(item: torch.Tensor) -> Iterable[object]:
    return item.__dict__.values()


def _in_module(item: torch.nn.Module) -> Iterable[object]:
    return [value for key, value in item.__dict__.items() if key != _ATTRIBUTE]


def _in_nothing(item: object) -> Iterable[object]:
    return ()


_PLAIN = frozenset({bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
"""Types that nearly every attribute has, and that hold nothing."""

_CONTAINERS = frozenset({dict, OrderedDict, set, list, tuple})
"""Types that are worth a look when something is in them."""

_LIBRARIES = frozenset({"builtins", "torch", "re", "functools", "collections", "logging", "pathlib", "threading"})
