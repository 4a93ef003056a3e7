"""Owns `kar train`."""

from dataclasses import asdict
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work, once, write_json
from kar_offline.models import BACKBONES, RERANKERS
from kar_offline.stage_runner import StageResult
from kar_offline.train.arms import ARMS, DEFAULT_ARMS
from kar_offline.train.distributed import ProcessGroup
from kar_offline.train.fit import Epoch
from kar_offline.train.report import TrainingReport
from kar_offline.train.run import Run
from kar_offline.train.settings import TrainSettings
from kar_offline.train.stage import DEFAULT_BACKBONES
from kar_offline.train.stage import train as train_models
from kar_offline.work_folder import WorkFolder

__all__ = ["train", "train_with_progress"]

DEFAULTS: Final = TrainSettings()


def train_with_progress(
    work: WorkFolder, backbones: list[str], arms: list[str], settings: TrainSettings, workers: int, console: Console
) -> StageResult[TrainingReport]:
    """Train as `kar_offline.train.train` does, with one progress line per run."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[state]}"),
        console=console,
    ) as progress:
        tasks: dict[Run, TaskID] = {}

        def on_epoch(run: Run, epoch: Epoch) -> None:
            if run not in tasks:
                tasks[run] = progress.add_task(run.name, total=settings.epochs, state="")
            state = f"epoch {epoch.number}, validation loss {epoch.validation_loss:.4f}"
            progress.update(tasks[run], completed=epoch.number, state=state)

        return train_models(work, backbones, arms, settings, workers=workers, on_epoch=on_epoch)


def train(
    work: Work = DEFAULT_WORK,
    backbone: Annotated[
        list[str] | None,
        typer.Option(help=f"Any of {', '.join((*BACKBONES, *RERANKERS))}; default: {', '.join(DEFAULT_BACKBONES)}."),
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(ARMS)}; default: {', '.join(DEFAULT_ARMS)}.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of initial weights, batches and dropout.")] = DEFAULTS.seed,
    epochs: Annotated[
        int, typer.Option(min=1, help="Maximal number of epochs; early stopping may end before.")
    ] = DEFAULTS.epochs,
    workers: Annotated[
        int, typer.Option(min=0, help="Worker processes, one thread each; 0 trains in this process.")
    ] = 2,
    json_file: JsonFile = None,
) -> None:
    """Train each backbone with each arm and keep the epoch with the lowest validation loss.

    With `torchrun --nproc-per-node N --no-python kar train ...`, N processes share each batch.
    """
    settings = TrainSettings(seed=seed, epochs=epochs)
    names = once(backbone) or list(DEFAULT_BACKBONES), once(arm) or list(DEFAULT_ARMS)
    with ProcessGroup.joined() as group:
        console = Console(quiet=not group.is_first)
        result = train_with_progress(work, *names, settings, workers if group.size == 1 else 0, console)
    if not group.is_first:
        return
    table = Table("model", "validation loss", "best epoch")
    for name, run in sorted(result.report.runs.items()):
        table.add_row(name, f"{run.validation_loss:.4f}", f"{run.best_epoch} of {run.epochs}")
    console.print(table)
    console.print(f"{result.folder}: {result.outcome}")
    write_json(json_file, asdict(result.report))
