"""The one matcher for names: shell-style patterns on dotted names.

``*`` matches any run of characters (dots too), ``?`` one character, ``[abc]`` one of a set. A pattern matches a
parameter when it matches its whole name or the whole name of a module that contains it: ``lm_head`` matches
``lm_head.weight``, ``*.mlp`` and ``*.mlp.*`` both match ``model.layers.0.mlp.up_proj.weight``.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Sequence

from quantdock.errors import PatternError


class PatternIndex:
    """Patterns, asked all at once which of them match a name.

    A saved model can have a pattern for each of its parameters. Those that spell a name out are looked up, so that the
    time for all names grows with their number and not with its square.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._literals: dict[str, list[int]] = {}
        self._others: list[tuple[int, re.Pattern[str]]] = []
        for number, pattern in enumerate(patterns):
            if is_literal(pattern):
                self._literals.setdefault(pattern, []).append(number)
            else:
                self._others.append((number, _compiled(pattern)))

    def matching(self, name: str) -> list[int]:
        """Numbers of the patterns that match ``name``, in their order."""
        found = [number for number, pattern in self._others if pattern.match(name)]
        end = len(name) if self._literals else -1
        while end >= 0:
            found += self._literals.get(name[:end], ())
            end = name.rfind(".", 0, end)
        return sorted(found)

    def first(self, name: str) -> int | None:
        """Number of the first pattern that matches ``name``."""
        return next(iter(self.matching(name)), None)


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    # translate() ends its expression with the end of the text; here the containing module may end at any dot instead.
    body = fnmatch.translate(pattern).removesuffix(r"\Z").removesuffix(r"\z")
    return re.compile(body + r"(?:\.|\Z)")


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches ``name`` or a module that contains it."""
    if is_literal(pattern):
        return name.startswith(pattern) and name[len(pattern) : len(pattern) + 1] in ("", ".")
    return _compiled(pattern).match(name) is not None


def is_literal(pattern: str) -> bool:
    """Whether ``pattern`` spells one name out, without wildcards."""
    return not any(character in pattern for character in "*?[")


def matching(patterns: Iterable[str], name: str) -> str | None:
    """The first of ``patterns`` that matches ``name``."""
    return next((pattern for pattern in patterns if matches(pattern, name)), None)


def require_matches(option: str, patterns: Sequence[str], names: Iterable[str], *, of: str) -> None:
    """Raise unless each of ``patterns`` matches at least one of ``names``.

    Raises:
        PatternError: names the option, the patterns that match nothing, and a few names that there are.
    """
    pool = list(names)
    index, idle = PatternIndex(patterns), set(range(len(patterns)))
    for name in pool if patterns else ():
        idle.difference_update(index.matching(name))
        if not idle:
            return
    if idle:
        sample = ", ".join(pool[:5]) or "none"
        listed = ", ".join(repr(patterns[number]) for number in sorted(idle))
        raise PatternError(
            f"{option}: {listed} matches no {of}. There are {len(pool)}, for instance: {sample}. "
            "Patterns are shell-style on the dotted name and match a parameter or a module that contains it."
        )
