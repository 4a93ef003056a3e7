"""Owns `kar publish`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kar_offline.cli_options import JsonFile, OptionalWork, write_json
from kar_offline.publish.feature_update import publish_features
from kar_offline.publish.stage import publish as publish_release
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
        Path | None, typer.Option(help="Write only these fresh features and histories, one JSON object a line.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Publish again what is there; replace features of another schema.")
    ] = False,
    max_rate: Annotated[
        int | None, typer.Option(min=1, help="Most records a second, so that those who read keep their latency.")
    ] = None,
    index: Annotated[
        Kind | None, typer.Option(help="Kind of index.", show_default=f"flat up to {FLAT_UP_TO:,} vectors, hnsw above")
    ] = None,
    recall: Annotated[
        float, typer.Option(help="Share of the exact 10 nearest that the index must find, or nothing is published.")
    ] = IndexConfig().recall,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings, as `kar sidecar` reads it.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Write a release into the store and the index, or fresh features into the store.

    Killed and started again, it goes on where it was.
    """
    console = Console()
    settings = Settings.read(config, work=work and work.root, store=store)
    folder, url, aerospike = WorkFolder(settings.work), settings.store, settings.aerospike
    release_id = release or read_active(folder.releases)
    with Progress(console=console, transient=True) as progress:
        if features:
            report = publish_features(folder, release_id, url, features, aerospike=aerospike, progress=progress)
            summary = f"{report['written']:,} of {report['records']:,} records were newer and are written to {url}"
        else:
            result = publish_release(
                folder,
                release_id,
                url,
                aerospike=aerospike,
                force=force,
                max_rate=max_rate,
                indexing=IndexConfig(index, recall, threads=len(os.sched_getaffinity(0))),
                progress=progress,
            )
            report = {**result.report, "ran": result.ran, "seconds": result.seconds}
            summary = (
                f"release {release_id} is in {url}: {_counted(report, 'users')} and {_counted(report, 'items')}"
                if result.ran
                else f"release {release_id} is in {url} already: nothing done (--force publishes again)"
            )
            if result.ran:
                table = Table("part", "records written")
                for part, count in report["written"].items():
                    table.add_row(part, f"{count:,}")
                console.print(table)
    console.print(summary, soft_wrap=True)
    write_json(json_file, report)


def _counted(report: Mapping[str, Any], kind: str) -> str:
    lent = report["lent"][kind]
    return f"{report[kind]:,} {kind}" + (f" ({lent:,} with borrowed knowledge)" if lent else "")
