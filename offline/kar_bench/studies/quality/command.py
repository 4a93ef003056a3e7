"""Owns `kar bench quality`."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from rich.console import Console

from kar_bench.harness import command_line, progress, write_report
from kar_bench.preparation import DATASETS, PREPARED, QUALITY_WORK, prepare
from kar_bench.splits import SplitProtocol
from kar_bench.studies.quality.measure import measure_quality, train_jobs
from kar_bench.studies.quality.report import quality_table, write_quality_report
from kar_bench.studies.quality_runs import TrainingJob, default_jobs, possible_arms
from kar_offline.cli_options import JsonFile, Work, once, refuse_unknown
from kar_offline.dataset.splits import FOLDS
from kar_offline.models import BACKBONES, RERANKERS
from kar_offline.train.arms import ARMS
from kar_offline.train.settings import TrainSettings
from kar_sidecar.errors import InputError

__all__ = ["quality"]


class SplitBy(StrEnum):
    """What divides events into training and test."""

    USER = "user"
    TIME = "time"


@dataclass(frozen=True, slots=True)
class QualityBenchmarkOptions:
    """Which models and arms are trained, on which splits.

    Raises:
        InputError: a name is unknown, or two options exclude each other.
    """

    models: Sequence[str] = ()
    """Empty: all models, or all rerankers behind an initial ranker."""
    arms: Sequence[str] = ()
    """Empty: the default arms of each model."""
    folds: int = FOLDS
    """Folds that users are dealt into."""
    tested_folds: Sequence[int] = ()
    """Empty: all folds."""
    seeds: Sequence[int] = (0,)
    ranker: str = ""
    """Rerankers: the model, trained without knowledge, in whose order lists are; empty: their own order."""
    split_by: Literal["user", "time"] = "user"
    share: float = 1.0
    """Of the training users that are used, in a split by user."""
    epochs: int = TrainSettings().epochs
    workers: int = 2
    """Processes of one thread each; 0: train in this process."""

    def __post_init__(self) -> None:
        """Check names and combinations."""
        refuse_unknown("model", self.models, (*BACKBONES, *RERANKERS))
        refuse_unknown("arm", self.arms, ARMS)
        if outside := [fold for fold in self.tested_folds if not 0 <= fold < self.folds]:
            raise InputError(f"fold {outside[0]} is not one of {self.folds}: choose from 0 to {self.folds - 1}")
        refuse_unknown("ranker", [self.ranker] if self.ranker else [], BACKBONES)
        if self.ranker and (others := [name for name in self.models if name not in RERANKERS]):
            raise InputError(f"{others[0]} takes no order of another model: leave it or --ranker out")
        if self.split_by == "time":
            if self.share < 1:
                raise InputError("--share chooses users, but a split by time uses all: leave one of the two out")
            if self.tested_folds:
                raise InputError("--fold chooses users, but a split by time has no folds: leave one of the two out")

    @property
    def protocol(self) -> SplitProtocol:
        """How the dataset is split."""
        return SplitProtocol(self.split_by, self.folds, self.share)

    def jobs(self, encodings: Path) -> list[TrainingJob]:
        """All trainings; `encodings` is the folder with the texts' vectors."""
        folds = [0] if self.split_by == "time" else self.tested_folds or range(self.folds)
        return default_jobs(self.models, self.arms, folds, self.seeds, self.ranker, possible_arms(encodings))


DEFAULTS: Final = QualityBenchmarkOptions()


def quality(
    dataset: Annotated[
        str, typer.Option(help=f"{' or '.join(DATASETS)}; or 'prepared': WORK already holds dataset and vectors.")
    ] = "ml-100k",
    folder: Annotated[Path | None, typer.Option("--from", help="ml-1m: the folder with its data and texts.")] = None,
    encoder: Annotated[str, typer.Option(help="minilm or mpnet.")] = "minilm",
    words: Annotated[
        int | None, typer.Option(min=1, help="Encode only this many words of each text; default: all.")
    ] = None,
    work: Work = QUALITY_WORK,
    model: Annotated[
        list[str] | None, typer.Option("--backbone", "--model", help="Backbones to train; default: all.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Arms to train, of {', '.join(ARMS)}; default: three, but for dcnv2 and din all except the last two."
        ),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Folds that users are dealt into.")] = DEFAULTS.folds,
    fold: Annotated[list[int] | None, typer.Option(help="Test only these folds, from 0; default: all.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of training; default: 0.")] = None,
    ranker: Annotated[
        str, typer.Option(help="Rerankers only: order the lists by this model, trained without knowledge.")
    ] = DEFAULTS.ranker,
    split: Annotated[SplitBy, typer.Option(help="Test on other users, or on the latest events.")] = SplitBy.USER,
    share: Annotated[
        float, typer.Option(min=0.01, max=1, help="Split by user: train on this share of the training users.")
    ] = DEFAULTS.share,
    encodings: Annotated[str, typer.Option(help="prepared: folder in WORK with the vectors.")] = "encoding",
    epochs: Annotated[int, typer.Option(min=1, help="Epochs at most; early stopping ends sooner.")] = DEFAULTS.epochs,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes of one thread each; 0: train in this process.")
    ] = DEFAULTS.workers,
    json_file: JsonFile = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with plots.")] = None,
) -> None:
    """Train models with every arm on every fold; report each arm's quality with confidence intervals.

    A killed run goes on where it was when it is started again.
    """
    options = QualityBenchmarkOptions(
        models=once(model),
        arms=once(arm),
        folds=folds,
        tested_folds=once(fold),
        seeds=once(seed) or DEFAULTS.seeds,
        ranker=ranker,
        split_by=split.value,
        share=share,
        epochs=epochs,
        workers=workers,
    )
    console = Console()
    began = time.perf_counter()
    if dataset != PREPARED:
        encodings = prepare(work, dataset, console=console, source=folder, encoder=encoder, words=words)
    jobs = options.jobs(work.folder(encodings))
    settings = TrainSettings(epochs=options.epochs)
    finished = 0
    with progress(console, "train", len(jobs)) as show:

        def on_epoch(job: TrainingJob, epoch: int) -> None:
            nonlocal finished
            finished += epoch == 0
            text = f"{job.model} {job.arm}, fold {job.fold}, epoch {epoch}" if epoch else None
            show(text, finished, len(jobs))

        trained = train_jobs(
            work, options.protocol, encodings, jobs, settings, workers=options.workers, on_epoch=on_epoch
        )
    with console.status("measure"):
        report = measure_quality(work, options.protocol, encodings, jobs)
    report = dataclasses.replace(
        report, settings=settings.to_json(), trained=trained, seconds=time.perf_counter() - began
    )
    console.print(quality_table(report))
    write_report(report, json_file)
    if html is not None:
        write_quality_report(report, html, command_line())
        console.print(f"{html}: plots and all differences")
