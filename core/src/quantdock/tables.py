"""Plain-text tables, and the grouping of parameters that plans and reports show."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantdock.ledger import Entry

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that differ only in numbers within their names and share their fate."""

    parameters: str
    count: int
    action: str
    by: str
    method: str
    stored_nbytes: int
    nbytes: int
    device: str
    note: str


def grouped(entries: Iterable[Entry]) -> list[Group]:
    """Group entries; the order is that of each group's first parameter."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    notes: dict[str, str] = {}  # few of them differ
    for entry in entries:
        name = _NUMBER.sub("*", entry.parameter)
        if entry.note not in notes:
            notes[entry.note] = _NUMBER.sub("*", entry.note)
        key = (name, entry.action, entry.by, entry.method, entry.device, notes[entry.note])
        groups.setdefault(key, []).append(entry)
    return [
        Group(
            parameters=key[0],
            count=len(members),
            action=key[1],
            by=key[2],
            method=key[3],
            stored_nbytes=sum(member.stored_nbytes for member in members),
            nbytes=sum(member.nbytes for member in members),
            device=key[4],
            note=key[5],
        )
        for key, members in groups.items()
    ]


def format_bytes(amount: int) -> str:
    """``1.50 GiB``; exact below a KiB."""
    size = float(amount)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{amount} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Columns as wide as their contents; those in ``right`` flush right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def formatted(line: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([formatted(lines[0]), "  ".join("-" * width for width in widths), *map(formatted, lines[1:])])


GROUP_HEADER = ("parameters", "action", "method", "by", "stored", "loaded", "device", "note")
GROUP_NUMBERS = (4, 5)
"""Columns of ``group_cells`` that stand flush right."""


def group_cells(group: Group) -> tuple[str, ...]:
    """A group as a row under ``GROUP_HEADER``."""
    return (
        group.parameters + (f" x{group.count}" if group.count > 1 else ""),
        group.action,
        group.method or "-",
        group.by,
        format_bytes(group.stored_nbytes),
        format_bytes(group.nbytes),
        group.device,
        group.note,
    )


def groups_table(groups: Sequence[Group]) -> str:
    """The table of a plan: per group of parameters what happens to it, by whom, bytes before and after, device."""
    return format_table(GROUP_HEADER, map(group_cells, groups), right=GROUP_NUMBERS)
