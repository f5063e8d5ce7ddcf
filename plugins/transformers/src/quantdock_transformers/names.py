"""Which parameter a stored name means: transformers' answer, asked for only where there is one to give.

A checkpoint can have a hundred thousand names, and transformers takes ten microseconds for each. Most of that goes into
renamings that don't apply, which one look at the name can tell.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from quantdock_transformers.experts import FUSED, MODULAR

_OF_WORDS = re.compile(r"\^?([\w.]|\\\.|\*\.)+")
"""Patterns of words, ``.`` (any character), ``\\.`` and ``*.`` (transformers' ``.*\\.``): each word is needed."""


def in_order(names: Iterable[str]) -> list[str]:
    """``names`` in transformers' order, in which experts are merged: numbers count as such."""
    from transformers.core_model_loading import dot_natural_key

    # The order compares dotted part by dotted part, and few of the parts differ.
    part_key = functools.cache(lambda part: dot_natural_key(part)[0])
    return sorted(names, key=lambda name: [part_key(part) for part in name.split(".")])


class Names:
    """``core_model_loading.rename_source_key`` for one model.

    Args:
        transforms: transformers' ``WeightTransform`` objects; those that match are marked as used.
        slots: the parameters, by name.
        base_model_prefix: the name of the base model inside a model with a head.
        modular: converters of experts' modular names, for what transformers has no parameter for.
    """

    def __init__(
        self,
        transforms: Sequence[Any],
        slots: Mapping[str, object],
        base_model_prefix: str,
        modular: Sequence[Any] = (),
    ) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._rule = rename_source_key
        self._slots = slots
        self._prefix = base_model_prefix
        self._modular = modular
        self._renamings = [(_applies(entry), entry) for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [(_applies(entry), entry) for entry in transforms if isinstance(entry, WeightConverter)]
        self._any_renaming = _applies(*(entry for _, entry in self._renamings))

    def target(self, key: str) -> tuple[str, str | None]:
        """The parameter that ``key`` means, which may not exist, and the pattern of the converter that makes it; no
        pattern when the stored tensor is the parameter as it is."""
        target, pattern = self._renamed(key)
        target = self._prefixed(target)
        if target in self._slots:
            return target, pattern
        if key in self._slots:
            return self._prefixed(key), None
        return self._of_expert(target) or self._of_expert(key) or (target, pattern)

    def _of_expert(self, key: str) -> tuple[str, str] | None:
        """The fused parameter that one expert's weight is a part of, where there is one."""
        match = MODULAR.fullmatch(key) if self._modular else None
        if match is None or self._prefixed(f"{match['experts']}.{FUSED[match['kind']]}") not in self._slots:
            return None
        for converter in self._modular:
            target, pattern = converter.rename_source_key(key)
            if pattern is not None:
                return self._prefixed(target), pattern
        return None

    def _renamed(self, key: str) -> tuple[str, str | None]:
        if self._any_renaming(key):
            for applies, renaming in self._renamings:
                if applies(key):
                    key, _ = renaming.rename_source_key(key)
        for applies, converter in self._converters:
            if applies(key):
                key, pattern = converter.rename_source_key(key)
                if pattern is not None:
                    return key, pattern
        return key, None

    def _prefixed(self, key: str) -> str:
        """The base model's prefix added or dropped, where one of both leads to a parameter."""
        shorter = key[len(self._prefix) + 1 :] if key.startswith(self._prefix) else ""
        if shorter in self._slots or f"{self._prefix}.{key}" in self._slots:
            return str(self._rule(key, [], [], self._prefix, self._slots)[0])
        return key


def _applies(*transforms: Any) -> Callable[[str], object]:
    """Whether one of ``transforms`` may apply to a name: never false when one does.

    It can't where a word is absent that its pattern spells out. Patterns that spell out none always may.
    """
    words = set()
    for pattern in (pattern for transform in transforms for pattern in transform.source_patterns):
        spelled_out = re.findall(r"\w+", pattern)
        if not spelled_out or not _OF_WORDS.fullmatch(pattern):
            return _always
        words.add(max(reversed(spelled_out), key=len))  # the last of the longest: names differ at their ends
    return re.compile("|".join(sorted(words))).search if words else _never


def _always(key: str) -> bool:
    return True


def _never(key: str) -> bool:
    return False
