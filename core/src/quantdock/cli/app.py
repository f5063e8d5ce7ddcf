"""The subcommands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from quantdock.cli import chat, inspect, load, plan, plugins
from quantdock.cli.command import command

app = typer.Typer(
    name="quantdock",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback is for --debug, and then Python's own
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from quantdock import __version__

        typer.echo(f"quantdock {__version__}")
        raise typer.Exit


@app.callback()
def quantdock(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Load pretrained checkpoints into PyTorch models and quantize them while they load.

    SOURCE is a folder, a weight file, or a repository on the Hub (ORG/NAME).
    """


app.command("plan")(command(plan.run))
app.command("load")(command(load.run))
app.command("chat")(command(chat.run))
app.command("inspect")(command(inspect.run))
app.command("plugins")(command(plugins.run))
