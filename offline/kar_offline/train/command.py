"""Owns `kar train`."""

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from kar_offline.models import BACKBONES
from kar_offline.options import DEFAULT_WORK, JsonFile, Work, write_json
from kar_offline.stage import StageResult
from kar_offline.train.checkpoint import ARMS
from kar_offline.train.fit import Epoch, TrainSettings
from kar_offline.train.runs import Run
from kar_offline.train.runs import train as train_models

__all__ = ["train", "train_with_progress"]

DEFAULTS: Final = TrainSettings()


def train_with_progress(
    work: Path, backbones: list[str], arms: list[str], settings: TrainSettings, workers: int, console: Console
) -> StageResult:
    """`kar_offline.train.train` with one progress line a run."""
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
            state = f"epoch {epoch.number}, validation LogLoss {epoch.validation_logloss:.4f}"
            progress.update(tasks[run], completed=epoch.number, state=state)

        return train_models(work, backbones, arms, settings, workers=workers, on_epoch=on_epoch)


def train(
    work: Work = DEFAULT_WORK,
    backbone: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(BACKBONES)}; default: all.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ARMS)}; default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights, batches and dropout.")] = DEFAULTS.seed,
    epochs: Annotated[int, typer.Option(min=1, help="At most; early stopping ends sooner.")] = DEFAULTS.epochs,
    workers: Annotated[int, typer.Option(min=0, help="Processes, one thread each; 0: train in this one.")] = 2,
    json_file: JsonFile = None,
) -> None:
    """Train each backbone alone, with raw text and with knowledge; the best epoch on validation users is kept."""
    console = Console()
    settings = TrainSettings(seed=seed, epochs=epochs)
    result = train_with_progress(work, backbone or list(BACKBONES), arm or list(ARMS), settings, workers, console)
    table = Table("model", "validation LogLoss", "best epoch")
    for name, run in sorted(result.report["runs"].items()):
        table.add_row(name, f"{run['validation_logloss']:.4f}", f"{run['best_epoch']} of {run['epochs']}")
    console.print(table)
    console.print(f"{result.folder}: {result.outcome}")
    write_json(json_file, result.report)
