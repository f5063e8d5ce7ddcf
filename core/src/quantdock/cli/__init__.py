"""The command ``quantdock``: one module per subcommand, put together in ``app``.

Modules of this package import neither torch nor a plugin at their top, so that help and listings come at once.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line; the entry point ``quantdock``."""
    from quantdock.cli.app import app

    app(prog_name="quantdock")
