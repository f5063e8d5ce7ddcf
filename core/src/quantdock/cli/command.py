"""What every subcommand has in common: groups of options, ``--debug``, and how errors are shown."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_type_hints

import typer

from quantdock.cli import output
from quantdock.errors import QuantdockError

SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A folder, a weight file, or a repository on the Hub (ORG/NAME).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a Typer command of ``function``.

    A parameter that is annotated with a dataclass stands for the dataclass' fields, each an option; that is how
    commands share options. ``QuantdockError`` ends the command with exit code 1: a message on stderr, or as JSON on
    stdout if the command was asked for JSON.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}

    @functools.wraps(function)
    def run(*, debug: bool, **values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        try:
            function(**values)
        except QuantdockError as error:
            if debug:
                traceback.print_exc()
            output.print_error(error, as_json=values.get("as_json", False))
            raise typer.Exit(1) from error

    parameters = [*_flattened(function, hints, groups), _option("debug", DebugOption, False)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _flattened(
    function: Callable[..., None], hints: Mapping[str, Any], groups: Mapping[str, Any]
) -> list[inspect.Parameter]:
    """The parameters of ``function``, with those that stand for a group replaced by the group's fields."""
    result = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            result.append(_option(name, hints[name], parameter.default))
            continue
        types = get_type_hints(groups[name], include_extras=True)
        result += [_option(field.name, types[field.name], field.default) for field in dataclasses.fields(groups[name])]
    return result


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
