"""Owns `kar generate`."""

import json
import os
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kar_offline.generate.local import PARAMETERS, LocalChat
from kar_offline.generate.model import LanguageModel
from kar_offline.generate.openai import DEFAULT_PARAMETERS, OpenAIChat, Price
from kar_offline.generate.pack import Pack
from kar_offline.generate.records import KINDS, read_knowledge
from kar_offline.generate.stage import generate as run
from kar_offline.options import DEFAULT_WORK, JsonFile, Work, write_json
from kar_offline.prompts import read_prompts
from kar_sidecar.errors import InputError

__all__ = ["generate"]

WARNING: Final = (
    "SmolLM2 (135 million parameters) shows that the live path works. It HALLUCINATES: what it says about films and "
    "people is made up. Do not train on it; use a capable model (--llm openai) or the released pack (--llm pack)."
)


class Source(StrEnum):
    """Who answers the prompts."""

    PACK = "pack"
    OPENAI = "openai"
    LOCAL = "local"


class Kind(StrEnum):
    """What prompts are about."""

    ITEM = "item"
    USER = "user"


def generate(
    llm: Annotated[
        Source,
        typer.Option(
            help="pack: released knowledge; openai: any OpenAI-compatible endpoint, key in $KAR_LLM_API_KEY; "
            "local: SmolLM2 in this process, a demonstration (extra local-llm)."
        ),
    ] = Source.PACK,
    work: Work = DEFAULT_WORK,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the records; default: WORK/knowledge, or WORK/knowledge-LLM.")
    ] = None,
    pack: Annotated[str, typer.Option(help="pack: name of a pack, or its folder.")] = "ml-100k",
    base_url: Annotated[
        str | None, typer.Option(envvar="KAR_LLM_BASE_URL", help="openai: address, such as http://127.0.0.1:8000/v1.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(envvar="KAR_LLM_MODEL", help="openai: the model's name at the endpoint.")
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help='Request parameters as JSON, such as \'{"temperature": 0, "max_tokens": 400}\'.')
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests in flight at once.")] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="openai: seconds for one attempt.")] = 120.0,
    price: Annotated[
        tuple[float, float] | None, typer.Option(help="openai: US dollars for a million tokens, read and written.")
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only prompts about items, or about users.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts, from the first.")] = None,
    show: Annotated[
        int | None, typer.Option(min=0, help="Print so many texts with their prompts; default: 3, for packs none.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Have the prompts answered: by released knowledge, by a hosted or by a local language model."""
    console = Console()
    source: Pack | LanguageModel
    if llm is Source.PACK:
        source = Pack.load(pack)
    elif llm is Source.LOCAL:
        console.print(Panel(WARNING, title="[bold]demonstration only", style="bold yellow"))
        source = LocalChat(parameters=_parameters(parameters) or PARAMETERS, concurrency=concurrency or 4)
    else:
        if not base_url or not model:
            raise InputError(
                "--llm openai needs an endpoint: give --base-url and --model, or set KAR_LLM_BASE_URL etc."
            )
        source = OpenAIChat(
            base_url,
            model,
            os.environ.get("KAR_LLM_API_KEY"),
            parameters=_parameters(parameters) or DEFAULT_PARAMETERS,
            concurrency=concurrency or 8,
            timeout_s=timeout_s,
            price=Price(*price) if price else None,
        )
    out = out or work / ("knowledge" if llm is Source.PACK else f"knowledge-{llm}")
    result = run(work, source, out=out, kind=kind.value if kind else None, limit=limit, console=console)
    _show(console, work, out, (0 if llm is Source.PACK else 3) if show is None else show)
    report = result.report
    table = Table("texts", "items", "users", "calls", "tokens read", "tokens written", "cost, USD")
    cost = "unknown" if report["cost_usd"] is None else f"{report['cost_usd']:.4f}"
    numbers = (report["records"], *report["kinds"].values(), report["calls"], report["input_tokens"])
    table.add_row(*(f"{n:,}" for n in (*numbers, report["output_tokens"])), cost)
    console.print(f"answered by {report['source']}", highlight=False, soft_wrap=True)
    console.print(table)
    if llm is Source.LOCAL:
        console.print(Panel(WARNING, title="[bold]demonstration only", style="bold yellow"))
    console.print(f"{result.folder}: {result.outcome}")
    write_json(json_file, report)


def _parameters(text: str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(text or "null")
    except ValueError as error:
        raise InputError(f"--parameters is not JSON ({error}): give an object in single quotes") from error
    if not (value is None or isinstance(value, dict)):
        raise InputError("--parameters is not a JSON object: give one such as '{\"temperature\": 0}'")
    return value


def _show(console: Console, work: Path, out: Path, number: int) -> None:
    asked = read_prompts(work / "prompts") if number else []
    prompts: dict[tuple[str, str], str] = {(prompt.entity, prompt.id): prompt.prompt for prompt in asked}
    records = ((kind, record) for kind in KINDS for record in read_knowledge(out, kind))
    for kind, record in islice(records, number):
        console.print(Panel(Text(prompts[kind, record.id]), title=f"prompt · {record.template} · {kind} {record.id}"))
        console.print(Panel(Text(record.text), title=f"answer · {record.llm}", border_style="green"))
