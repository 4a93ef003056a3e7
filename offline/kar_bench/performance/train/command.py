"""Owns `kar bench train`."""

from pathlib import Path
from typing import Annotated, Final

import torch
import typer
from rich.console import Console

from kar_bench.harness import finish, progress
from kar_bench.performance.train.measure import TrainBenchmarkOptions, measure_training, training_table
from kar_bench.preparation import DATASETS, QUALITY_WORK, prepare
from kar_offline.cli_options import JsonFile, Work, once, refuse_unknown
from kar_offline.models import BACKBONES
from kar_sidecar.errors import InputError

__all__ = ["train"]

DEFAULTS: Final = TrainBenchmarkOptions()


def train(
    dataset: Annotated[
        str,
        typer.Option(help=f"{' or '.join(DATASETS)}; or 'prepared': WORK already holds dataset and vectors."),
    ] = "ml-100k",
    folder: Annotated[Path | None, typer.Option("--from", help="ml-1m: the folder with its data and texts.")] = None,
    work: Work = QUALITY_WORK,
    model: Annotated[
        list[str] | None, typer.Option("--backbone", "--model", help="Backbones to train; default: dcnv2 and din.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Samples in a turn.")] = DEFAULTS.rows,
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of each implementation; one more warms up.")
    ] = DEFAULTS.rounds,
    fuxictr: Annotated[
        Path | None, typer.Option(help="Compare with FuxiCTR (dcnv2, din) in this environment, made if missing.")
    ] = None,
    fit: Annotated[bool, typer.Option(help="Also train to the end on every fold, for AUC.")] = DEFAULTS.fit,
    json_file: JsonFile = None,
) -> None:
    """Compare training speed: our trainer with and without knowledge, a loop over samples, FuxiCTR."""
    models = once(model) or DEFAULTS.models
    refuse_unknown("model", models, BACKBONES)
    if fuxictr is not None and (others := [name for name in models if name not in DEFAULTS.models]):
        known = " and ".join(DEFAULTS.models)
        raise InputError(f"FuxiCTR is compared on {known}: leave {others[0]} or --fuxictr out")
    console = Console()
    encodings = prepare(work, dataset, console=console, source=folder)
    options = TrainBenchmarkOptions(models, rows, rounds, fuxictr, fit)
    torch.set_num_threads(1)
    with progress(console, "train") as show:
        report = measure_training(work, work.folder(encodings), options, on_turn=show)
    finish(console, report, training_table(report), json_file)
