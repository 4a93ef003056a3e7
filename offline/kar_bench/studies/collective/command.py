"""Owns `kar bench collective`."""

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from kar_bench.harness import finish, progress
from kar_bench.preparation import QUALITY_WORK, prepare
from kar_bench.studies.collective.measure import CollectiveBenchmarkOptions, measure_collective
from kar_bench.studies.collective.report import collective_table, write_collective_plot
from kar_bench.studies.quality_runs import TrainingJob
from kar_offline.cli_options import JsonFile, Work, once, refuse_unknown
from kar_offline.models import BACKBONES
from kar_offline.train.settings import TrainSettings

__all__ = ["collective"]

DEFAULTS: Final = CollectiveBenchmarkOptions()


def collective(
    dataset: Annotated[str, typer.Option(help="ml-100k; or 'prepared': WORK already holds the stages.")] = "ml-100k",
    work: Work = QUALITY_WORK,
    model: Annotated[str, typer.Option("--backbone", "--model", help="Backbone to train.")] = DEFAULTS.model,
    share: Annotated[
        list[float] | None,
        typer.Option(min=0.001, max=0.999, help="Calls by entities; default: 0.3, 0.1 and 0.03."),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Folds that users are dealt into.")] = DEFAULTS.folds,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of training and of clusters; default: 0.")] = None,
    epochs: Annotated[
        int, typer.Option(min=1, help="Epochs at most; early stopping ends sooner.")
    ] = TrainSettings().epochs,
    workers: Annotated[int, typer.Option(min=0, help="Processes of one thread each; 0: train in this process.")] = 2,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw AUC against calls into this picture.")] = None,
) -> None:
    """Measure the loss of quality when fewer language-model calls are made and entities share texts.

    Released texts stand in for a language model. A killed run goes on where it was when it is started again.
    """
    refuse_unknown("model", [model], BACKBONES)
    console = Console()
    base = prepare(work, dataset, console=console)
    options = CollectiveBenchmarkOptions(
        model=model, shares=once(share) or DEFAULTS.shares, folds=folds, seeds=once(seed) or DEFAULTS.seeds
    )
    with progress(console, "train") as show:

        def on_epoch(job: TrainingJob, epoch: int, finished: int, total: int) -> None:
            show(f"{job.arm}, fold {job.fold}, epoch {epoch}" if epoch else None, finished, total)

        report = measure_collective(
            work, base, options, TrainSettings(epochs=epochs), workers=workers, on_epoch=on_epoch
        )
    finish(console, report, collective_table(report), json_file)
    if plot is not None:
        write_collective_plot(report, plot)
        console.print(f"{plot}: AUC against calls")
