"""HTML and SVG, escaped unless it was made here."""

from __future__ import annotations

import html
import json
from typing import Any


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """``text`` for an element or a quoted attribute; what can't be shown or encoded becomes a replacement character."""
    shown = "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
    return Markup(html.escape(shown))


def element(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """An element. Children that aren't ``Markup`` are escaped, and so are all attributes.

    Underscores at the end of an attribute's name are dropped (``class_``), others become hyphens; ``None`` leaves it
    out.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{pairs}>{joined(*children)}</{name}>")


def joined(*children: str) -> Markup:
    """Several pieces in a row."""
    return Markup("".join(child if isinstance(child, Markup) else escaped(child) for child in children))


def json_block(data: Any, *, id_: str) -> Markup:
    """Data for scripts. No name inside can end the block: ``<``, ``>`` and ``&`` are spelled as JSON escapes."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(f'<script type="application/json" id="{id_}">{text}</script>')
