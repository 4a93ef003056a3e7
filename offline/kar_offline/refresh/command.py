"""Owns `kar refresh`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kar_offline.check import facts_table
from kar_offline.cli_options import ConfigFile, JsonFile, Offered, OptionalWork, once, settings_as_options, write_json
from kar_offline.encoders.make_encoder import make_encoder
from kar_offline.generate.make_provider import make_provider
from kar_offline.prompts import read_scenario
from kar_offline.refresh.policy import Policy, Reason
from kar_offline.refresh.stage import Budget, kinds_read
from kar_offline.refresh.stage import refresh as run
from kar_offline.settings import EncoderOptions, ProviderOptions
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import EntityKind
from kar_sidecar.releases.manifest import Release, read_active
from kar_sidecar.settings import Settings
from kar_sidecar.store.open import open_store

__all__ = ["refresh"]


@settings_as_options
def refresh(
    llm: ProviderOptions,
    encoder: Annotated[EncoderOptions, Offered(("name", "base_url", "model"))],
    work: OptionalWork = None,
    events: Annotated[Path | None, typer.Option(help='New events, one {USER, ITEM, "rating", "time"} a line.')] = None,
    entities: Annotated[
        Path | None,
        typer.Option(help='New items and users, one {"entity", "id", "title", "features", "facts"} a line.'),
    ] = None,
    grown_by: Annotated[
        int, typer.Option(min=1, help="Events since a user's text that make it due.")
    ] = Policy().grown_by,
    reason: Annotated[
        list[Reason] | None, typer.Option(help="Only what is due for this reason, repeatable; default: for any.")
    ] = None,
    kind: Annotated[
        list[EntityKind] | None,
        typer.Option(help="Write about these, repeatable; default: those whose texts the release's model reads."),
    ] = None,
    budget_calls: Annotated[int | None, typer.Option(min=0, help="Ask at most so many questions.")] = None,
    facts: Annotated[str | None, typer.Option(help="What texts must not contradict; as of `kar generate`.")] = None,
    store: Annotated[
        str | None,
        typer.Option(help="lmdb:PATH or aerospike:HOST:PORT[,HOST:PORT]/NAMESPACE/SET; default: lmdb:WORK/store."),
    ] = None,
    release: Annotated[
        str | None, typer.Option(help="The release that takes the fresh vectors; default: the active one.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what is due and would be asked; change and send nothing.")
    ] = False,
    config: ConfigFile = None,
    json_file: JsonFile = None,
) -> None:
    """Take in new events and items, have the texts that are due written anew, and publish them while readers go on."""
    console = Console()
    settings = Settings.read(config, work=work and work.root, store=store)
    folder, url = WorkFolder(settings.work), settings.store
    provider = make_provider(llm, partial(read_scenario, folder.prompts))
    release_id = release or read_active(folder.releases)
    asked = frozenset(one.value for one in once(kind))
    kinds = asked or kinds_read(Release.load(folder.releases, release_id, verify=False))
    report = run(
        folder,
        provider,
        partial(make_encoder, encoder),
        release_id=release_id,
        store=partial(open_store, url, aerospike=settings.aerospike),
        events=events,
        entities=entities,
        policy=Policy(grown_by, frozenset(once(reason) or Reason), kinds),
        budget=Budget(budget_calls, llm.budget_usd),
        facts=facts_table(facts) if facts else None,
        retries=llm.retries,
        dry_run=dry_run,
        console=console,
    )
    _tell(console, report, url)
    write_json(json_file, report)


def _tell(console: Console, report: dict[str, Any], store: str) -> None:
    arrived = report["arrived"]
    console.print(f"new: {arrived['users']:,} users, {arrived['items']:,} items, {arrived['events']:,} events")
    table = Table("due", "items", "users")
    for reason, counts in report["due"].items():
        if any(counts.values()):
            table.add_row(reason, *(f"{counts[kind]:,}" for kind in EntityKind))
    table.add_section()
    for name in ("chosen", "waiting"):
        table.add_row(name, *(f"{report[name][kind]:,}" for kind in EntityKind))
    console.print(table)
    waiting = report["waiting"]["most_valuable"]
    if waiting:
        first = ", ".join(f"{one['kind']} {one['id']} ({one['value']:.1f})" for one in waiting[:5])
        console.print(f"waiting, most valuable first: {first}{', …' if len(waiting) > 5 else ''}", soft_wrap=True)
    cost = "unknown" if report["cost_usd"] is None else f"${report['cost_usd']:.4f}"
    if report["dry_run"]:
        console.print(f"{report['calls']:,} calls, expected to cost {cost}; nothing was changed or sent")
        return
    texts = report["texts"]
    console.print(
        f"{report['calls']:,} calls, {cost}: {texts['written']:,} texts written, {texts['refused']:,} refused, "
        f"{texts['unanswered']:,} unanswered; {report['encoded']:,} texts encoded"
    )
    if texts["stopped"]:
        console.print(f"[bold yellow]stopped:[/] {texts['stopped']}", soft_wrap=True)
    parts = ", ".join(f"{count:,} {part}" for part, count in report["written"].items() if count)
    said = f"written to {store}: {parts}" if parts else f"{store} holds all of it already"
    console.print(f"{said} ({report['seconds']:.1f} s)", soft_wrap=True)
