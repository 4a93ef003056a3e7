"""Owns `kar bench modes`."""

from typing import Annotated, Final

import torch
import typer
from rich.console import Console

from kar_bench.harness import finish, progress
from kar_bench.performance.modes.measure import ModesBenchmarkOptions, measure_modes, modes_table
from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work, once, refuse_unknown
from kar_offline.models import BACKBONES, RERANKERS

__all__ = ["modes"]

DEFAULTS: Final = ModesBenchmarkOptions()


def modes(
    work: Work = DEFAULT_WORK,
    candidates: Annotated[
        list[int] | None, typer.Option(min=1, help="Candidates of a request; default: 100 and 500.")
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="Requests for each mode and number of candidates.")
    ] = DEFAULTS.requests,
    model: Annotated[
        str,
        typer.Option(
            "--backbone",
            "--model",
            help="Trained backbone to roll out; default: the first one beside the served one.",
        ),
    ] = DEFAULTS.model,
    json_file: JsonFile = None,
) -> None:
    """Serve the active release in both modes: latency, bytes in the store, time to serve a new model."""
    refuse_unknown("model", [model] if model else [], (*BACKBONES, *RERANKERS))
    options = ModesBenchmarkOptions(once(candidates) or DEFAULTS.candidates, requests, model)
    console = Console()
    torch.set_num_threads(1)
    with progress(console, "serve") as show:
        report = measure_modes(work, options, on_step=show)
    finish(console, report, modes_table(report), json_file)
