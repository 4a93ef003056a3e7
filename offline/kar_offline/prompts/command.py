"""Owns `kar prompts`."""

from datetime import UTC, datetime
from itertools import chain, islice, zip_longest
from typing import Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work, write_json
from kar_offline.prompts.stage import read_prompts, render_prompts

__all__ = ["prompts"]


def prompts(
    work: Work = DEFAULT_WORK,
    scenario: Annotated[
        str | None,
        typer.Option(help="Scenario: movies, books, news or music, or a scenario file (TOML); default: movies."),
    ] = None,
    date: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="Prompts mention the seasons of this day; default: today in UTC."),
    ] = None,
    show: Annotated[
        int, typer.Option(min=0, help="Print this number of rendered prompts, about items and users in turn.")
    ] = 0,
    json_file: JsonFile = None,
) -> None:
    """Render the questions to language models about items and users."""
    console = Console()
    with console.status("rendering prompts"):
        result = render_prompts(work, scenario, (date or datetime.now(UTC)).date())
    table = Table("about", "template", "prompts", "mean words")
    for kind, report in result.report["kinds"].items():
        table.add_row(kind, report["template"], f"{report['prompts']:,}", f"{report['mean_words']:.1f}")
    console.print(table)
    for kind, report in result.report["kinds"].items():
        facts = {part.replace("absent", "not in the data"): names for part, names in report["facts"].items()}
        facts["suspicious values"] = [f"{name} ({number:,})" for name, number in report["suspicious"].items()]
        described = "; ".join(f"{part}: {', '.join(names)}" for part, names in facts.items() if names)
        console.print(Text(f"{kind} facts {described or 'shown: none'}"), soft_wrap=True)
    for season, last_day in result.report["seasons"].items():
        console.print(Text(f"season {season}: until {last_day}"))
    console.print(f"{result.folder}: {result.outcome}")
    if show:
        rendered = read_prompts(result.folder)
        items, users = ([prompt for prompt in rendered if prompt.entity == entity] for entity in ("item", "user"))
        in_turn = (prompt for prompt in chain.from_iterable(zip_longest(items, users)) if prompt)
        for prompt in islice(in_turn, show):
            title = Text(f"{prompt.template} · {prompt.entity} {prompt.id}")
            console.print(Panel(Text(prompt.prompt), title=title, subtitle=prompt.prompt_sha256[:12]))
    write_json(json_file, result.report)
