"""The subcommands, put together."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from quantdock.cli import cache, chat, inspect, load, plan, plugins
from quantdock.cli.command import command


class _QuickHelp:
    """Gives ``--help`` a default: Typer looks at an option without one through a library that takes 0.1 s to import."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.default = False
        return option


class _Command(_QuickHelp, TyperCommand):
    """A subcommand."""


class _Group(_QuickHelp, TyperGroup):
    """The command itself."""


app = typer.Typer(
    name="quantdock",
    cls=_Group,
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


app.command("plan", cls=_Command)(command(plan.run))
app.command("load", cls=_Command)(command(load.run))
app.command("chat", cls=_Command)(command(chat.run))
app.command("inspect", cls=_Command)(command(inspect.run))
app.command("plugins", cls=_Command)(command(plugins.run))

_cache = typer.Typer(cls=_Group, no_args_is_help=True, help="Look into the cache of quantized models, and clear it.")
_cache.command("list", cls=_Command)(command(cache.list_entries))
_cache.command("clear", cls=_Command)(command(cache.clear))
app.add_typer(_cache, name="cache")
