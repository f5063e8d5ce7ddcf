"""Tables of the page; each cell carries the value that a script sorts by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from quantdock.profiling.charts import format_time
from quantdock.profiling.markup import Markup, element
from quantdock.tables import format_bytes


def quiet(text: str) -> Markup:
    """A remark."""
    return element("p", text, class_="quiet")


class Cell(NamedTuple):
    """What a cell shows, and what it is sorted by; numbers stand flush right."""

    shown: str
    value: float | None = None

    @classmethod
    def text(cls, text: str) -> Cell:
        """Words."""
        return cls(text)

    @classmethod
    def keyed(cls, text: str, colour: str) -> Cell:
        """Words beside the colour that stands for them in the timeline."""
        return cls(element("span", element("i", class_=f"key bar {colour}"), text))

    @classmethod
    def number(cls, value: int) -> Cell:
        """A count."""
        return cls(f"{value:,}", value)

    @classmethod
    def time(cls, seconds: float) -> Cell:
        """A duration in seconds; none is a dash."""
        return cls(format_time(seconds) if seconds else "-", seconds)

    @classmethod
    def nbytes(cls, amount: int) -> Cell:
        """A size in bytes."""
        return cls(format_bytes(amount), amount)

    @classmethod
    def rate(cls, nbytes: int, seconds: float) -> Cell:
        """Bytes per second."""
        rate = nbytes / seconds if seconds else 0.0
        return cls(f"{format_bytes(int(rate))}/s" if rate else "-", round(rate))

    @classmethod
    def share(cls, part: float) -> Cell:
        """A part of the whole, as a number and a bar."""
        meter = element("span", class_="meter", style=f"width:{100 * min(1.0, part):.1f}%")
        return cls(element("span", f"{part:.1%}", meter, class_="share"), part)


def sheet(caption: str, header: Sequence[str], rows: Iterable[Sequence[Cell]], *, empty: str) -> Markup:
    """A table that a script makes sortable; without rows, why there are none."""
    rows = list(rows)
    if not rows:
        return quiet(empty)
    numeric = [cell.value is not None for cell in rows[0]]
    heads = [
        element("th", name, scope="col", class_="number" if right else None)
        for name, right in zip(header, numeric, strict=True)
    ]
    lines = [
        element("tr", *(element("td", cell.shown, class_=_class(cell), data_value=cell.value) for cell in row))
        for row in rows
    ]
    table = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *heads)),
        element("tbody", *lines),
        class_="sortable",
    )
    return element("div", table, class_="sheet", tabindex=0)


def _class(cell: Cell) -> str | None:
    return None if cell.value is None else "number"


def facts(rows: Iterable[tuple[str, str]]) -> Markup:
    """Names and values."""
    lines = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in rows]
    return element("div", element("table", element("tbody", *lines), class_="facts"), class_="sheet", tabindex=0)
