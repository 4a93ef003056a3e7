"""Owns the `kar` command: it collects each package's subcommands and turns our errors into one line and an exit code.

Exit codes: 0 done, 2 wrong usage or input, 1 anything else, 130 interrupted.
"""

import os
import sys
from importlib.metadata import entry_points

import typer
from rich.console import Console

from kar_sidecar.errors import KarError

__all__ = ["build_app", "main"]

COMMANDS = "kar.commands"


def build_app() -> typer.Typer:
    """The command line with the subcommands of every installed package."""
    app = typer.Typer(
        name="kar",
        help="LLM knowledge for the rankers you already run.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for entry in sorted(entry_points(group=COMMANDS), key=lambda entry: entry.name):
        entry.load()(app)
    return app


def main() -> None:
    """Run `kar`."""
    # Spinning OpenMP threads on shared cores cost 20x; set before any library reads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    error_console = Console(stderr=True)
    try:
        build_app()()
    except KarError as error:
        error_console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        error_console.print(
            f"[bold red]error:[/] this command needs the package {error.name!r}: "
            "install kar-sidecar with the extra that brings it (README, Install)",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        error_console.print("interrupted: finished stages are kept; run the same command to go on")
        sys.exit(130)
