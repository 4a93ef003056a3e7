"""Owns `kar refresh`."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from kar_offline.check import facts_table
from kar_offline.cli_options import ConfigFile, JsonFile, Offered, OptionalWork, once, settings_as_options, write_json
from kar_offline.encoders.make_encoder import make_encoder
from kar_offline.generate.make_provider import make_provider
from kar_offline.prompts import read_scenario
from kar_offline.refresh.plan import Budget
from kar_offline.refresh.policy import Policy, Reason
from kar_offline.refresh.report import RefreshReport
from kar_offline.refresh.rewrite import TextCounts
from kar_offline.refresh.stage import refresh as run
from kar_offline.settings import EncoderOptions, ProviderOptions
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import EntityKind
from kar_sidecar.releases.manifest import read_active
from kar_sidecar.settings import Settings
from kar_sidecar.store.open import open_store

__all__ = ["refresh"]

NAMED_CANDIDATES: Final = 5
"""Waiting candidates that are printed."""


@settings_as_options
def refresh(
    llm: ProviderOptions,
    encoder: Annotated[EncoderOptions, Offered(("name", "base_url", "model"))],
    work: OptionalWork = None,
    events: Annotated[
        Path | None, typer.Option(help='New events, one {"user", "item", "rating", "time"} per line.')
    ] = None,
    entities: Annotated[
        Path | None,
        typer.Option(help='New items and users, one {"entity", "id", "title", "features", "facts"} per line.'),
    ] = None,
    grown_by: Annotated[
        int, typer.Option(min=1, help="Events since a user's text was written that make it due.")
    ] = Policy().grown_by,
    reason: Annotated[
        list[Reason] | None,
        typer.Option(help="Only texts that are due for this reason, repeatable; default: all reasons."),
    ] = None,
    kind: Annotated[
        list[EntityKind] | None,
        typer.Option(help="Only texts about this kind, repeatable; default: the kinds that the release's model reads."),
    ] = None,
    budget_calls: Annotated[
        int | None, typer.Option(min=0, help="Maximal number of questions to the language model.")
    ] = None,
    facts: Annotated[str | None, typer.Option(help="Facts that texts must not contradict; see `kar generate`.")] = None,
    store: Annotated[
        str | None,
        typer.Option(help="lmdb:PATH or aerospike:HOST:PORT[,HOST:PORT]/NAMESPACE/SET; default: lmdb:WORK/store."),
    ] = None,
    release: Annotated[
        str | None, typer.Option(help="The release that takes the fresh knowledge; default: the active one.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what is due and what it would cost; change and send nothing.")
    ] = False,
    config: ConfigFile = None,
    json_file: JsonFile = None,
) -> None:
    """Add new events and items, rewrite the texts that are due, and publish them while serving goes on."""
    console = Console()
    settings = Settings.read(config, work=work and work.root, store=store)
    folder, url = WorkFolder(settings.work), settings.store
    report = run(
        folder,
        make_provider(llm, partial(read_scenario, folder.prompts)),
        partial(make_encoder, encoder),
        release_id=release or read_active(folder.releases),
        open_store=partial(open_store, url, aerospike=settings.aerospike),
        events=events,
        entities=entities,
        policy=Policy(grown_by, frozenset(once(reason) or Reason), frozenset(once(kind)) or None),
        budget=Budget(budget_calls, llm.budget_usd),
        facts=facts_table(facts) if facts else None,
        retries=llm.retries,
        dry_run=dry_run,
        console=console,
    )
    _print_plan(console, report)
    if report.texts is not None and report.written is not None:
        _print_result(console, report, report.texts, report.written, url)
    write_json(json_file, report.as_json())


def _print_plan(console: Console, report: RefreshReport) -> None:
    """Print the counts of new and due entities and, in a dry run, the expected cost."""
    arrived, waiting = report.arrived, report.waiting
    console.print(f"new: {arrived.users:,} users, {arrived.items:,} items, {arrived.events:,} events")
    table = Table("due", "items", "users")
    for reason, counts in report.due.items():
        if any(counts.values()):
            table.add_row(reason, *(f"{counts[kind]:,}" for kind in EntityKind))
    table.add_section()
    for name, counts in (("chosen", report.chosen), ("waiting", waiting.counts)):
        table.add_row(name, *(f"{counts[kind]:,}" for kind in EntityKind))
    console.print(table)
    if waiting.most_valuable:
        named = [
            f"{candidate.kind} {candidate.id} ({candidate.value:.1f})"
            for candidate in waiting.most_valuable[:NAMED_CANDIDATES]
        ]
        more = ", …" if len(waiting.most_valuable) > NAMED_CANDIDATES else ""
        console.print(f"waiting, most valuable first: {', '.join(named)}{more}", soft_wrap=True)
    if report.dry_run:
        cost = _dollars(report.cost_usd)
        console.print(f"{report.calls:,} calls, expected to cost {cost}; nothing was changed or sent")


def _print_result(
    console: Console, report: RefreshReport, texts: TextCounts, written: Mapping[str, int], store: str
) -> None:
    """Print the counts of texts and vectors that were written, and the cost."""
    console.print(
        f"{report.calls:,} calls, {_dollars(report.cost_usd)}: {texts.written:,} texts written, {texts.refused:,} "
        f"refused, {texts.unanswered:,} unanswered; {report.encoded:,} texts encoded"
    )
    if texts.stopped:
        console.print(f"[bold yellow]stopped:[/] {texts.stopped}", soft_wrap=True)
    parts = ", ".join(f"{count:,} {part}" for part, count in written.items() if count)
    outcome = f"written to {store}: {parts}" if parts else f"{store} holds all of it already"
    console.print(f"{outcome} ({report.seconds:.1f} s)", soft_wrap=True)


def _dollars(cost_usd: float | None) -> str:
    return "unknown" if cost_usd is None else f"${cost_usd:.4f}"
