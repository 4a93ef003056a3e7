"""Owns `kar dataset`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work, write_json
from kar_offline.dataset.movielens_1m import MovieLens1M
from kar_offline.dataset.movielens_100k import MovieLens100K
from kar_offline.dataset.report import DatasetReport
from kar_offline.dataset.source import DatasetSource
from kar_offline.dataset.splits import FOLDS, SEED
from kar_offline.dataset.stage import Split, build_dataset
from kar_sidecar.errors import InputError

__all__ = ["dataset"]


class Name(StrEnum):
    """Datasets that `--dataset` can name."""

    ML_100K = "ml-100k"
    ML_1M = "ml-1m"


class By(StrEnum):
    """Ways to split events."""

    USER = "user"
    TIME = "time"


def dataset(
    work: Work = DEFAULT_WORK,
    name: Annotated[
        Name, typer.Option("--dataset", help="ml-100k is downloaded; ml-1m is read from the folder of --from.")
    ] = Name.ML_100K,
    folder: Annotated[Path | None, typer.Option("--from", help="ml-1m: the folder that holds its files.")] = None,
    events: Annotated[
        Path | None,
        typer.Option(help="Your own log in place of MovieLens: Parquet or CSV file with one event per row."),
    ] = None,
    users: Annotated[Path | None, typer.Option(help="With --events: file with one user per row.")] = None,
    items: Annotated[Path | None, typer.Option(help="With --events: file with one item per row.")] = None,
    mapping: Annotated[
        Path | None, typer.Option(help="With --events: TOML file that says what the columns mean.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=3, help="MovieLens: number of users to keep, for a quick trial; default: all.")
    ] = None,
    split: Annotated[
        By, typer.Option(help="Test on users who are not in training, or on the latest events.")
    ] = By.USER,
    fold: Annotated[int, typer.Option(min=0, help="Split by user: the fold to test on, from 0.")] = 0,
    folds: Annotated[int, typer.Option(min=2, help="Split by user: number of folds.")] = FOLDS,
    seed: Annotated[int, typer.Option(help="Split by user: seed of the split.")] = SEED,
    history_length: Annotated[
        int, typer.Option(min=1, help="Maximal number of events in the history of a sample.")
    ] = 30,
    json_file: JsonFile = None,
) -> None:
    """Make leakage-safe samples of MovieLens-100K, MovieLens-1M or a log of your own."""
    console = Console()
    chosen_split = Split(split.value, fold, folds, seed)
    with console.status("reading and verifying data"):
        if any((events, users, items, mapping)):
            if limit is not None or folder is not None:
                raise InputError("--limit and --from are for MovieLens: leave them out with --events")
            source = _own_log(mapping, events, users, items)
        else:
            source = _movielens(name, folder, limit, seed)
        result = build_dataset(work, source, split=chosen_split, history_length=history_length)
    _print_report(console, result.report)
    console.print(f"{result.folder}: {result.outcome}")
    write_json(json_file, result.report.to_json())


def _own_log(mapping: Path | None, events: Path | None, users: Path | None, items: Path | None) -> DatasetSource:
    if events is None or mapping is None:
        raise InputError("a log of your own needs --events and --mapping, with --users and --items where you have them")
    # Imported here: loading pyarrow would slow MovieLens down.
    from kar_offline.dataset.mapping import load_mapping
    from kar_offline.dataset.tabular_source import TabularSource

    return TabularSource(load_mapping(mapping), events, users, items)


def _movielens(name: Name, folder: Path | None, limit: int | None, seed: int) -> DatasetSource:
    if name is Name.ML_100K:
        return MovieLens100K(limit, seed)
    if folder is None:
        raise InputError("MovieLens-1M may not be passed on: get it from GroupLens and name its folder with --from")
    return MovieLens1M(folder, limit, seed)


def _print_report(console: Console, report: DatasetReport) -> None:
    table = Table("split", "users", "samples")
    for split, size in report.splits.items():
        table.add_row(split, f"{size.users:,}", f"{size.samples:,}")
    table.add_section()
    table.add_row("all", f"{report.users:,}", f"{report.samples:,}")
    console.print(table)
    console.print(
        f"{report.positive_ratio:.2%} positive, {report.items:,} items, from {report.source}, split by {report.split}",
        soft_wrap=True,
    )
    if report.positive_ratio in (0, 1):
        console.print("[yellow]all samples have one label: click models learn nothing from them, rerankers can")
