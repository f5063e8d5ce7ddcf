"""Match stored tensors with parameters and parameters with quantizers; whatever doesn't fit becomes a problem.

This is where invariants 1 and 2 are decided: every parameter is written exactly once or tied to one that is, every
stored tensor is used exactly once or ignored with a reason, and nothing falls back silently.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from quantdock.architecture import Architecture, Skeleton
from quantdock.checkpoint import Checkpoint
from quantdock.conversion import Assembly, Conversion
from quantdock.deciding import Decision, decide
from quantdock.errors import LedgerError
from quantdock.joining import Pieces
from quantdock.options import LoadOptions
from quantdock.patterns import matching, require_matches
from quantdock.registry import Selection
from quantdock.slots import slots
from quantdock.tensors import Parameter, StoredTensor, TensorSpec, qualified
from quantdock.tying import TiedGroup, resolve_ties

NEW_HEAD = "a new task head"
"""The reason with which the drop-in classes let a head be initialised."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(kw_only=True)
class Match:
    """The outcome: the ledger's two sides, before devices are known."""

    parameters: dict[str, Parameter]
    conversions: list[Conversion] = field(default_factory=list)
    components: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    """Parameter stored quantized -> component -> stored tensor."""
    pieces: dict[str, Pieces] = field(default_factory=dict)
    """Parameter stored quantized, in several pieces -> those."""
    assemblies: dict[str, Assembly] = field(default_factory=dict)
    """Parameter -> the pieces it is put together from, where that isn't one stored tensor as it is."""
    stored_as: dict[str, str] = field(default_factory=dict)
    """Parameter stored quantized -> the name it has in the checkpoint."""
    decisions: dict[str, Decision] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Parameter that is initialised -> why it may be missing."""
    ignored: dict[str, str] = field(default_factory=dict)
    allowed: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def stored_specs(self, name: str) -> Mapping[str, TensorSpec]:
        """Component -> dtype and shape, of a parameter stored quantized; to be asked when decisions are made."""
        joined = self.decisions[name].joined
        return {part: tensor.spec for part, tensor in self.components[name].items()} if joined is None else joined.specs


def list_parameters(skeleton: Skeleton) -> dict[str, Parameter]:
    """Every parameter and persistent buffer of the skeleton, tied ones under each of their names."""
    model, architecture = skeleton.model, skeleton.architecture
    specs: dict[tuple[torch.dtype, torch.Size], TensorSpec] = {}
    result = {}
    for name, slot, module in slots(model):
        leaf = name.rpartition(".")[2]
        dtype = (architecture.dtype(name) or slot.dtype) if slot.is_floating_point() else slot.dtype
        spec = specs.setdefault((dtype, slot.shape), TensorSpec(dtype=dtype, shape=tuple(slot.shape)))
        result[name] = Parameter(
            name=name,
            spec=spec,
            module_type=type(module),
            role=architecture.role(module, leaf),
            is_buffer=leaf in module._buffers,
        )
    return result


def match(skeleton: Skeleton, checkpoint: Checkpoint, selection: Selection, options: LoadOptions) -> Match:
    """Draw up both sides of the ledger.

    Raises:
        LedgerError: they don't balance; lists everything that is wrong at once.
        PatternError: a pattern the user gave matches nothing.
    """
    found = Match(parameters=list_parameters(skeleton))
    for chosen in selection:
        chosen.quantizer.metadata, chosen.quantizer.stored_as = checkpoint.metadata, found.stored_as
        chosen.quantizer.assemblies = found.assemblies
    companions = _split_companions(found, checkpoint, selection)
    groups = _group(companions, checkpoint)
    stored = {name: tensor.spec for name, tensor in checkpoint.tensors.items() if name not in companions}
    routing = skeleton.architecture.route(
        stored | {base: _stand_in(base, parts, stored, selection) for base, parts in groups.items()},
        {name: parameter.spec for name, parameter in found.parameters.items()},
    )
    _take_conversions(found, routing.conversions, groups, checkpoint, selection)
    _take_unmatched(found, routing.unmatched, groups, skeleton.architecture, checkpoint, options)
    _resolve_tied(found, skeleton.architecture, checkpoint)
    _check_shapes(found, checkpoint, options)
    _take_missing(found, skeleton.architecture, options)
    quantizes = bool(selection.rules) and not selection.prequantized
    kept = skeleton.architecture.kept() if quantizes else {}
    found.decisions, problems = decide(found, kept, selection, options)
    found.problems += problems
    _check_patterns(found, checkpoint, selection, options)
    if found.problems:
        raise LedgerError(
            f"the checkpoint and the model don't match: {len(found.problems)} problem(s). Nothing was loaded.",
            found.problems,
        )
    return found


def _split_companions(found: Match, checkpoint: Checkpoint, selection: Selection) -> dict[str, tuple[str, str]]:
    """Stored tensors that belong to a quantized parameter: stored name -> (the parameter's stored name, component).

    One that is called like a component (``scale``), but is a parameter itself and beside no other, isn't among them.
    """
    if not selection.prequantized:
        return {}
    suffixes: dict[str, str] = {}
    for chosen in selection:
        suffixes.update(chosen.quantizer.companions())
    dots = sorted({component.count(".") for component in suffixes}, reverse=True)  # the longest that fits is meant
    result = {}
    for name in checkpoint.tensors:
        for count in dots:
            before = name.rsplit(".", count + 1)[0] if name.count(".") > count else ""
            component = name[len(before) + 1 :] if before else name
            leaf = suffixes.get(component)
            if leaf is None:
                continue
            base = qualified(before, leaf)
            if base in checkpoint.tensors or name not in found.parameters:
                result[name] = (base, component)
            break
    return result


def _group(companions: Mapping[str, tuple[str, str]], checkpoint: Checkpoint) -> dict[str, dict[str, StoredTensor]]:
    groups: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, (base, component) in companions.items():
        groups[base][component] = checkpoint.tensors[name]
    return dict(groups)


def _stand_in(
    base: str, parts: Mapping[str, StoredTensor], stored: Mapping[str, TensorSpec], selection: Selection
) -> TensorSpec:
    """What a quantized parameter is routed as: its own dtype and shape where a quantizer can tell them, else those of
    what is stored under its name, or of any of its components."""
    own = {base.rpartition(".")[2]: stored[base]} if base in stored else {}
    found = own | {component: tensor.spec for component, tensor in parts.items()}
    told = (chosen.quantizer.stands_for(base, found) for chosen in selection)
    return next((spec for spec in told if spec is not None), None) or next(iter(found.values()))


def _take_conversions(
    found: Match,
    conversions: Iterable[Conversion],
    groups: dict[str, dict[str, StoredTensor]],
    checkpoint: Checkpoint,
    selection: Selection,
) -> None:
    written: dict[str, tuple[str, ...]] = {}
    for conversion in conversions:
        twice = [target for target in conversion.targets if target in written]
        found.problems += [
            f"parameter {target!r} would be written twice, from {list(written[target])[:3]} and from "
            f"{list(conversion.sources)[:3]}"
            for target in twice
        ]
        if twice:
            continue
        written.update(dict.fromkeys(conversion.targets, conversion.sources))
        if not conversion.is_rename:
            found.assemblies.update(conversion.assemblies or {})
        quantized = [source for source in conversion.sources if source in groups]
        if not quantized:
            found.conversions.append(conversion)
        elif conversion.is_rename:
            (source,), (target,) = conversion.sources, conversion.targets
            found.components[target] = _own(found.parameters[target].leaf, source, checkpoint) | groups.pop(source)
            found.stored_as[target] = source
        elif conversion.assemblies is None or len(conversion.targets) > 1:
            found.problems.append(
                f"parameter {next(iter(conversion.targets))!r} is made from quantized tensors ({quantized[0]!r}, ...) "
                f"by {conversion.label}, which isn't supported for {_methods(selection)}"
            )
        else:
            (target,) = conversion.targets
            found.pieces[target] = Pieces(
                conversion=conversion,
                stored={
                    source: _own(source.rpartition(".")[2], source, checkpoint) | groups.pop(source, {})
                    for source in conversion.sources
                },
            )


def _own(component: str, stored: str, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """What is stored under a quantized parameter's own name; methods that have nothing there use other names."""
    return {component: checkpoint.tensors[stored]} if stored in checkpoint.tensors else {}


def _methods(selection: Selection) -> str:
    return " and ".join(chosen.label for chosen in selection) or "an unquantized load"


def _take_unmatched(
    found: Match,
    unmatched: Mapping[str, str],
    groups: Mapping[str, Mapping[str, StoredTensor]],
    architecture: Architecture,
    checkpoint: Checkpoint,
    options: LoadOptions,
) -> None:
    for stored, target in unmatched.items():
        parts = [part.name for part in groups.get(stored, {}).values()]
        names = parts if stored in groups and stored not in checkpoint.tensors else [stored, *parts]
        reason = architecture.may_be_unexpected(stored, target)
        pattern = matching(options.ignore_unexpected, stored) or matching(options.ignore_unexpected, target)
        if reason is None and pattern is not None:
            reason = f"ignore_unexpected={pattern!r}"
            found.allowed.update(dict.fromkeys(names, reason))
        if reason is None:
            looked = "" if target == stored else f" (looked up as {target!r})"
            found.problems += [
                f"stored tensor {name!r}{looked} has no parameter in the model; if it may be left out, pass "
                "ignore_unexpected=[...]"
                for name in names
            ]
        else:
            found.ignored.update(dict.fromkeys(names, reason))


def _resolve_tied(found: Match, architecture: Architecture, checkpoint: Checkpoint) -> None:
    tied = architecture.tied()
    if not tied:
        return
    by_target = {target: conversion for conversion in found.conversions for target in conversion.targets}
    dropped: set[int] = set()
    for group in TiedGroup.of(tied):
        outcome = resolve_ties(group, by_target, found.components.keys() | found.pieces.keys(), checkpoint)
        found.tied.update(outcome.tied)
        for name, reason in outcome.dropped.items():
            conversion = by_target[name]
            dropped.add(id(conversion))
            found.ignored.update(dict.fromkeys(conversion.sources, reason))
        for name, note in outcome.untied.items():
            found.allowed[name] = note
    found.conversions = [conversion for conversion in found.conversions if id(conversion) not in dropped]


def _check_shapes(found: Match, checkpoint: Checkpoint, options: LoadOptions) -> None:
    kept = []
    for conversion in found.conversions:
        mismatched = []
        for target, yields in conversion.targets.items():
            wanted = found.parameters[target].spec
            if yields.shape != wanted.shape:
                mismatched.append(target)
                if not options.ignore_mismatched_sizes:
                    found.problems.append(
                        f"parameter {target!r} has shape {list(wanted.shape)}, but the checkpoint gives "
                        f"{list(yields.shape)} ({_origin(conversion, checkpoint)}); ignore_mismatched_sizes=True would "
                        "initialise it anew"
                    )
            elif not castable(yields.dtype, wanted.dtype):
                found.problems.append(
                    f"parameter {target!r} is {wanted}, but the checkpoint stores {yields} "
                    f"({_origin(conversion, checkpoint)}) and no quantizer claims it: a scale may be missing, or its "
                    "quantization_config"
                )
        if not mismatched:
            kept.append(conversion)
        else:
            if options.ignore_mismatched_sizes and len(conversion.targets) > len(mismatched):
                found.problems.append(f"{', '.join(conversion.targets)} are made together and only some shapes fit")
            note = "ignore_mismatched_sizes"
            found.missing.update(dict.fromkeys(conversion.targets, note))
            found.allowed.update(dict.fromkeys(mismatched, note))
            found.ignored.update(dict.fromkeys(conversion.sources, f"{note}: {', '.join(mismatched)}"))
    found.conversions = kept


def _origin(conversion: Conversion, checkpoint: Checkpoint) -> str:
    return ", ".join(f"{name!r} in {checkpoint.tensors[name].file}" for name in conversion.sources[:2])


def castable(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether values may be cast on the way: between floats of 16 bits and more, and to wider integers. Anything
    else (integers to floats, 8-bit floats) would be a quantized tensor that lost its scale."""
    if stored == wanted or (stored in _FLOATS and wanted in _FLOATS):
        return True
    return stored in _INTEGERS and wanted in _INTEGERS and stored.itemsize <= wanted.itemsize


def _take_missing(found: Match, architecture: Architecture, options: LoadOptions) -> None:
    written = {target for conversion in found.conversions for target in conversion.targets}
    written |= found.components.keys() | found.pieces.keys() | found.tied.keys() | found.missing.keys()
    for name in found.parameters:
        if name in written:
            continue
        reason = architecture.may_be_missing(name)
        pattern = matching(options.allow_missing, name)
        if reason is None and pattern is not None:
            reason = found.allowed[name] = f"allow_missing={pattern!r}"
        if reason is None and options.extras.get("allow_new_head") and architecture.is_head(name):
            reason = found.allowed[name] = NEW_HEAD
        if reason is None:
            found.problems.append(
                f"parameter {name!r} ({found.parameters[name].spec}) is not in the checkpoint; if it may be "
                "initialised anew, pass allow_missing=[...]"
            )
        else:
            found.missing[name] = reason


def _check_patterns(found: Match, checkpoint: Checkpoint, selection: Selection, options: LoadOptions) -> None:
    names = list(found.parameters)
    require_matches("skip", options.skip, names, of="parameter")
    require_matches("allow_missing", options.allow_missing, names, of="parameter")
    require_matches("ignore_unexpected", options.ignore_unexpected, list(checkpoint.tensors), of="stored tensor")
    if selection.by_user:
        require_matches("quantize", [rule.pattern for rule in selection.rules], names, of="parameter")
