"""Owns `kar dataset`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kar_offline.dataset.movielens import SEED, build_dataset
from kar_offline.options import DEFAULT_WORK, JsonFile, Work, write_json

__all__ = ["dataset"]


def dataset(
    work: Work = DEFAULT_WORK,
    users: Annotated[
        int | None, typer.Option(min=3, help="Keep only so many users, for a quick trial; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split of users.")] = SEED,
    history_length: Annotated[int, typer.Option(min=1, help="Events before a target that models read.")] = 30,
    json_file: JsonFile = None,
) -> None:
    """Fetch MovieLens-100K, verify it and make leakage-safe samples of it."""
    console = Console()
    with console.status("fetching and verifying MovieLens-100K"):
        result = build_dataset(work, users, seed, history_length)
    report = result.report
    table = Table("split", "users", "samples")
    for name, split in report["splits"].items():
        table.add_row(name, f"{split['users']:,}", f"{split['samples']:,}")
    table.add_section()
    table.add_row("all", f"{report['users']:,}", f"{report['samples']:,}")
    console.print(table)
    console.print(f"{report['positive_ratio']:.2%} positive, {report['items']:,} items, from {report['source']}")
    console.print(f"{result.folder}: {result.outcome}")
    write_json(json_file, report)
