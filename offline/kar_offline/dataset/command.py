"""Owns `kar dataset`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work, write_json
from kar_offline.dataset.movielens import build_dataset
from kar_offline.dataset.splits import FOLDS, SEED
from kar_offline.dataset.stage import Split
from kar_offline.stage_runner import StageResult
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import InputError

__all__ = ["dataset"]


class Name(StrEnum):
    """Data sets that are known by name."""

    ML_100K = "ml-100k"
    ML_1M = "ml-1m"


class By(StrEnum):
    """What splits events."""

    USER = "user"
    TIME = "time"


def dataset(
    work: Work = DEFAULT_WORK,
    name: Annotated[
        Name, typer.Option("--dataset", help="ml-100k is fetched; ml-1m is read from a folder of yours.")
    ] = Name.ML_100K,
    folder: Annotated[Path | None, typer.Option("--from", help="ml-1m: the folder that holds it.")] = None,
    events: Annotated[Path | None, typer.Option(help="Your own log instead: Parquet or CSV, one event a row.")] = None,
    users: Annotated[Path | None, typer.Option(help="With --events: your users, one a row.")] = None,
    items: Annotated[Path | None, typer.Option(help="With --events: your items, one a row.")] = None,
    mapping: Annotated[Path | None, typer.Option(help="With --events: TOML file that names the columns.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=3, help="MovieLens: only so many users, for a quick trial; default: all.")
    ] = None,
    split: Annotated[By, typer.Option(help="Test on other users, or on the latest events.")] = By.USER,
    fold: Annotated[int, typer.Option(min=0, help="Split by user: the fold to test on, from 0.")] = 0,
    folds: Annotated[int, typer.Option(min=2, help="Split by user: number of folds.")] = FOLDS,
    seed: Annotated[int, typer.Option(help="Split by user: its seed.")] = SEED,
    history_length: Annotated[int, typer.Option(min=1, help="Events before a target that models read.")] = 30,
    json_file: JsonFile = None,
) -> None:
    """Make leakage-safe samples of MovieLens-100K (fetched and verified), MovieLens-1M or a log of your own."""
    console = Console()
    chosen = Split(split.value, fold, folds, seed)
    with console.status("reading and verifying data"):
        result = _build(work, name, folder, (events, users, items, mapping), limit, history_length, chosen)
    report = result.report
    table = Table("split", "users", "samples")
    for part, count in report["splits"].items():
        table.add_row(part, f"{count['users']:,}", f"{count['samples']:,}")
    table.add_section()
    table.add_row("all", f"{report['users']:,}", f"{report['samples']:,}")
    console.print(table)
    console.print(
        f"{report['positive_ratio']:.2%} positive, {report['items']:,} items, from {report['source']}, "
        f"split by {report['split']}",
        soft_wrap=True,
    )
    if report["positive_ratio"] in (0, 1):
        console.print("[yellow]all samples have one label: click models learn nothing from them, rerankers can")
    console.print(f"{result.folder}: {result.outcome}")
    write_json(json_file, report)


def _build(
    work: WorkFolder,
    name: Name,
    folder: Path | None,
    own: tuple[Path | None, Path | None, Path | None, Path | None],
    limit: int | None,
    history_length: int,
    split: Split,
) -> StageResult:
    events, users, items, mapping = own
    if any(own) and (limit is not None or folder is not None):
        raise InputError("--limit and --from are for MovieLens: leave them out with --events")
    if events and mapping:
        from kar_offline.dataset.tabular_source import build_tables  # pyarrow takes its time

        return build_tables(work, mapping, events, users, items, history_length, split=split)
    if any(own):
        raise InputError("a log of your own needs --events and --mapping, with --users and --items where you have them")
    if name is Name.ML_100K:
        return build_dataset(work, limit, split.seed, history_length, split=split)
    if folder is None:
        raise InputError("MovieLens-1M may not be passed on: get it from GroupLens and name its folder with --from")
    from kar_offline.dataset.movielens_1m import build_movielens_1m

    return build_movielens_1m(work, folder, limit, split.seed, history_length, split=split)
