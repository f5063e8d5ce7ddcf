"""transformers' weight conversions as quantdock's: moved pieces where possible, transformers' own operations elsewhere.

The rules for which stored name becomes which parameter are transformers' (``core_model_loading``, 5.23): every
renaming in turn, then at most one converter, then the base model's prefix added or dropped.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quantdock import Assembly, Conversion, LedgerError, Piece, Routing, TensorSpec, rename
from quantdock_transformers.names import Names, in_order

_JOINING = ("MergeModulelist", "Concatenate")


@dataclass
class _Collected:
    """The stored tensors of one converter instance, by source pattern, in transformers' order."""

    converter: Any
    keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(key for keys in self.keys.values() for key in keys)


class _Shapes:
    """Stands for the model while operations ask it for the shapes of parameters, which quantizing changes."""

    def __init__(self, slots: Mapping[str, TensorSpec], config: Any) -> None:
        self._slots = slots
        self.config = config

    def get_parameter(self, name: str) -> torch.Tensor:
        spec = self._slots[name]
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")

    get_parameter_or_buffer = get_parameter


def route(
    transforms: Sequence[Any],
    stored: Mapping[str, TensorSpec],
    slots: Mapping[str, TensorSpec],
    *,
    config: Any,
    base_model_prefix: str,
    modular: Sequence[Any] = (),
) -> Routing:
    """Match stored tensors with parameters.

    Args:
        transforms: transformers' ``WeightTransform`` objects; those that match are marked as used.
        stored: stored name -> dtype and shape.
        slots: parameter name -> dtype and shape in full precision.
        config: the model's config object, which some operations read.
        base_model_prefix: the name of the base model inside a model with a head.
        modular: converters of experts' modular names (``experts.modular``); those that match are marked as used.

    Raises:
        LedgerError: one parameter is stored under two kinds of names, or its parts don't fit together.
    """
    from transformers.core_model_loading import WeightConverter

    names = Names(transforms, slots, base_model_prefix, modular)
    converters = [entry for entry in (*modular, *transforms) if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: dict[str, _Collected] = {}
    conversions: list[Conversion] = []
    unmatched: dict[str, str] = {}
    for key in in_order(stored):
        target, pattern = names.target(key)
        if target not in slots:
            unmatched[key] = target
        elif pattern is None:
            conversions.append(rename(key, target, stored[key]))
        else:
            group = collected.setdefault(target, _Collected(by_pattern[pattern]))
            _expect_one_spelling(target, group, by_pattern[pattern], key)
            group.keys[pattern].append(key)
    converting = _Converting(stored, slots, config)
    for target, group in collected.items():
        converting.expect_alike(target, group)
        _expect_each_part(target, group, unmatched)
    conversions += [converting.conversion(target, group) for target, group in collected.items()]
    return Routing(conversions=conversions, unmatched=unmatched)


def _expect_one_spelling(target: str, group: _Collected, converter: Any, key: str) -> None:
    if group.converter is not converter:
        raise LedgerError(
            f"the checkpoint and the model don't match: {target!r} is stored under two kinds of names, and there is no "
            "telling which are meant; remove one of them. Nothing was loaded.",
            [f"{name!r} is a part of {target!r}" for name in (group.sources[0], key)],
        )


def _expect_each_part(target: str, group: _Collected, unmatched: Mapping[str, str]) -> None:
    """What is stacked and then joined is there as often as what it is joined with (gates beside ups)."""
    joined = [type(operation).__name__ for operation in group.converter.operations] == list(_JOINING)
    counts = {pattern: len(group.keys[pattern]) for pattern in group.converter.source_patterns if pattern in group.keys}
    alone = len(counts) == 1 < len(group.converter.source_patterns)
    if joined and (alone or len(set(counts.values())) > 1):
        module = target.rpartition(".")[0]
        raise LedgerError(
            f"the checkpoint and the model don't match: {target!r} is joined from as many tensors of each kind, and "
            "there aren't. Nothing was loaded.",
            [
                *(f"{len(group.keys.get(p, ()))} are called {p!r}" for p in group.converter.source_patterns),
                *(
                    f"stored tensor {key!r} has no parameter in the model"
                    for key, name in unmatched.items()
                    if name.startswith(f"{module}.")
                ),
            ],
        )


class _Converting:
    """Works out what converters make of their tensors."""

    def __init__(self, stored: Mapping[str, TensorSpec], slots: Mapping[str, TensorSpec], config: Any) -> None:
        self._stored = stored
        self._slots = slots
        self._shapes = _Shapes(slots, config)
        self._known: dict[Hashable, tuple[int, ...]] = {}

    def conversion(self, target: str, group: _Collected) -> Conversion:
        """One converter instance as a conversion."""
        dtype = self._slots[target].dtype
        stored_dtype = self._stored[group.sources[0]].dtype
        made = self._made(target, group, stored_dtype)
        targets = {name: TensorSpec(dtype=stored_dtype, shape=shape) for name, shape in made.items()}
        label = "+".join(_label(operation) for operation in group.converter.operations)
        assemblies = _assemblies(group, self._stored, targets)
        if assemblies is not None:
            return Conversion(sources=group.sources, targets=targets, assemblies=assemblies, label=label)
        function = _function(target, group, dtype, self._shapes)
        return Conversion(sources=group.sources, targets=targets, function=function, label=label)

    def _made(self, target: str, group: _Collected, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the results: transformers' own operations say, on the meta device.

        Operations that only join look at nothing but their tensors, so experts of the same shapes are joined once and
        not in each of a thousand layers.
        """
        key: Hashable = None
        if all(type(operation).__name__ in _JOINING for operation in group.converter.operations):
            shapes = [(pattern, *(self._stored[name].shape for name in names)) for pattern, names in group.keys.items()]
            key = (id(group.converter), *shapes)
            if key in self._known:
                return {target: self._known[key]}
        meta = {name: torch.empty(self._stored[name].shape, dtype=dtype, device="meta") for name in group.sources}
        made = {name: tuple(tensor.shape) for name, tensor in _converted(target, group, meta, self._shapes).items()}
        if key is not None and made.keys() == {target}:
            self._known[key] = made[target]
        return made

    def expect_alike(self, target: str, group: _Collected) -> None:
        """What is stacked has one shape.

        Raises:
            LedgerError: it hasn't; names two that differ.
        """
        if type(group.converter.operations[0]).__name__ != "MergeModulelist":
            return
        for names in group.keys.values():
            first = self._stored[names[0]].shape
            odd = next((name for name in names if self._stored[name].shape != first), None)
            if odd is not None:
                problems = [f"what is stored as {name!r} is {self._stored[name]}" for name in (names[0], odd)]
                raise LedgerError(
                    f"the checkpoint and the model don't match: {target!r} is stacked from tensors of one shape, and "
                    "these have different ones. Nothing was loaded.",
                    problems,
                )


def _function(
    target: str, group: _Collected, dtype: torch.dtype, shapes: _Shapes
) -> Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]:
    def convert(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        # transformers casts first and converts then; so do we, for the same bits.
        return _converted(target, group, {name: tensor.to(dtype) for name, tensor in tensors.items()}, shapes)

    return convert


def _converted(
    target: str, group: _Collected, tensors: Mapping[str, torch.Tensor], shapes: _Shapes
) -> dict[str, torch.Tensor]:
    """Run the converter's own operations on ``tensors``."""
    converter = copy.deepcopy(group.converter)
    for pattern, keys in group.keys.items():
        for key in keys:
            converter.add_tensor(target, key, pattern, tensors[key])
    made = converter.convert(target, model=shapes, config=shapes.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _label(operation: Any) -> str:
    return {"MergeModulelist": "stack"}.get(type(operation).__name__, type(operation).__name__.lower())


# Conversions that only move data, as pieces: each stored tensor goes straight to its place in the parameter, so that
# merging the experts of a layer needs no second copy of them.


def _assemblies(
    group: _Collected, stored: Mapping[str, TensorSpec], targets: Mapping[str, TensorSpec]
) -> dict[str, Assembly] | None:
    names = [type(operation).__name__ for operation in group.converter.operations]
    dims = [int(getattr(operation, "dim", 0)) for operation in group.converter.operations]
    if len(targets) == 1:
        (target, spec), *_ = targets.items()
        pieces = None
        if names == ["MergeModulelist"] and dims == [0]:
            pieces = [Piece(source=key, into=(index,)) for index, key in enumerate(group.sources)]
        elif names == ["MergeModulelist", "Concatenate"] and dims[0] == 0 and dims[1] != 0:
            pieces = _stacked_then_joined(group, stored, dims[1], len(spec.shape))
        elif names == ["Concatenate"]:
            pieces = _joined(group, stored, dims[0], len(spec.shape))
        return None if pieces is None else {target: Assembly(shape=spec.shape, pieces=tuple(pieces))}
    if names in (["Chunk"], ["Split"]) and len(group.sources) == 1:
        return _parts(group.sources[0], targets, dims[0])
    return None


def _ordered_patterns(group: _Collected) -> list[str]:
    return [pattern for pattern in group.converter.source_patterns if pattern in group.keys]


def _joined(group: _Collected, stored: Mapping[str, TensorSpec], dim: int, rank: int) -> list[Piece]:
    dim %= rank
    pieces, start = [], 0
    for pattern in _ordered_patterns(group):
        for key in group.keys[pattern]:
            end = start + stored[key].shape[dim]
            pieces.append(Piece(source=key, into=(*(slice(None),) * dim, slice(start, end))))
            start = end
    return pieces


def _stacked_then_joined(group: _Collected, stored: Mapping[str, TensorSpec], dim: int, rank: int) -> list[Piece]:
    dim %= rank
    pieces, start = [], 0
    for pattern in _ordered_patterns(group):
        keys = group.keys[pattern]
        end = start + stored[keys[0]].shape[dim - 1]
        place = (*(slice(None),) * (dim - 1), slice(start, end))
        pieces += [Piece(source=key, into=(index, *place)) for index, key in enumerate(keys)]
        start = end
    return pieces


def _parts(source: str, targets: Mapping[str, TensorSpec], dim: int) -> dict[str, Assembly]:
    result, start = {}, 0
    for target, spec in targets.items():
        axis = dim % len(spec.shape)
        end = start + spec.shape[axis]
        piece = Piece(source=source, part=(*(slice(None),) * axis, slice(start, end)))
        result[target] = Assembly(shape=spec.shape, pieces=(piece,))
        start = end
    return result
