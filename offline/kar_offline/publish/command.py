"""Owns `kar publish`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kar_offline.cli_options import JsonFile, OptionalWork, write_json
from kar_offline.publish.feature_update import publish_features
from kar_offline.publish.stage import PublishReport
from kar_offline.publish.stage import publish as publish_release
from kar_offline.stage_runner import StageResult
from kar_offline.work_folder import WorkFolder
from kar_sidecar.index.config import FLAT_UP_TO, IndexConfig, Kind
from kar_sidecar.releases.manifest import read_active
from kar_sidecar.settings import Settings

__all__ = ["publish"]


def publish(
    work: OptionalWork = None,
    release: Annotated[str | None, typer.Option(help="Release id; default: the active one.")] = None,
    store: Annotated[
        str | None,
        typer.Option(help="lmdb:PATH or aerospike:HOST:PORT[,HOST:PORT]/NAMESPACE/SET; default: lmdb:WORK/store."),
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Write only the features and histories of this file, one JSON object per line.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Publish again; replace features of another schema.")] = False,
    max_rate: Annotated[
        int | None, typer.Option(min=1, help="Maximal number of records per second, to keep the latency of reads low.")
    ] = None,
    index: Annotated[
        Kind | None, typer.Option(help="Kind of index.", show_default=f"flat up to {FLAT_UP_TO:,} vectors, hnsw above")
    ] = None,
    recall: Annotated[
        float,
        typer.Option(
            help="Share of the exact 10 nearest neighbours that the index must find; below it nothing is published."
        ),
    ] = IndexConfig().recall,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings, as `kar sidecar` reads it.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Write a release into the store and the index, or fresh features into the store.

    A killed run is continued by the next one.
    """
    console = Console()
    settings = Settings.read(config, work=work and work.root, store=store)
    folder, url, aerospike = WorkFolder(settings.work), settings.store, settings.aerospike
    release_id = release or read_active(folder.releases)
    with Progress(console=console, transient=True) as progress:
        if features:
            update = publish_features(folder, release_id, url, features, aerospike=aerospike, progress=progress)
            console.print(
                f"{update.written:,} of {update.records:,} records were newer and are written to {url}", soft_wrap=True
            )
            write_json(json_file, update)
            return
        result = publish_release(
            folder,
            release_id,
            url,
            aerospike=aerospike,
            force=force,
            max_rate_per_s=max_rate,
            indexing=IndexConfig(index, recall, threads=len(os.sched_getaffinity(0))),
            progress=progress,
        )
    _print_result(console, result)
    write_json(json_file, {**asdict(result.report), "ran": result.ran, "seconds": result.seconds})


def _print_result(console: Console, result: StageResult[PublishReport]) -> None:
    report = result.report
    if not result.ran:
        console.print(
            f"release {report.release_id} is in {report.store} already: nothing done (--force publishes again)",
            soft_wrap=True,
        )
        return
    table = Table("part", "records written")
    for part, count in report.written.items():
        table.add_row(part, f"{count:,}")
    console.print(table)
    counts = [
        f"{count:,} {kind}" + (f" ({imputed:,} with imputed knowledge)" if imputed else "")
        for kind, count, imputed in (
            ("users", report.users, report.lent["users"]),
            ("items", report.items, report.lent["items"]),
        )
    ]
    console.print(f"release {report.release_id} is in {report.store}: {' and '.join(counts)}", soft_wrap=True)
