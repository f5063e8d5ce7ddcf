"""What commands print: tables and facts for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from quantdock.errors import QuantdockError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from quantdock.ledger import Ledger

_UNWRAPPED = 10_000


def console(*, stderr: bool = False) -> Console:
    """Where to print. What goes to a pipe or a file isn't wrapped."""
    from rich.console import Console

    found = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    return (
        found
        if found.is_terminal
        else Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=_UNWRAPPED)
    )


def visible(text: str) -> str:
    """``text`` with control characters spelled out: names in checkpoints and answers of models may hold anything."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(data, indent=2))


def print_error(error: QuantdockError, *, as_json: bool) -> None:
    """The message in red on stderr; as JSON on stdout if that is what was asked for."""
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        return
    console(stderr=True).print(f"error: {visible(str(error))}", style="red", soft_wrap=True)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> Table:
    """A table; columns in ``right`` are flush right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for index, name in enumerate(header):
        made.add_column(name, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(visible, row))
    return made


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, without a header."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(visible(name), visible(value))
    return made


def ledger_table(ledger: Ledger) -> Table:
    """What becomes of each group of parameters."""
    from quantdock.tables import GROUP_HEADER, GROUP_NUMBERS, group_cells, grouped

    return table(GROUP_HEADER, [group_cells(group) for group in grouped(ledger.entries)], right=GROUP_NUMBERS)


def ledger_facts(ledger: Ledger) -> list[tuple[str, str]]:
    """Coverage, why the rest isn't quantized, and what was left out or let through."""
    from quantdock.tables import format_bytes

    stored = max(1, ledger.stored_nbytes)
    rows = [
        (
            f"coverage, {method or 'full precision'}",
            f"{amount / stored:.1%} of the stored bytes ({format_bytes(amount)})",
        )
        for method, amount in ledger.coverage.items()
    ]
    if any(ledger.coverage):
        rows += [
            ("not quantized", f"{format_bytes(n)}: {why or 'no pattern'}") for why, n in ledger.unquantized.items()
        ]
    rows += [("ignored", f"{name}: {reason}") for name, reason in _merged(ledger.ignored.items())]
    rows += [("allowed", f"{name}: {reason}") for name, reason in _merged(ledger.allowed.items())]
    return rows


def _merged(items: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Names that differ only in numbers as one, with their count."""
    from quantdock.inspecting import starred

    counts: dict[tuple[str, str], int] = {}
    for name, reason in items:
        key = (starred(name), reason)
        counts[key] = counts.get(key, 0) + 1
    return [(name + (f" x{count}" if count > 1 else ""), reason) for (name, reason), count in counts.items()]
