"""Owns `kar evaluate`."""

from typing import Annotated

import typer
from rich.console import Console

from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work, once, refuse_unknown, write_json
from kar_offline.evaluate.stage import evaluate as evaluate_models
from kar_offline.evaluate.table import evaluation_table
from kar_offline.models import BACKBONES
from kar_offline.train.stage import DEFAULT_BACKBONES

__all__ = ["evaluate"]


def evaluate(
    work: Work = DEFAULT_WORK,
    backbone: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(BACKBONES)}; default: {', '.join(DEFAULT_BACKBONES)}.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    resamples: Annotated[int, typer.Option(min=1, help="Resamples of the bootstrap.")] = 1000,
    json_file: JsonFile = None,
) -> None:
    """Compare each backbone alone, with raw text and with LLM knowledge on the test users."""
    console = Console()
    backbones = once(backbone) or DEFAULT_BACKBONES
    refuse_unknown("backbone", backbones, BACKBONES)
    result = evaluate_models(work, backbones, seed=seed, resamples=resamples)
    console.print(evaluation_table(result.report))
    console.print(f"{result.folder}: {result.outcome}")
    write_json(json_file, result.report.to_json())
