"""Owns `kar bench store`."""

import os
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from kar_bench.harness import finish, progress
from kar_bench.performance.store.measure import measure_store, store_table
from kar_bench.performance.store.options import StoreBenchmarkOptions
from kar_offline.cli_options import JsonFile, once
from kar_sidecar.settings import Settings

__all__ = ["store"]

DEFAULTS: Final = StoreBenchmarkOptions()


def store(
    store: Annotated[
        list[str] | None,
        typer.Option(
            help="lmdb:FOLDER (for temporary stores) or aerospike:HOST:PORT/NAMESPACE/SET; "
            "default: LMDB, and Aerospike where AEROSPIKE_HOSTS is set."
        ),
    ] = None,
    entities: Annotated[int, typer.Option(min=1_000, help="Entities to load.")] = DEFAULTS.entities,
    reads: Annotated[float, typer.Option(min=1, help="Batches of 200 entities read a second.")] = DEFAULTS.reads_per_s,
    quiet: Annotated[
        float, typer.Option(min=0.1, help="Seconds of reading before the load, and after it.")
    ] = DEFAULTS.quiet_s,
    text_bytes: Annotated[
        int, typer.Option(min=0, help="Bytes of each entity's text; 0: no texts.")
    ] = DEFAULTS.text_bytes,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings, as `kar sidecar` reads it.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Load a store while another process reads from it, beside the bare client.

    It reports records written a second, bytes of an entity, and latencies of reads before, during and after the load.
    """
    hosts = os.environ.get("AEROSPIKE_HOSTS")
    stores = once(store) or ["lmdb:", *([f"aerospike:{hosts}/test/bench"] if hosts else [])]
    options = StoreBenchmarkOptions(stores, entities, reads, quiet, text_bytes)
    console = Console()
    with progress(console, "load") as show:
        report = measure_store(options, Settings.read(config).aerospike, on_step=show)
    finish(console, report, store_table(report), json_file)
