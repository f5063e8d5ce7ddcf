"""``quantdock load``: load, and say what it took."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantdock import profiling
from quantdock.cli import output
from quantdock.cli.arguments import LoadArguments
from quantdock.cli.command import JsonOption, SourceArgument
from quantdock.errors import QuantdockError, UnsupportedError
from quantdock.garbage import collected_later

if TYPE_CHECKING:
    from quantdock.planning import Plan
    from quantdock.reporting import Report

_PROMPT = "The capital of France is"


def run(
    source: SourceArgument,
    arguments: LoadArguments,
    prompt: Annotated[str | None, typer.Option(help=f"What the sample continues; '{_PROMPT}' if not given.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the sample at most.")] = 32,
    no_sample: Annotated[bool, typer.Option("--no-sample", help="Generate no sample.")] = False,
    save: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Save the model there, as it was loaded.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page there that shows where time and memory went (HTML)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Load a model; show the time, the memory, the coverage and a sample of what it generates."""
    if no_sample and prompt is not None:
        raise typer.BadParameter("--no-sample leaves nothing for it to do", param_hint="--prompt")
    options = arguments.options()
    if profile is not None:
        _check_target(profile)
    with nullcontext() if profile is None else profiling.record(profile):
        with profiling.current().stage("import"), collected_later():
            from quantdock import calls, reporting, saving
        plan = calls.plan(source, **options)
        model = plan.execute()
        report = reporting.report(model)
    if not as_json:
        _print_report(report, plan)
        if profile is not None:
            output.console().print(output.facts([("profile", str(profile))]))
    saved = None if save is None else str(saving.save(model, save))
    if saved is not None and not as_json:
        output.console().print(output.facts([("saved to", saved)]))
    sample = None if no_sample else _sample(plan, prompt, max_new_tokens)
    if as_json:
        written = None if profile is None else str(profile)
        output.print_json(report.to_dict() | {"saved": saved, "profile": written, "sample": sample})
    elif sample is not None:
        _print_sample(sample)


def _check_target(profile: Path) -> None:
    """Before the load, and not after minutes of it."""
    if profile.is_dir() or not profile.parent.is_dir():
        wrong = "it is a folder" if profile.is_dir() else f"{profile.parent} is no folder"
        raise typer.BadParameter(f"{profile} can't be written: {wrong}", param_hint="--profile")


def _sample(plan: Plan, prompt: str | None, max_new_tokens: int) -> dict[str, Any]:
    """A continuation, or why there is none; a prompt that the user gave has to be continued."""
    text = _PROMPT if prompt is None else prompt
    started = time.perf_counter()
    try:
        chatter = plan.skeleton.architecture.chatter(plan.source)
        if chatter is None:
            raise UnsupportedError("there is no sample: the model generates no text, or the source has no tokenizer")
        continuation = chatter.complete(text, max_new_tokens=max_new_tokens)
    except QuantdockError as error:
        if prompt is not None:
            raise
        return {"error": str(error)}
    return {"prompt": text, "text": continuation, "seconds": round(time.perf_counter() - started, 3)}


def _print_report(report: Report, plan: Plan) -> None:
    from quantdock.reporting import cache_line
    from quantdock.tables import format_bytes

    total = sum(report.seconds.values())
    stages = ", ".join(f"{name} {value:.2f}" for name, value in report.seconds.items() if value >= 0.005)
    peak = format_bytes(report.process_peak_nbytes) if report.process_peak_nbytes else "not known here"
    rows = [
        ("loaded", f"{type(plan.skeleton.model).__name__} from {plan.source.name}"),
        ("time", f"{total:.2f} s ({stages})"),
        ("memory, predicted", f"{report.predicted_nbytes:,} bytes ({format_bytes(report.predicted_nbytes)})"),
        ("memory, measured", f"{report.measured_nbytes:,} bytes ({format_bytes(report.measured_nbytes)})"),
        ("workers", str(report.workers)),
        (
            "memory, in flight",
            f"{format_bytes(report.in_flight_peak_nbytes)} at most, budget {format_bytes(report.memory_budget)}",
        ),
        ("memory, process peak", peak),
        *output.ledger_facts(report.ledger),
        ("plugins", ", ".join(f"{name} {version}" for name, version in report.plugins.items()) or "none"),
        ("policy", report.policy),
        ("operations", report.operations),
        ("cache", cache_line(report.cache)),
        *(("refused", f"{name}: {reason}") for name, reason in report.refused.items()),
        *(("broken", reason) for reason in report.broken.values()),
    ]
    output.console().print(output.facts(rows))


def _print_sample(sample: dict[str, Any]) -> None:
    rows = [("sample", sample.get("error", ""))]
    if "text" in sample:
        rows = [("sample", f"{sample['prompt']}{sample['text']}"), ("", f"{sample['seconds']:.2f} s")]
    output.console().print(output.facts(rows))
