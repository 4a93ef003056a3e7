"""Owns `kar evaluate`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kar_offline.evaluate.stage import evaluate as evaluate_models
from kar_offline.evaluate.table import evaluation_table

__all__ = ["evaluate"]


def evaluate(
    work: Annotated[Path, typer.Option(help="Work folder.")] = Path("var/demo"),
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap.")] = 1000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
) -> None:
    """Compare backbone, backbone + raw text and backbone + knowledge on test users."""
    console = Console()
    result = evaluate_models(work, seed=seed, resamples=resamples)
    console.print(evaluation_table(result.report))
    console.print(f"{result.folder}: {f'written in {result.seconds:.1f} s' if result.ran else 'up to date'}")
    if json_file:
        json_file.write_text(json.dumps(result.report, indent=2) + "\n")
