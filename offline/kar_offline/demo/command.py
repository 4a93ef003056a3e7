"""Owns `kar demo`."""

from typing import Annotated

import typer
from rich.console import Console

from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work, write_json
from kar_offline.demo.pipeline import run_demo
from kar_offline.replay.command import Candidates, Requests

__all__ = ["demo"]


def demo(
    work: Work = DEFAULT_WORK,
    users: Annotated[
        int | None, typer.Option(min=3, help="Keep only this number of users, for a quick trial; default: all.")
    ] = None,
    requests: Requests = 1000,
    candidates: Candidates = 100,
    json_file: JsonFile = None,
) -> None:
    """Run every stage from raw ratings to ranked candidates, send timed requests, and write a report."""
    summary = run_demo(work, users=users, requests=requests, candidates=candidates, console=Console())
    write_json(json_file, summary)
