"""Owns `kar bench index`."""

import os
from typing import Annotated, Final

import typer
from rich.console import Console

from kar_bench.harness import finish
from kar_bench.performance.index.measure import IndexBenchmarkOptions, index_table, measure_index
from kar_offline.cli_options import JsonFile, once, refuse_unknown
from kar_sidecar.index.config import KINDS, STORAGES

__all__ = ["index"]

DEFAULTS: Final = IndexBenchmarkOptions()


def index(
    size: Annotated[
        list[int] | None,
        typer.Option(min=100, help="Number of vectors; repeat for several.", show_default="10000 and 1000000"),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="flat, ivf or hnsw.", show_default="all, flat up to 200,000 vectors")
    ] = None,
    storage: Annotated[list[str] | None, typer.Option(help="float32, float16 or int8.", show_default="float32")] = None,
    recall: Annotated[float, typer.Option(help="Share of the exact 10 nearest that must be found.")] = DEFAULTS.recall,
    dim: Annotated[int, typer.Option(min=2, help="Components of a vector.")] = DEFAULTS.dim,
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of searches for each implementation; one more warms up.")
    ] = DEFAULTS.rounds,
    seconds: Annotated[float, typer.Option(min=0.01, help="Seconds of a turn of searches.")] = DEFAULTS.seconds,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that build.", show_default="this machine's cores")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Build, search and load nearest-neighbour indexes, beside bare FAISS."""
    refuse_unknown("kind", kind or (), KINDS)
    refuse_unknown("storage", storage or (), STORAGES)
    options = IndexBenchmarkOptions(
        sizes=once(size) or DEFAULTS.sizes,
        kinds=[known for known in KINDS if known in (kind or ())],
        storages=[known for known in STORAGES if known in (storage or DEFAULTS.storages)],
        recall=recall,
        dim=dim,
        threads=threads or len(os.sched_getaffinity(0)),
        rounds=rounds,
        seconds=seconds,
    )
    console = Console()
    with console.status("") as status:
        report = measure_index(options, on_step=status.update)
    finish(console, report, index_table(report), json_file)
