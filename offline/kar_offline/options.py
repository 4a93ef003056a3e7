"""Owns what every subcommand has: the work folder, the JSON report."""

import json
from pathlib import Path
from typing import Annotated, Final

import typer

__all__ = ["DEFAULT_WORK", "JsonFile", "Work", "write_json"]

DEFAULT_WORK: Final = Path("var/demo")
Work = Annotated[Path, typer.Option(help="Work folder.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")]


def write_json(file: Path | None, report: object) -> None:
    """Write a report to `file`, if one was named."""
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n")
