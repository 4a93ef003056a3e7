"""Owns `kar demo` and `kar rank`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kar_offline.demo.pipeline import SEED, run_demo
from kar_offline.demo.pipeline import rank as rank_online
from kar_offline.demo.replay import replay_table
from kar_offline.demo.serving import read_ready_file
from kar_offline.options import DEFAULT_WORK, JsonFile, Work, write_json

__all__ = ["demo", "rank"]

Requests = Annotated[int, typer.Option(min=1, help="Requests that latency is measured over.")]
Candidates = Annotated[int, typer.Option(min=2, help="Candidates of a request.")]


def demo(
    work: Work = DEFAULT_WORK,
    users: Annotated[
        int | None, typer.Option(min=3, help="Keep only so many users, for a quick trial; default: all.")
    ] = None,
    requests: Requests = 1000,
    candidates: Candidates = 100,
    json_file: JsonFile = None,
) -> None:
    """Go from raw ratings to ranked candidates: every stage, then real requests, then the report."""
    summary = run_demo(work, users=users, requests=requests, candidates=candidates, console=Console())
    write_json(json_file, summary)


def rank(
    work: Work = DEFAULT_WORK,
    ready_file: Annotated[
        Path | None, typer.Option(help="Ready file of a running `kar serve`; default: start one for the while.")
    ] = None,
    requests: Requests = 1000,
    candidates: Candidates = 100,
    seed: Annotated[int, typer.Option(help="Of the sampled candidates and of the bootstrap.")] = SEED,
    json_file: JsonFile = None,
) -> None:
    """Rank for every test user in both arms, compare with offline scores, and measure latency."""
    console = Console()
    address = read_ready_file(ready_file) if ready_file else None
    report = rank_online(work, address, requests=requests, candidates=candidates, seed=seed, console=console)
    console.print(replay_table(report))
    write_json(json_file, report)
