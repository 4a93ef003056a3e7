"""Owns `kar replay`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work, write_json
from kar_offline.replay.report import replay_table
from kar_offline.replay.serving import read_ready_file
from kar_offline.replay.stage import SEED, replay_release

__all__ = ["replay"]

Requests = Annotated[int, typer.Option(min=1, help="Number of requests that latency is measured over.")]
Candidates = Annotated[int, typer.Option(min=2, help="Number of candidates of a request.")]


def replay(
    work: Work = DEFAULT_WORK,
    ready_file: Annotated[
        Path | None, typer.Option(help="Ready file of a running `kar serve`; default: one is started for the replay.")
    ] = None,
    requests: Requests = 1000,
    candidates: Candidates = 100,
    seed: Annotated[int, typer.Option(help="Seed of the sampled candidates and of the bootstrap.")] = SEED,
    json_file: JsonFile = None,
) -> None:
    """Rank for every test user in both arms, compare with offline scores, and measure latency."""
    console = Console()
    addresses = read_ready_file(ready_file) if ready_file else None
    report = replay_release(work, addresses, requests=requests, candidates=candidates, seed=seed, console=console)
    console.print(replay_table(report))
    write_json(json_file, report)
