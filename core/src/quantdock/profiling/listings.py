"""The tables on the page of a recording."""

from __future__ import annotations

from typing import Any

from quantdock.profiling.charts import colour
from quantdock.profiling.markup import Markup, joined
from quantdock.profiling.sheets import Cell, facts, quiet, sheet
from quantdock.tables import format_bytes

GROUPS = 60
"""Groups of parameters that are listed, at most."""


def stages(data: dict[str, Any]) -> Markup:
    """Time per stage."""
    rows = [
        [Cell.text(stage["name"]), Cell.time(stage["start"]), Cell.time(stage["seconds"]), Cell.share(
            stage["seconds"] / data["seconds"]
        )]
        for stage in data["stages"]
    ]  # fmt: skip
    return sheet("Stages of the load", ("stage", "start", "time", "share"), rows, empty="No stage was entered.")


def kinds(data: dict[str, Any]) -> Markup:
    """Time and bytes per kind of step."""
    total = sum(kind["seconds"] for kind in data["kinds"])
    rows = [
        [
            Cell.keyed(kind["kind"], colour(kind["kind"])),
            Cell.number(kind["spans"]),
            Cell.time(kind["seconds"]),
            Cell.share(kind["seconds"] / total if total else 0.0),
            Cell.nbytes(kind["nbytes"]),
            Cell.rate(kind["nbytes"], kind["within"]),
        ]
        for kind in data["kinds"]
    ]
    header = ("step", "count", "time, all threads", "share", "bytes", "per thread")
    return sheet("Steps of the engine, by kind", header, rows, empty="No step was recorded.")


def threads(data: dict[str, Any]) -> Markup:
    """Time per thread."""
    kinds = [kind["kind"] for kind in data["kinds"]]
    rows = [
        [
            Cell.text(thread["name"]),
            Cell.time(sum(seconds for kind, seconds in thread["kinds"].items() if kind != "wait")),
            *(Cell.time(thread["kinds"].get(kind, 0.0)) for kind in kinds),
        ]
        for thread in data["threads"]
    ]
    return sheet("Time of each thread, by kind", ("thread", "busy", *kinds), rows, empty="No thread of the engine ran.")


def parameters(data: dict[str, Any]) -> Markup:
    """The slowest parameters."""
    kinds = [kind["kind"] for kind in data["kinds"] if kind["kind"] != "wait"]
    rows = [
        [
            Cell.text(parameter["name"]),
            Cell.time(parameter["seconds"]),
            *(Cell.time(parameter["kinds"].get(kind, 0.0)) for kind in kinds),
            Cell.nbytes(parameter["nbytes"]),
            Cell.rate(parameter["nbytes"], parameter["seconds"]),
        ]
        for parameter in data["parameters"]
    ]
    header = ("parameter", "time", *kinds, "bytes", "rate")
    return sheet("Parameters that took longest", header, rows, empty="No step was recorded.")


def groups(data: dict[str, Any]) -> Markup:
    """What became of each group of parameters."""
    groups = data["plan"]["groups"] if data["plan"] is not None else []
    rows = [
        [
            Cell.text(group["parameters"] + (f" x{group['count']}" if group["count"] > 1 else "")),
            Cell.text(group["action"]),
            Cell.text(group["method"] or "-"),
            Cell.text(group["by"]),
            Cell.nbytes(group["stored_nbytes"]),
            Cell.nbytes(group["nbytes"]),
            Cell.text(group["device"]),
        ]
        for group in groups[:GROUPS]
    ]
    header = ("parameters", "action", "method", "by", "stored", "loaded", "device")
    table = sheet("Groups of parameters", header, rows, empty="The load failed before there was a plan.")
    left = len(groups) - len(rows)
    return joined(table, quiet(f"{left} more groups are left out.")) if left > 0 else table


def plan(data: dict[str, Any]) -> Markup:
    """The source, and what the plan said."""
    plan = data["plan"]
    if plan is None:
        return quiet("The load failed before there was a plan.")
    rows = [(name, str(value)) for name, value in plan["source"].items()]
    rows += [(name.replace("_", " "), str(plan[name])) for name in ("format", "files", "dtype", "built_by", "workers")]
    rows += [("devices", ", ".join(plan["devices"])), ("parameters", f"{plan['parameters']:,}")]
    rows += [
        (text, f"{format_bytes(plan[name])} ({plan[name]:,} bytes)")
        for text, name in (("stored", "stored_nbytes"), ("predicted, loaded", "resident_nbytes"))
    ]
    rows += [(f"covered by {method or 'none'}", format_bytes(amount)) for method, amount in plan["coverage"].items()]
    return facts([*rows, ("policy", plan["policy"])])


def machine(data: dict[str, Any]) -> Markup:
    """The machine, and the versions at work."""
    machine = data["machine"]
    rows = [(name, str(machine[name])) for name in ("processor", "cores", "system", "python") if name in machine]
    if "memory_nbytes" in machine:
        rows.append(("memory", format_bytes(machine["memory_nbytes"])))
    rows += [("device", name) for name in machine.get("devices", ())]
    return facts([*rows, *data["versions"].items()])
