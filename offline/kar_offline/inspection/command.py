"""Owns `kar knowledge`: a text about one entity with its verdicts, the freshness of all texts, and their cost."""

import json
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import numpy as np
import typer
from google.protobuf import json_format
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kar.records.v1 import records_pb2
from kar_offline.cli_options import (
    DEFAULT_WORK,
    ConfigFile,
    JsonFile,
    OptionalWork,
    Work,
    once,
    refuse_unknown,
    write_json,
)
from kar_offline.dataset.dataset import Dataset
from kar_offline.generate.ledger import COLUMNS, Ledger, Spending
from kar_offline.inspection.freshness import TextStatus, served_status, text_status
from kar_offline.knowledge.records import read_knowledge, read_quarantine
from kar_offline.prompts import Prompt, read_prompts
from kar_offline.refresh.policy import Policy
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import NotFoundError
from kar_sidecar.releases.manifest import Release, read_active
from kar_sidecar.settings import Settings
from kar_sidecar.store.open import open_store

__all__ = ["knowledge"]

knowledge = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Inspect knowledge: a text with its verdicts, the freshness of texts and vectors, and costs.",
)
OUTCOME: Final = {
    records_pb2.OUTCOME_PASSED: Text("passed", "green"),
    records_pb2.OUTCOME_FAILED: Text("failed", "bold red"),
    records_pb2.OUTCOME_UNKNOWN: Text("cannot tell", "yellow"),
}


