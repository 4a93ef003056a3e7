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

from kar_offline.check import facts_table
from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work, write_json
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.movielens import build_dataset
from kar_offline.generate.batch import OpenAIBatch
from kar_offline.generate.estimate import Estimate
from kar_offline.generate.llama_cpp import PARAMETERS, LocalChat
from kar_offline.generate.openai_chat import DEFAULT_PARAMETERS, OpenAIChat, Price
from kar_offline.generate.pack import Pack
from kar_offline.generate.provider import Provider
from kar_offline.generate.sharing import Sharing
from kar_offline.generate.stage import estimate_run
from kar_offline.generate.stage import generate as run
from kar_offline.knowledge.records import read_knowledge
from kar_offline.prompts import read_prompts, read_scenario, render_prompts
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import InputError

__all__ = [
    "BaseUrl",
    "Concurrency",
    "Gguf",
    "ModelName",
    "PackName",
    "PerMillion",
    "Source",
    "TimeoutS",
    "generate",
    "provider_of",
]

WARNING: Final = (
    "SmolLM2 (135 million parameters) shows that the live path works. It HALLUCINATES: what it says about films and "
    "people is made up. Do not train on it; use a capable model (--llm openai) or the released pack (--llm pack)."
)


class Source(StrEnum):
    """Who answers the prompts."""

    PACK = "pack"
    OPENAI = "openai"
    LOCAL = "local"


class Name(StrEnum):
    """Data sets that are fetched by name."""

    ML_100K = "ml-100k"


class Runner(StrEnum):
    """Where requests are made."""

    HERE = "here"
    RAY = "ray"


PackName = Annotated[str, typer.Option(help="pack: name of a pack, or its folder.")]
BaseUrl = Annotated[
    str | None, typer.Option(envvar="KAR_LLM_BASE_URL", help="openai: address, such as http://127.0.0.1:8000/v1.")
]
ModelName = Annotated[
    str | None, typer.Option(envvar="KAR_LLM_MODEL", help="openai: the model's name at the endpoint.")
]
Gguf = Annotated[Path | None, typer.Option(help="local: a model file in GGUF format; default: SmolLM2.")]
Concurrency = Annotated[int | None, typer.Option(min=1, help="Requests in flight at once.")]
TimeoutS = Annotated[float, typer.Option(min=0.1, help="openai: seconds for one attempt.")]
PerMillion = Annotated[
    tuple[float, float] | None, typer.Option(help="openai: US dollars for a million tokens, read and written.")
]


