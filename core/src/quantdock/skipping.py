"""Skip lists in checkpoints (``modules_to_not_convert`` and the like): what their entries match, and how to write them.

The user's own ``skip=`` is another thing: shell-style patterns, see ``patterns``.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence

_PLAIN = re.compile(r"[\w.-]+")
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


class SkipList:
    """Entries, matched as transformers does: a regular expression for the start of a module's name, up to the end of
    one of its dotted parts; or the end of the name, letter by letter (``quantizers_utils.should_convert_module``)."""

    def __init__(self, entries: Iterable[str]) -> None:
        self.entries = list(entries)
        self._starts = [re.compile(rf"(?:{entry}){_BOUNDARY}") for entry in self.entries]

    def match(self, module: str) -> str | None:
        """The first entry that matches."""
        for entry, start in zip(self.entries, self._starts, strict=True):
            if start.match(module) is not None or module.endswith(entry):
                return entry
        return None

    def extended(self, left: Iterable[str], taken: Iterable[str]) -> list[str]:
        """The entries with more of them, so that they match every module of ``left``, and none of ``taken`` that they
        didn't match before.

        A name is written as it is, which other readers understand too, unless it would match one of ``taken``; it is
        anchored then.
        """
        names, result, plain = _Names(taken), list(self.entries), set[str]()
        for module in sorted(left):
            if self.match(module) is not None or any(module[start:] in plain for start in range(len(module))):
                continue
            if _PLAIN.fullmatch(module) and not names.has_like(module):
                result.append(module)
                plain.add(module)
            else:
                result.append(f"^{re.escape(module)}$")
        return result


class _Names:
    """Names of modules, asked for those that an entry would match, in a time that doesn't grow with their number."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._backwards = sorted(name[::-1] for name in self._names)
        self._starts: dict[tuple[int, ...], set[str]] = {}

    def has_like(self, entry: str) -> bool:
        """Whether one ends in ``entry``, or starts with it up to the end of a dotted part."""
        found = bisect_left(self._backwards, entry[::-1])
        if found < len(self._backwards) and self._backwards[found].startswith(entry[::-1]):
            return True
        # In a regular expression a dot is any character: names are compared with dots in the same places as the entry.
        dots = (*(place for place, letter in enumerate(entry) if letter == "."), len(entry))
        if dots not in self._starts:
            whole = (name for name in self._names if len(entry) == len(name) or name[len(entry) :].startswith("."))
            self._starts[dots] = {_dotted(name[: len(entry)], dots) for name in whole if len(name) >= len(entry)}
        return entry in self._starts[dots]


def _dotted(name: str, dots: Sequence[int]) -> str:
    letters = list(name)
    for place in dots[:-1]:
        letters[place] = "."
    return "".join(letters)
