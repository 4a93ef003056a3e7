"""Owns the `kar` command: it finds subcommands by name, and turns our errors into one line and an exit code.

Exit codes: 0 done, 2 wrong usage or input, 1 anything else, 130 interrupted.
"""

import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Final

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup
from typer.main import get_command

from kar_sidecar.errors import KarError, UnsupportedError

__all__ = ["COMMANDS", "EXTRA_OF_MODULE", "app", "main"]

INTERRUPTED: Final = 130
COMMANDS: Final = "kar.commands"
"""Group of entry points; each is a subcommand: name = "module:typer function"."""
ORDER: Final = (
    *("demo", "dataset", "prompts", "generate", "knowledge", "encode", "train", "evaluate", "export", "publish"),
    *("serve", "sidecar", "replay"),
)
"""Order of the subcommands in the help; others follow."""
EXTRA_OF_MODULE: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("aerospike", "aerospike_helpers", "grpc_health", "grpc_reflection", "lmdb"), "sidecar"),
        **dict.fromkeys(("prometheus_client", "tritonclient", "uvloop"), "sidecar"),
        **dict.fromkeys(("httpx", "jinja2", "matplotlib", "onnx", "onnxruntime", "onnxscript"), "offline"),
        **dict.fromkeys(("py3langid", "pyarrow", "safetensors", "scipy", "tensorboard", "tokenizers"), "offline"),
        **dict.fromkeys(("torch", "transformers"), "offline"),
        "faiss": "cpu",
        "ray": "ray",
        "triton": "gpu",
        "xllamacpp": "local-llm",
    }
)
"""The extra of kar-sidecar that installs a package, by the name that the package is imported by."""


class _Commands(TyperGroup):
    """The subcommands of all installed packages. Each is imported only when used: `kar serve` never imports torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = sorted(entry.name for entry in entry_points(group=COMMANDS))
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = next(iter(entry_points(group=COMMANDS, name=cmd_name)), None)
        if entry is None:
            return None
        command = _load(entry)
        if isinstance(command, typer.Typer):
            group = get_command(command)
            group.name = cmd_name
            return group
        single_command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single_command.command(cmd_name)(command)
        return get_command(single_command)


def _load(entry: EntryPoint) -> Callable[..., Any]:
    """The subcommand's function or group; where a package is missing, a function that raises UnsupportedError."""
    try:
        return entry.load()
    except ModuleNotFoundError as error:
        missing = UnsupportedError(_missing_package(error))

        def unavailable() -> None:
            raise missing

        unavailable.__doc__ = f"(not available here: needs the package {error.name})"
        return unavailable


def _missing_package(error: ModuleNotFoundError) -> str:
    extra = EXTRA_OF_MODULE.get((error.name or "").partition(".")[0])
    if extra is None:
        return f"this command needs the package {error.name!r}, which no extra of kar-sidecar installs: install it"
    return f"this command needs the package {error.name!r}: install kar-sidecar[{extra}] (README, Install)"


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


def _print_error(console: Console, text: str) -> None:
    console.print(Text.assemble(("error:", "bold red"), " ", text), soft_wrap=True)


def main() -> None:
    """Run `kar`."""
    # OpenMP threads that spin while they wait made shared cores 20 times slower. Libraries read this on import.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    console = Console(stderr=True)
    try:
        app()
    except KarError as error:
        _print_error(console, str(error))
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        _print_error(console, _missing_package(error))
        sys.exit(1)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _print_error(console, f"{reason}: name another path, or make this one usable")
        sys.exit(1)
    except ValueError as error:
        # The kernels cannot import our errors. A kernel error that is meant for the user has an `exit_code`.
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        _print_error(console, str(error))
        sys.exit(code)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            console.print("interrupted: finished stages are kept; run the same command to go on", soft_wrap=True)
        raise
