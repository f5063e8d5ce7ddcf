"""``quantdock plan``: what a load would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantdock.cli import output
from quantdock.cli.arguments import LoadArguments
from quantdock.cli.command import JsonOption, SourceArgument

if TYPE_CHECKING:
    from quantdock.planning import Plan


def run(source: SourceArgument, arguments: LoadArguments, as_json: JsonOption = False) -> None:
    """Show what a load would do, parameter by parameter and to the byte; no weight is read."""
    options = arguments.options()
    from quantdock.calls import plan

    made = plan(source, **options)
    if as_json:
        output.print_json(made.to_dict())
        return
    console = output.console()
    console.print(f"plan for {output.visible(made.source.name)}", style="bold", soft_wrap=True)
    console.print(output.ledger_table(made.ledger))
    console.print(output.facts([*_facts(made), *output.ledger_facts(made.ledger)]))


def _facts(plan: Plan) -> list[tuple[str, str]]:
    from quantdock.reporting import cache_line
    from quantdock.tables import format_bytes

    budget, largest = plan.options.budget, plan.largest_unit_nbytes
    rows = [
        ("checkpoint", f"{plan.checkpoint.format}, {len(plan.checkpoint.files)} file(s)"),
        ("built by", plan.skeleton.built_by),
        ("dtype", str(plan.options.dtype).removeprefix("torch.")),
        ("stored", f"{format_bytes(plan.ledger.stored_nbytes)} ({plan.ledger.stored_nbytes:,} bytes)"),
        ("resident when loaded", f"{format_bytes(plan.resident_nbytes)} ({plan.resident_nbytes:,} bytes, predicted)"),
        ("peak while loading", f"{format_bytes(plan.peak_nbytes)} at most; budget {format_bytes(budget)}"),
    ]
    if largest > budget:
        rows.append(("beyond the budget", f"one unit needs {format_bytes(largest)}; it will run alone"))
    if len(plan.placement.device_map) > 1:
        devices = sorted({str(device) for device in plan.placement.device_map.values()})
        rows.append(("devices", ", ".join(devices)))
    if plan.cached.state != "off":
        rows.append(("cache", cache_line(plan.cached.facts)))
    refused = [f"{one.dist} {one.version}: {one.reason}" for one in plan.catalog.decisions if not one.allowed]
    rows += [("refused", reason) for reason in refused]
    rows += [("broken", reason) for reason in plan.catalog.broken.values()]
    return rows
