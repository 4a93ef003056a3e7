"""Owns `kar bench freshness`."""

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from kar_bench.harness import finish, progress
from kar_bench.preparation import QUALITY_WORK, prepare
from kar_bench.studies.freshness.measure import measure_freshness
from kar_bench.studies.freshness.report import freshness_table, write_freshness_plot
from kar_bench.studies.freshness.study import READERS, FreshnessBenchmarkOptions, ReplayJob
from kar_offline.cli_options import JsonFile, Work, once, refuse_unknown
from kar_offline.encoders.packaged import ENCODERS
from kar_offline.models import BACKBONES
from kar_offline.train.settings import TrainSettings

__all__ = ["freshness"]

DEFAULTS: Final = FreshnessBenchmarkOptions()


def freshness(
    dataset: Annotated[str, typer.Option(help="ml-100k; or 'prepared': WORK already holds the stages.")] = "ml-100k",
    work: Work = QUALITY_WORK,
    arm: Annotated[
        list[str] | None,
        typer.Option(help=f"Arms to measure beside the control, of {', '.join(READERS)}; default: all."),
    ] = None,
    budget: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Calls a day, beside none and any number; default: 1, 3 and 10."),
    ] = None,
    model: Annotated[str, typer.Option("--backbone", "--model", help="Backbone to train.")] = DEFAULTS.model,
    share: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share of the events before the month's first day.")
    ] = DEFAULTS.share,
    days: Annotated[int, typer.Option(min=1, help="Days of the month.")] = DEFAULTS.days,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of training; default: 0 and 1.")] = None,
    usd_per_million: Annotated[
        tuple[float, float],
        typer.Option(min=0, help="Price of a million tokens, read and written; the default is an example."),
    ] = DEFAULTS.usd_per_million,
    epochs: Annotated[
        int, typer.Option(min=1, help="Epochs at most; early stopping ends sooner.")
    ] = TrainSettings().epochs,
    workers: Annotated[int, typer.Option(min=0, help="Processes of one thread each; 0: train in this process.")] = 2,
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw AUC and cost against the budget into this picture.")
    ] = None,
) -> None:
    """Replay a month in which a daily budget of calls refreshes the knowledge; report quality and cost.

    Released texts stand in for a language model. A killed run goes on where it was when it is started again.
    """
    refuse_unknown("model", [model], BACKBONES)
    arms = once(arm) or READERS
    refuse_unknown("arm", arms, READERS)
    console = Console()
    base = prepare(work, dataset, console=console)
    options = FreshnessBenchmarkOptions(
        arms=arms,
        budgets=once(budget) or DEFAULTS.budgets,
        model=model,
        seeds=once(seed) or DEFAULTS.seeds,
        share=share,
        days=days,
        usd_per_million=usd_per_million,
    )
    settings = TrainSettings(epochs=epochs)
    with progress(console, "encode texts about users") as show:

        def on_epoch(job: ReplayJob, epoch: int, finished: int, total: int) -> None:
            show(f"{job.arm}, seed {job.seed}, epoch {epoch}" if epoch else None, finished, total)

        report = measure_freshness(
            work, base, options, settings, ENCODERS["minilm"], workers=workers, on_epoch=on_epoch
        )
    finish(console, report, freshness_table(report), json_file)
    if plot is not None:
        write_freshness_plot(report, plot)
        console.print(f"{plot}: AUC and cost against the budget")