@knowledge.command()
def show(
    kind: Annotated[EntityKind, typer.Argument(help="item or user.")],
    entity_id: Annotated[str, typer.Argument(metavar="ID", help="Id in the dataset.")],
    work: Work = DEFAULT_WORK,
    folder: Annotated[str, typer.Option("--knowledge", help="Folder in WORK that holds the records.")] = "knowledge",
    encoding: Annotated[str, typer.Option(help="Folder in WORK that holds the vectors.")] = "encoding",
    neighbours: Annotated[int, typer.Option(min=0, help="Number of nearest texts to print.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Print an entity's prompt, its text with source and verdicts, and the texts nearest to it."""
    console = Console()
    records = {record.id: record for record in read_knowledge(work.root / folder, kind)}
    refused = {record.id: record for record in read_quarantine(work.root / folder) if record.entity == kind.number}
    record = records.get(entity_id) or refused.get(entity_id)
    prompt = next((p for p in read_prompts(work.prompts) if (p.entity, p.id) == (kind, entity_id)), None)
    if record is None and prompt is None:
        raise NotFoundError(f"{work} has no {kind} {entity_id!r}: name one in its dataset")
    if prompt is not None:
        console.print(Panel(Text(prompt.prompt), title=f"prompt · {prompt.template}"))
    if record is None:
        console.print(f"[yellow]There is no text about {kind} {entity_id}: its vector is imputed if it has facts.")
        return
    quarantined = entity_id in refused
    style, state = ("bold red", "quarantined, not used") if quarantined else ("green", "in use")
    if record.text:
        console.print(Panel(Text(record.text), title=f"text · {state}", border_style=style))
    console.print(_provenance(record, prompt))
    if record.verdicts:
        console.print(_verdicts(record))
    nearest = [] if quarantined else _neighbours(work, encoding, kind, entity_id, neighbours)
    if nearest:
        table = Table("nearest", "cosine", "text", title=f"{kind}s with the nearest texts")
        for other, cosine in nearest:
            text = records[other].text if other in records else ""
            table.add_row(other, f"{cosine:.3f}", Text(text[:90] + ("…" if len(text) > 90 else "")))
        console.print(table)
    write_json(
        json_file,
        {
            "prompt": prompt and prompt.prompt,
            "quarantined": quarantined,
            "record": json.loads(json_format.MessageToJson(record, preserving_proto_field_name=True)),
            "neighbours": [{"id": other, "cosine": cosine} for other, cosine in nearest],
        },
    )


def _provenance(record: records_pb2.KnowledgeRecord, prompt: Prompt | None) -> Table:
    table = Table(show_header=False, box=None)
    table.add_row("written by", record.llm)
    table.add_row("template", record.template)
    prompt_cell = record.prompt_sha256[:12]
    if record.retries:
        prompt_cell += f", which names the faults of {record.retries} earlier answer{'s' * (record.retries > 1)}"
    elif prompt and record.prompt_sha256 not in ("unknown", prompt.prompt_sha256):
        prompt_cell += ", not the prompt above, which has changed since"
    table.add_row("prompt", prompt_cell)
    if record.entity == records_pb2.ENTITY_KIND_USER:
        table.add_row("written from", f"the first {record.history_cutoff} interactions")
    for name, value in sorted(record.context.items()):
        table.add_row(name, value)
    for name in ("created_at", "expires_at"):
        if record.HasField(name):
            table.add_row(name.replace("_at", ""), f"{getattr(record, name).ToDatetime():%Y-%m-%d %H:%M} UTC")
    if record.confidence:
        table.add_row("its writer's confidence", record.confidence)
    for neighbour in record.loans:
        table.add_row("imputed from", f"{neighbour.id}, {neighbour.weight:.0%}")
    return table


def _verdicts(record: records_pb2.KnowledgeRecord) -> Table:
    table = Table("gate", "verdict", "why")
    for verdict in record.verdicts:
        table.add_row(verdict.gate, OUTCOME.get(verdict.outcome, Text("not set")), Text(verdict.reason))
    return table


def _neighbours(
    work: WorkFolder, encoding: str, kind: EntityKind, entity_id: str, number: int
) -> list[tuple[str, float]]:
    """The entities whose text vectors have the largest cosine with this entity's; empty if nothing is encoded."""
    path = work.root / encoding / f"knowledge_{kind}.npy"
    if not (path.is_file() and number):
        return []
    header: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    ids = header["ids"]
    vectors = np.load(path, mmap_mode="r")
    if entity_id not in ids or not header["text_sha256"][ids.index(entity_id)]:
        return []
    row = ids.index(entity_id)
    cosine = vectors @ vectors[row]
    imputed = set(header.get("lent", ()))
    texts = enumerate(zip(ids, header["text_sha256"], strict=True))
    cosine[[other for other, (id_, digest) in texts if not digest or id_ in imputed]] = -np.inf
    cosine[row] = -np.inf
    nearest = np.argsort(-cosine)[:number]
    return [(ids[other], float(cosine[other])) for other in nearest if np.isfinite(cosine[other])]


@knowledge.command()
def costs(
    work: Work = DEFAULT_WORK,
    by: Annotated[
        list[str] | None,
        typer.Option(help=f"Columns to group by, repeatable: {', '.join(COLUMNS)}; default: model and template."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Print the calls of language models for this work folder, and their cost."""
    columns = once(by) or ["model", "template"]
    refuse_unknown("--by", columns, COLUMNS)
    with Ledger.read(work) as ledger:
        rows, total = ledger.costs(columns), ledger.costs([])  # type: ignore[arg-type]  # checked just above
    console = Console()
    table = Table(title=f"language model calls of {work}", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(", ".join(columns), min_width=12, overflow="fold")
    for name in ("calls", "failed", "unsure", "read", "written", "USD", "at most", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(", ".join(row.group), *_cells(row))
    table.add_section()
    for row in total:
        table.add_row("all", *_cells(row))
    console.print(table)
    if any(row.uncertain or row.risk_usd for row in total):
        console.print(
            "unsure: questions under way when a run was killed. The provider may have charged for them, and for "
            "attempts that ended without an answer; `at most` includes the most that these can have cost"
        )
    groups = [{**dict(zip(columns, row.group, strict=True)), **_numbers(row)} for row in rows]
    write_json(json_file, {"groups": groups, "all": next(map(_numbers, total), {})})


def _cells(row: Spending) -> list[str]:
    cost = "unknown" if row.cost_usd is None else f"{row.cost_usd:.4f}"
    highest_cost = "unknown" if row.cost_usd is None else f"{row.cost_usd + row.risk_usd:.4f}"
    counts = (row.calls, row.failed, row.uncertain, row.input_tokens, row.output_tokens)
    latency = "" if row.latency_ms is None else f"{row.latency_ms:,.0f}"
    return [*(f"{count:,}" for count in counts), cost, highest_cost, latency]


def _numbers(row: Spending) -> dict[str, Any]:
    return {name: value for name, value in row._asdict().items() if name != "group"}


@knowledge.command()
def status(
    work: OptionalWork = None,
    store: Annotated[
        str | None,
        typer.Option(help="A store whose vectors are counted, too; default: lmdb:WORK/store, if it exists."),
    ] = None,
    release: Annotated[str | None, typer.Option(help="The release that is served; default: the active one.")] = None,
    grown_by: Annotated[
        int, typer.Option(min=1, help="A user's text is due after this number of events.")
    ] = Policy().grown_by,
    config: ConfigFile = None,
    json_file: JsonFile = None,
) -> None:
    """Print how many entities have texts, the age of the texts, which are due, and the age of the vectors served."""
    console = Console()
    now = datetime.now(UTC)
    settings = Settings.read(config, work=work and work.root, store=store)
    folder, url = WorkFolder(settings.work), settings.store
    texts = text_status(folder, Policy(grown_by), now)
    table = Table("", "items", "users", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    _section(table, "texts", *(_counts(texts[kind]) for kind in EntityKind))
    _section(table, "days since they were written", *(texts[kind].age_days for kind in EntityKind))
    _section(table, "events since they were written", {}, texts[USER].events_since or {})
    served_json: dict[str, Any] | None = None
    if url != f"lmdb:{folder.store}" or folder.store.is_dir():
        served_release = Release.load(folder.releases, release or read_active(folder.releases), verify=False)
        with closing(open_store(url, aerospike=settings.aerospike, readonly=True)) as opened:
            served = served_status(folder.read(Dataset), served_release, opened, round(now.timestamp() * 1000))
        _section(
            table, f"vectors of release {served_release.release_id}", *(served[kind].levels for kind in EntityKind)
        )
        _section(table, "days since they were written", *(served[kind].age_days for kind in EntityKind))
        console.print(f"vectors are those in {url}: {served[ITEM].vectors} of items, {served[USER].vectors} of users")
        served_json = {"release_id": served_release.release_id} | {kind.value: served[kind] for kind in EntityKind}
    console.print(table)
    write_json(json_file, {"texts": {kind: texts[kind].as_json() for kind in texts}, "served": served_json})


def _counts(texts: TextStatus) -> dict[str, int]:
    """The counts of one kind by their names in the table."""
    counts = {
        "entities": texts.entities,
        "own text": texts.own_text,
        "imputed": texts.lent,
        "none": texts.none,
        "expired": texts.expired,
    }
    return counts | {f"due: {reason}": count for reason, count in texts.due.items()}


def _section(table: Table, title: str, items: Mapping[str, int], users: Mapping[str, int]) -> None:
    """Add counts of both kinds by name; the cell of a kind without a count stays empty."""
    table.add_section()
    table.add_row(Text(title, "bold"))
    for name in users:
        table.add_row(f"  {name}", *(f"{counts[name]:,}" if name in counts else "" for counts in (items, users)))
