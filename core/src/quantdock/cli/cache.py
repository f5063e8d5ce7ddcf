"""``quantdock cache``: what the result cache holds, and how to be rid of it."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantdock.cli import output
from quantdock.cli.command import JsonOption
from quantdock.errors import ConfigError

if TYPE_CHECKING:
    from quantdock.caching.store import Entry

_SHOWN = 12
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def list_entries(as_json: JsonOption = False) -> None:
    """List what was kept: sizes, when it was last used, and what it was made from.

    QUANTDOCK_CACHE_DIR names the folder, QUANTDOCK_CACHE_SIZE what it may hold.
    """
    from quantdock.caching.store import Store, default_folder

    store = Store(default_folder())
    entries = store.entries()
    if as_json:
        output.print_json({"folder": str(store.folder), "entries": [_described(entry) for entry in entries]})
        return
    rows = [
        (
            entry.key[:_SHOWN],
            f"{entry.nbytes:,}",
            f"{_ago(entry.used)} ago",
            str(entry.manifest.get("source", {}).get("name", "?")),
            _quantize(entry.manifest.get("quantize")),
        )
        for entry in entries
    ]
    console = output.console()
    console.print(output.table(("entry", "bytes", "last used", "source", "quantize"), rows, right=(1,)))
    total = sum(entry.nbytes for entry in entries)
    console.print(output.facts([("folder", str(store.folder)), ("bytes in all", f"{total:,}")]))


def clear(
    entries: Annotated[
        list[str] | None, typer.Argument(metavar="[ENTRY]...", help="Entries as listed; all of them if none is named.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Only what was not used for that long, such as 30d, 12h or 90m.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what was kept. Models that were loaded from it are not affected."""
    from quantdock.caching.store import Store, default_folder

    age = None if older_than is None else _seconds(older_than)
    store = Store(default_folder())
    if not entries and age is None:
        nbytes = sum(entry.nbytes for entry in store.entries())
        count = store.clear()
    else:
        chosen = [one for one in _named(store.entries(), entries) if age is None or time.time() - one.used > age]
        removed = [one for one in chosen if store.discard(one.folder, "asked for")]
        nbytes, count = sum(one.nbytes for one in removed), len(removed)
        store.sweep()
    if as_json:
        output.print_json({"folder": str(store.folder), "removed": count, "bytes": nbytes})
    else:
        output.console().print(output.facts([("removed", f"{count} entries, {nbytes:,} bytes")]))


def _named(found: list[Entry], names: list[str] | None) -> list[Entry]:
    """The entries whose keys start with ``names``.

    Raises:
        ConfigError: a name stands for none of them, or for several.
    """
    if not names:
        return found
    chosen = []
    for name in names:
        matching = [entry for entry in found if entry.key.startswith(name)]
        if len(matching) != 1:
            raise ConfigError(f"{name!r} stands for {len(matching)} entries; see `quantdock cache list`")
        chosen += matching
    return chosen


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r}: expected a number and s, m, h, d or w", param_hint="--older-than")
    return float(match[1]) * _SECONDS[match[2]]


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    unit = next((unit for unit in ("d", "h", "m") if seconds >= _SECONDS[unit]), "s")
    return f"{seconds / _SECONDS[unit]:.0f}{unit}"


def _quantize(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{pattern}={label or 'none'}" for pattern, label in value.items())
    return str(value)


def _described(entry: Entry) -> dict[str, Any]:
    facts = {name: value for name, value in entry.manifest.items() if name not in ("format", "files", "made")}
    return {"entry": entry.key, "bytes": entry.nbytes, "made": entry.made, "used": entry.used} | facts
