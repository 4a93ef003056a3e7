"""Owns `kar prompts`."""

from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kar_offline.options import DEFAULT_WORK, JsonFile, Work, write_json
from kar_offline.prompts.rendering import read_prompts, render_prompts

__all__ = ["prompts"]


def prompts(
    work: Work = DEFAULT_WORK,
    scenario: Annotated[
        Path | None, typer.Option(help="Scenario file (TOML) with words and factor lists; default: films.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Print so many rendered prompts, items and users in turn.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Render the questions that language models are asked about items and users."""
    console = Console()
    with console.status("rendering prompts"):
        result = render_prompts(work, scenario)
    table = Table("knowledge", "template", "prompts", "mean words")
    for kind, report in result.report["kinds"].items():
        table.add_row(kind, report["template"], f"{report['prompts']:,}", f"{report['mean_words']:.1f}")
    console.print(table)
    console.print(f"{result.folder}: {result.outcome}")
    if show:
        rendered = read_prompts(result.folder)
        items, users = ([prompt for prompt in rendered if prompt.entity == entity] for entity in ("item", "user"))
        in_turn = chain.from_iterable(zip(items, users, strict=False))
        for prompt in islice(in_turn, show):
            title = f"{prompt.template} · {prompt.entity} {prompt.id}"
            console.print(Panel(Text(prompt.prompt), title=title, subtitle=prompt.prompt_sha256[:12]))
    write_json(json_file, result.report)