def generate(
    llm: Annotated[
        Source,
        typer.Option(
            help="pack: released knowledge; openai: any OpenAI-compatible endpoint, key in $KAR_LLM_API_KEY; "
            "local: SmolLM2 in this process, a demonstration (extra local-llm)."
        ),
    ] = Source.PACK,
    work: Work = DEFAULT_WORK,
    dataset: Annotated[
        Name | None, typer.Option(help="Where WORK has no prompts yet: first run `kar dataset` and `kar prompts`.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the records; default: WORK/knowledge, or WORK/knowledge-LLM.")
    ] = None,
    pack: PackName = "ml-100k",
    base_url: BaseUrl = None,
    model: ModelName = None,
    gguf: Gguf = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="openai: send batch files (cheaper, slower) instead of single requests.")
    ] = False,
    parameters: Annotated[
        str | None,
        typer.Option(
            help='Request parameters as JSON; default: \'{"temperature": 0, "max_tokens": M}\', M the scenario\'s.'
        ),
    ] = None,
    concurrency: Concurrency = None,
    timeout_s: TimeoutS = 120.0,
    price: PerMillion = None,
    retries: Annotated[
        int | None,
        typer.Option(min=0, help="Ask again so often where an answer fails a check; default: the scenario's."),
    ] = None,
    budget_usd: Annotated[
        float | None, typer.Option(min=0, help="Stop before a request that could bring this run's cost above it.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print calls, tokens and money that a run would take; send nothing.")
    ] = False,
    kind: Annotated[EntityKind | None, typer.Option(help="Only prompts about items, or about users.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts, from the first.")] = None,
    share: Annotated[
        float | None,
        typer.Option(
            help="Ask about at most this share of entities (0.1: a tenth); the others borrow texts of clusters."
        ),
    ] = None,
    runner: Annotated[
        Runner, typer.Option(help="Where requests are made: here, or by Ray actors (extra ray).")
    ] = Runner.HERE,
    workers: Annotated[int, typer.Option(min=1, help="ray: actors, which share --concurrency.")] = 2,
    ray_address: Annotated[
        str | None, typer.Option(help="ray: a running cluster, such as auto; default: one in this machine.")
    ] = None,
    facts: Annotated[
        str | None,
        typer.Option(
            help="What texts must not contradict, beside the dataset: wikidata (films), or a CSV or JSONL file."
        ),
    ] = None,
    show: Annotated[
        int | None, typer.Option(min=0, help="Print so many texts with their prompts; default: 3, for packs none.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Have the prompts answered, by released knowledge, a hosted or a local language model, and check the answers."""
    console = Console()
    if dataset is not None:
        _prepare(work, dataset, console)
    provider = provider_of(work, llm, pack, gguf, base_url, model, batch, parameters, concurrency, timeout_s, price)
    if budget_usd is not None and provider.cost_usd(1, 1) is None:
        raise InputError("--budget-usd needs to know what tokens cost: give --price, for a million read and written")
    if runner is Runner.RAY:
        provider = _on_ray(provider, workers, ray_address)
    known = facts_table(facts) if facts else None
    sharing = _sharing(share, provider) if share is not None else None
    chosen: EntityKind | None = kind if kind else None
    if dry_run:
        expected = estimate_run(work, provider, kind=chosen, limit=limit, sharing=sharing)
        _tell(console, expected, budget_usd)
        write_json(json_file, {"dry_run": True, **expected._asdict()})
        return
    demonstration = llm is Source.LOCAL and gguf is None
    if demonstration:
        console.print(Panel(WARNING, title="[bold]demonstration only", style="bold yellow"))
    out = out or work / ("knowledge" if llm is Source.PACK else f"knowledge-{llm}")
    result = run(
        work,
        provider,
        out=out,
        kind=chosen,
        limit=limit,
        facts=known,
        sharing=sharing,
        retries=retries,
        budget_usd=budget_usd,
        console=console,
    )
    _show(console, work, out, (0 if llm is Source.PACK else 3) if show is None else show)
    _report(console, result.report)
    demonstration = llm is Source.LOCAL and gguf is None
    if demonstration:
        console.print(Panel(WARNING, title="[bold]demonstration only", style="bold yellow"))
    console.print(f"{result.folder}: {result.outcome}")
    write_json(json_file, result.report)


def _prepare(work: Path, dataset: Name, console: Console) -> None:
    if (work / "dataset").is_dir():
        if (held := Dataset.load(work / "dataset").name) != dataset:
            raise InputError(f"{work} holds {held}: name another folder for {dataset} with --work")
    else:
        with console.status(f"fetching and reading {dataset}"):
            build_dataset(work)
    if not (work / "prompts").is_dir():
        with console.status("rendering prompts"):
            render_prompts(work)


def provider_of(
    work: Path,
    llm: Source,
    pack: str,
    gguf: Path | None,
    base_url: str | None,
    model: str | None,
    batch: bool,
    parameters: str | None,
    concurrency: int | None,
    timeout_s: float,
    price: tuple[float, float] | None,
) -> Provider:
    """Who answers, as options of the command line name it; errors as of the providers, and where one is missing."""
    if llm is Source.PACK:
        return Pack.load(pack)
    given = _parameters(parameters)
    if llm is Source.LOCAL:
        return LocalChat(gguf, parameters=given or PARAMETERS, concurrency=concurrency or 4)
    if not base_url or not model:
        raise InputError("--llm openai needs an endpoint: give --base-url and --model, or set KAR_LLM_BASE_URL etc.")
    key = os.environ.get("KAR_LLM_API_KEY")
    bounded = {**DEFAULT_PARAMETERS, "max_tokens": read_scenario(work / "prompts").limits.output_tokens}
    options: dict[str, Any] = {"parameters": given or bounded, "price": Price(*price) if price else None}
    if batch:
        return OpenAIBatch(base_url, model, key, **options, timeout_s=timeout_s)
    return OpenAIChat(base_url, model, key, **options, concurrency=concurrency or 8, timeout_s=timeout_s)


def _on_ray(provider: Provider, workers: int, address: str | None) -> Provider:
    from kar_offline.generate.ray import OnRay  # an extra of its own

    if not isinstance(provider, OpenAIChat):
        raise InputError("--runner ray asks one question a request: not for packs or --batch")
    return OnRay(provider, workers, address)


def _sharing(share: float, provider: Provider) -> Sharing:
    if isinstance(provider, Pack):
        raise InputError("--share is for language models: a pack has a text for each entity that it knows")
    from kar_offline.encoders.huggingface import mini_lm  # torch takes its time

    return Sharing(share, mini_lm())


def _parameters(text: str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(text or "null")
    except ValueError as error:
        raise InputError(f"--parameters is not JSON ({error}): give an object in single quotes") from error
    if not (value is None or isinstance(value, dict)):
        raise InputError("--parameters is not a JSON object: give one such as '{\"temperature\": 0}'")
    return value


def _tell(console: Console, expected: Estimate, budget_usd: float | None) -> None:
    table = Table("calls", "tokens to read", "to write", "cost, USD", "at most, USD", title="nothing was sent")
    money = ["unknown" if cost is None else f"{cost:.4f}" for cost in (expected.cost_usd, expected.most_usd)]
    table.add_row(f"{expected.calls:,}", f"{expected.input_tokens:,}", f"{expected.output_tokens:,}", *money)
    console.print(table)
    basis = "what this model took before" if expected.measured else "the length of prompts and the words asked for"
    console.print(f"Tokens are estimated from {basis}; asking again for what fails a check comes on top of this.")
    if budget_usd is not None and expected.cost_usd is not None and expected.cost_usd > budget_usd:
        console.print(f"[yellow]More than the budget of ${budget_usd:g}: the run would stop on the way.")


def _report(console: Console, report: dict[str, Any]) -> None:
    table = Table("records", "items", "users", "quarantined", "calls", "tokens read", "written", "USD")
    cost = "unknown" if report["cost_usd"] is None else f"{report['cost_usd']:.4f}"
    counts = (report["records"], *report["kinds"].values(), report["quarantined"], report["calls"])
    table.add_row(*(f"{n:,}" for n in (*counts, report["input_tokens"], report["output_tokens"])), cost)
    console.print(f"answered by {report['source']}", highlight=False, soft_wrap=True)
    console.print(table)
    if report["clusters"]:
        console.print(f"{report['lent']:,} entities borrow, also from texts about {report['clusters']:,} clusters")
    if report["gates"]:
        refused = ", ".join(f"{gate} {count:,}" for gate, count in sorted(report["gates"].items()))
        console.print(f"refused by: {refused} (a text can fail several checks)", soft_wrap=True)
    if report["uncertain"]:
        console.print(
            f"{report['uncertain']:,} questions were under way when a run was killed: `kar knowledge costs`",
            soft_wrap=True,
        )
    if report["stopped"]:
        console.print(f"[bold yellow]stopped with {report['unanswered']:,} unanswered:[/] {report['stopped']}")


def _show(console: Console, work: Path, out: Path, number: int) -> None:
    asked = read_prompts(work / "prompts") if number else []
    prompts: dict[tuple[str, str], str] = {(prompt.entity, prompt.id): prompt.prompt for prompt in asked}
    records = ((kind, record) for kind in EntityKind for record in read_knowledge(out, kind) if record.text)
    for kind, record in islice(records, number):
        console.print(Panel(Text(prompts[kind, record.id]), title=f"prompt · {record.template} · {kind} {record.id}"))
        console.print(Panel(Text(record.text), title=f"answer · {record.llm}", border_style="green"))
