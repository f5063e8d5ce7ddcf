"""Which quantizer takes which parameter, and why the rest stays in full precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantdock.errors import UnsupportedError
from quantdock.joining import Joined, Pieces, join
from quantdock.layout import Layout
from quantdock.options import LoadOptions
from quantdock.patterns import PatternIndex, is_literal
from quantdock.registry import Chosen, Rule, Selection
from quantdock.tensors import Parameter, StoredTensor
from quantdock.tying import TiedGroup

if TYPE_CHECKING:
    from quantdock.matching import Match


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a parameter becomes: quantized by ``chosen`` as ``layout``, or full precision for the reason ``note``."""

    chosen: Chosen | None = None
    layout: Layout | None = None
    joined: Joined | None = None
    """How its components are put together, if it is stored quantized in several pieces."""
    note: str = ""
    problem: str = ""
    """Why the load can't go on; empty when it can."""


def decide(
    found: Match, kept: Mapping[str, str], selection: Selection, options: LoadOptions
) -> tuple[dict[str, Decision], list[str]]:
    """A decision for every parameter, and what is wrong with them.

    Args:
        found: both sides of the ledger so far: ties, what is missing, what is stored quantized.
        kept: parameters that the architecture leaves alone by default -> reason.
        selection: the quantizers and their patterns.
        options: the user's ``skip``.
    """
    index = PatternIndex(rule.pattern for rule in selection.rules)
    skips = PatternIndex(options.skip)
    unasked = Decision(note="stored unquantized") if selection.prequantized else Decision(note="not asked for")
    decisions = {}
    for name, parameter in found.parameters.items():
        if name in found.tied:
            decisions[name] = Decision(note=f"tied to {found.tied[name]}")
        elif name in found.missing:
            decisions[name] = Decision(note=f"initialised: {found.missing[name]}")
        elif name in found.components:
            decisions[name] = _for_stored(
                parameter, found.components[name], [selection.rules[i] for i in index.matching(name)]
            )
        elif name in found.pieces:
            decisions[name] = _for_pieces(
                parameter, found.pieces[name], [selection.rules[i] for i in index.matching(name)]
            )
        elif selection.prequantized or not selection.rules:
            decisions[name] = unasked
        elif (number := index.first(name)) is None:
            decisions[name] = Decision(note="no pattern")
        elif (skipped := skips.first(name)) is not None and selection.rules[number].chosen is not None:
            decisions[name] = Decision(note=f"skip={options.skip[skipped]!r}")
        else:
            decisions[name] = _for_loading(parameter, selection.rules[number], kept)
    problems = [decision.problem for decision in decisions.values() if decision.problem]
    for group in sorted(TiedGroup.of(found.tied), key=lambda group: group.source):
        if decisions[group.source].chosen is not None:
            problems.append(
                f"parameter {group.source!r} is tied to {sorted(group.targets)} and can't be quantized alone; leave it "
                "out, or untie it with config_overrides"
            )
    return decisions, problems


def _for_stored(parameter: Parameter, components: Mapping[str, StoredTensor], rules: Sequence[Rule]) -> Decision:
    """A parameter that the checkpoint holds quantized goes to the first quantizer that can load it."""
    specs = {name: tensor.spec for name, tensor in components.items()}

    def decision(chosen: Chosen) -> Decision:
        return Decision(chosen=chosen, layout=chosen.quantizer.stored_layout(parameter, specs))

    what = f"parameter {parameter.name!r} is stored quantized ({', '.join(specs)}), but can't be loaded"
    return _first_that_can(parameter, rules, decision, what)


def _for_pieces(parameter: Parameter, pieces: Pieces, rules: Sequence[Rule]) -> Decision:
    """The same, of a parameter that is held in several quantized pieces."""

    def decision(chosen: Chosen) -> Decision:
        joined = join(chosen.quantizer, parameter, pieces)
        return Decision(chosen=chosen, layout=chosen.quantizer.stored_layout(parameter, joined.specs), joined=joined)

    made = pieces.conversion.targets[parameter.name].shape
    if made != parameter.spec.shape:
        return Decision(
            problem=f"parameter {parameter.name!r} has shape {list(parameter.spec.shape)}, but {len(pieces.stored)} "
            f"stored weights ({next(iter(pieces.stored))!r}, ...) give {list(made)}"
        )
    what = (
        f"parameter {parameter.name!r} is made from quantized tensors ({next(iter(pieces.tensors))!r}, ...) by "
        f"{pieces.conversion.label}, which isn't supported"
    )
    return _first_that_can(parameter, rules, decision, what)


def _first_that_can(
    parameter: Parameter, rules: Sequence[Rule], decision: Callable[[Chosen], Decision], what: str
) -> Decision:
    refusals = []
    for rule in rules:
        if rule.chosen is None:
            continue
        refusal = rule.chosen.quantizer.refusal(parameter)
        if refusal is not None:
            refusals.append(f"{rule.chosen.label}: {refusal}")
            continue
        try:
            return decision(rule.chosen)
        except UnsupportedError as error:
            refusals.append(str(error))
    return Decision(problem=f"{what}: {'; '.join(refusals) or 'no quantizer of this load takes it'}")


def _for_loading(parameter: Parameter, rule: Rule, kept: Mapping[str, str]) -> Decision:
    """A parameter in full precision goes where the first matching rule says, if everybody agrees."""
    if rule.chosen is None:
        return Decision(note=f"quantize={{{rule.pattern!r}: None}}")
    refusal = rule.chosen.quantizer.refusal(parameter)
    if refusal is None and parameter.name in kept and not _spells_out(rule, parameter):
        refusal = kept[parameter.name]
    if refusal is not None:
        return Decision(note=refusal)
    try:
        return Decision(chosen=rule.chosen, layout=rule.chosen.quantizer.layout(parameter))
    except UnsupportedError as error:
        return Decision(problem=f"parameter {parameter.name!r} can't be quantized with {rule.chosen.label}: {error}")


def _spells_out(rule: Rule, parameter: Parameter) -> bool:
    """Whether the user wrote this parameter's or its module's name, which overrules the architecture's skip list."""
    return is_literal(rule.pattern) and rule.pattern in (parameter.name, parameter.module)
