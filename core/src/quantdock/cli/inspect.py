"""``quantdock inspect``: what is in a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quantdock.cli import output
from quantdock.cli.arguments import SourceArguments
from quantdock.cli.command import JsonOption, SourceArgument

if TYPE_CHECKING:
    from rich.table import Table

    from quantdock.inspecting import Inspection

_COLUMNS = ("tensors", "dtype", "shape", "bytes", "file")


def run(
    source: SourceArgument,
    arguments: SourceArguments,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor; else those that differ only in numbers are one line.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the config, the files and the tensors of a source, from headers only; no model is built."""
    from quantdock.inspecting import inspect

    found = inspect(source, **arguments.options())
    if as_json:
        output.print_json(found.to_dict(every_tensor=tensors))
        return
    console = output.console()
    console.print(output.facts(_facts(found)))
    console.print(_every_tensor(found) if tensors else _groups(found))
    console.print(_totals(found))


def _facts(found: Inspection) -> list[tuple[str, str]]:
    from quantdock.tables import format_bytes

    quantization = found.quantization or {}
    return [
        ("source", ", ".join(f"{key} {value}" for key, value in found.source.items())),
        ("model type", found.model_type or "not stated"),
        ("dtype", found.dtype or "not stated"),
        ("quantization", ", ".join(f"{key}={value!r}" for key, value in quantization.items()) or "none"),
        ("format", found.format),
        *(("metadata", f"{key}: {value}") for key, value in found.metadata.items()),
        *(("file", f"{path} ({format_bytes(size)})") for path, size in found.files.items()),
    ]


def _groups(found: Inspection) -> Table:
    from quantdock.tables import format_bytes

    rows = [
        (
            group.name + (f" x{group.count}" if group.count > 1 else ""),
            group.dtype,
            str(list(group.shape)),
            format_bytes(group.nbytes),
            group.files[0] + (f" and {len(group.files) - 1} more" if len(group.files) > 1 else ""),
        )
        for group in found.groups
    ]
    return output.table(_COLUMNS, rows, right=(3,))


def _every_tensor(found: Inspection) -> Table:
    from quantdock.inspecting import dtype_label

    rows = [
        (tensor.name, dtype_label(tensor), str(list(tensor.spec.shape)), f"{tensor.stored_nbytes:,}", tensor.file.name)
        for tensor in found.tensors
    ]
    return output.table(_COLUMNS, rows, right=(3,))


def _totals(found: Inspection) -> Table:
    from quantdock.tables import format_bytes

    rows = [
        (total.dtype, f"{total.count:,}", f"{total.values:,}", f"{total.nbytes:,}", format_bytes(total.nbytes))
        for total in found.totals
    ]
    rows.append(("all", f"{len(found.tensors):,}", "", f"{found.nbytes:,}", format_bytes(found.nbytes)))
    return output.table(("dtype", "tensors", "values", "bytes", ""), rows, right=(1, 2, 3, 4))
