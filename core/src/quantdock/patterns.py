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


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    # translate() ends its expression with the end of the text; here the containing module may end at any dot instead.
    body = fnmatch.translate(pattern).removesuffix(r"\Z").removesuffix(r"\z")
    return re.compile(body + r"(?:\.|\Z)")


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches ``name`` or a module that contains it."""
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
    idle = [pattern for pattern in patterns if not any(matches(pattern, name) for name in pool)]
    if idle:
        sample = ", ".join(pool[:5]) or "none"
        raise PatternError(
            f"{option}: {', '.join(map(repr, idle))} matches no {of}. There are {len(pool)}, for instance: {sample}. "
            "Patterns are shell-style on the dotted name and match a parameter or a module that contains it."
        )
