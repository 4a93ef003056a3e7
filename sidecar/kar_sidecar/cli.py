"""Owns the `kar` command: it finds subcommands by name and turns our errors into one line and an exit code.

Exit codes: 0 done, 2 wrong usage or input, 1 anything else, 130 interrupted.
"""

import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup
from typer.main import get_command

from kar_sidecar.errors import KarError, UnsupportedError

__all__ = ["COMMANDS", "app", "main"]

INTERRUPTED: Final = 130
COMMANDS: Final = "kar.commands"
"""Entry points of this group are subcommands: name = "module:typer function"."""
ORDER: Final = (
    *("demo", "dataset", "prompts", "generate", "knowledge", "encode", "train", "evaluate", "export", "publish"),
    *("serve", "sidecar", "replay"),
)
"""How help lists them; others follow."""


class _Commands(TyperGroup):
    """Subcommands of every installed package, each imported when it is used: `kar serve` never waits for torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = sorted(entry.name for entry in entry_points(group=COMMANDS))
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = next(iter(entry_points(group=COMMANDS, name=cmd_name)), None)
        if found is None:
            return None
        loaded = _load(found)
        if isinstance(loaded, typer.Typer):
            group = get_command(loaded)
            group.name = cmd_name
            return group
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(cmd_name)(loaded)
        return get_command(single)


def _load(entry: EntryPoint) -> Callable[..., Any]:
    """The subcommand's function or group; where its packages are missing, a function that says so."""
    try:
        return entry.load()
    except ModuleNotFoundError as error:
        missing = UnsupportedError(_needs(error))

        def unavailable() -> None:
            raise missing

        unavailable.__doc__ = f"(not available here: needs the package {error.name})"
        return unavailable


def _needs(error: ModuleNotFoundError) -> str:
    return (
        f"this command needs the package {error.name!r}: install kar-sidecar with the extra that brings it "
        "(README, Install)"
    )


app = typer.Typer(
    name="kar",
    cls=_Commands,
    help="LLM knowledge for the rankers you already run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback()(lambda: None)


def _complain(console: Console, text: str) -> None:
    console.print(Text.assemble(("error:", "bold red"), " ", text), soft_wrap=True)


def main() -> None:
    """Run `kar`."""
    # Spinning OpenMP threads on shared cores cost 20x; set before any library reads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    console = Console(stderr=True)
    try:
        app()
    except KarError as error:
        _complain(console, str(error))
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        _complain(console, _needs(error))
        sys.exit(1)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _complain(console, f"{what}: name another path or make it usable")
        sys.exit(1)
    except ValueError as error:
        # Kernels know nothing of our errors; theirs that are for the reader say how a command should end.
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        _complain(console, str(error))
        sys.exit(code)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            console.print("interrupted: finished stages are kept; run the same command to go on", soft_wrap=True)
        raise
