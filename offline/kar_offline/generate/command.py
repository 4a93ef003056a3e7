"""Owns `kar generate`."""

from collections.abc import Mapping
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kar_offline.check import facts_table
from kar_offline.cli_options import ConfigFile, JsonFile, OptionalWork, settings_as_options, work_of, write_json
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.movielens_100k import MovieLens100K
from kar_offline.dataset.stage import build_dataset
from kar_offline.generate.estimate import Estimate
from kar_offline.generate.make_provider import make_provider
from kar_offline.generate.pack import Pack
from kar_offline.generate.provider import Provider
from kar_offline.generate.sharing import Sharing
from kar_offline.generate.stage import estimate_run
from kar_offline.generate.stage import generate as run
from kar_offline.knowledge.records import read_knowledge
from kar_offline.prompts import read_prompts, read_scenario, render_prompts
from kar_offline.settings import ProviderOptions
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import InputError

__all__ = ["generate"]

WARNING: Final = (
    "SmolLM2 (135 million parameters) only shows that generation works. It HALLUCINATES: its texts about films and "
    "people are made up. Do not train on them; use a capable model (--llm openai) or the released pack (--llm pack)."
)


class DatasetName(StrEnum):
    """Datasets that are fetched by name."""

    ML_100K = "ml-100k"


@settings_as_options
def generate(
    llm: ProviderOptions,
    work: OptionalWork = None,
    dataset: Annotated[
        DatasetName | None,
        typer.Option(help="If WORK has no prompts yet: first run `kar dataset` and `kar prompts` for this dataset."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the records; default: WORK/knowledge, or WORK/knowledge-LLM.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print calls, tokens and money that a run would take; send nothing.")
    ] = False,
    kind: Annotated[EntityKind | None, typer.Option(help="Only prompts about items, or about users.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts, up to this number.")] = None,
    share: Annotated[
        float | None,
        typer.Option(
            help="Ask about at most this share of entities (0.1: a tenth); the others get vectors imputed from texts "
            "about clusters."
        ),
    ] = None,
    facts: Annotated[
        str | None,
        typer.Option(
            help="Facts that texts must not contradict, besides the dataset: wikidata (films), or a CSV or JSONL file."
        ),
    ] = None,
    show: Annotated[
        int | None, typer.Option(min=0, help="Print this number of texts with their prompts; default: 3, for packs 0.")
    ] = None,
    config: ConfigFile = None,
    json_file: JsonFile = None,
) -> None:
    """Have prompts answered by released texts, or by a hosted or local language model, and check the answers."""
    console = Console()
    work = work_of(work, config)
    if dataset is not None:
        _prepare(work, dataset, console)
    provider = make_provider(llm, partial(read_scenario, work.prompts))
    known_facts = facts_table(facts) if facts else None
    sharing = _sharing(share, provider) if share is not None else None
    if dry_run:
        estimate = estimate_run(work, provider, kind=kind, limit=limit, sharing=sharing)
        _print_estimate(console, estimate, llm.budget_usd)
        write_json(json_file, {"dry_run": True, **estimate._asdict()})
        return
    demonstration = llm.provider == "local" and llm.gguf is None
    if demonstration:
        console.print(Panel(WARNING, title="[bold]demonstration only", style="bold yellow"))
    out = out or work.folder("knowledge" if llm.provider == "pack" else f"knowledge-{llm.provider}")
    result = run(
        work,
        provider,
        out=out,
        kind=kind,
        limit=limit,
        facts=known_facts,
        sharing=sharing,
        retries=llm.retries,
        budget_usd=llm.budget_usd,
        console=console,
    )
    _print_texts(console, work, out, (0 if llm.provider == "pack" else 3) if show is None else show)
    _print_report(console, result.report)
    if demonstration:
        console.print(Panel(WARNING, title="[bold]demonstration only", style="bold yellow"))
    console.print(f"{result.folder}: {result.outcome}")
    write_json(json_file, result.report)


def _prepare(work: WorkFolder, dataset: DatasetName, console: Console) -> None:
    if work.dataset.is_dir():
        if (present := work.read(Dataset).name) != dataset:
            raise InputError(f"{work} holds {present}: name another folder for {dataset} with --work")
    else:
        with console.status(f"fetching and reading {dataset}"):
            build_dataset(work, MovieLens100K())
    if not work.prompts.is_dir():
        with console.status("rendering prompts"):
            render_prompts(work)


def _sharing(share: float, provider: Provider) -> Sharing:
    if isinstance(provider, Pack):
        raise InputError("--share is for language models: a pack has a text for each entity that it knows")
    from kar_offline.encoders.packaged import mini_lm  # importing torch takes seconds

    return Sharing(share, mini_lm())


def _print_estimate(console: Console, estimate: Estimate, budget_usd: float | None) -> None:
    table = Table("calls", "tokens to read", "to write", "cost, USD", "at most, USD", title="nothing was sent")
    money = ["unknown" if cost is None else f"{cost:.4f}" for cost in (estimate.cost_usd, estimate.most_usd)]
    table.add_row(f"{estimate.calls:,}", f"{estimate.input_tokens:,}", f"{estimate.output_tokens:,}", *money)
    console.print(table)
    basis = "earlier answers of this model" if estimate.measured else "the length of prompts and the words asked for"
    console.print(f"Tokens are estimated from {basis}; asking again after a failed check comes on top of this.")
    if budget_usd is not None and estimate.cost_usd is not None and estimate.cost_usd > budget_usd:
        console.print(f"[yellow]More than the budget of ${budget_usd:g}: the run would stop before its end.")


def _print_report(console: Console, report: Mapping[str, Any]) -> None:
    table = Table("records", "items", "users", "quarantined", "calls", "tokens read", "written", "USD")
    cost = "unknown" if report["cost_usd"] is None else f"{report['cost_usd']:.4f}"
    counts = (report["records"], *report["kinds"].values(), report["quarantined"], report["calls"])
    table.add_row(*(f"{n:,}" for n in (*counts, report["input_tokens"], report["output_tokens"])), cost)
    console.print(f"answered by {report['source']}", highlight=False, soft_wrap=True)
    console.print(table)
    if report["clusters"]:
        console.print(
            f"{report['lent']:,} vectors will be imputed, also from texts about {report['clusters']:,} clusters"
        )
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


def _print_texts(console: Console, work: WorkFolder, out: Path, number: int) -> None:
    rendered = read_prompts(work.prompts) if number else []
    prompts = {(prompt.entity, prompt.id): prompt.prompt for prompt in rendered}
    records = ((kind, record) for kind in EntityKind for record in read_knowledge(out, kind) if record.text)
    for kind, record in islice(records, number):
        console.print(Panel(Text(prompts[kind, record.id]), title=f"prompt · {record.template} · {kind} {record.id}"))
        console.print(Panel(Text(record.text), title=f"answer · {record.llm}", border_style="green"))
