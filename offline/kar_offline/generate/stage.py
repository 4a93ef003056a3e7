"""Owns the stage `generate`: prompts in, knowledge records with their provenance out.

Answers of a language model are paid for once: each is appended to a journal beside the output folder as it comes,
and taken from there, or from the former output, as long as model, parameters and prompt are the same.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kar.records.v1 import records_pb2
from kar_offline.generate.model import Completion, LanguageModel
from kar_offline.generate.pack import Pack
from kar_offline.generate.records import ENTITY, KINDS, parse_record, read_knowledge, record_line, write_knowledge
from kar_offline.prompts import Prompt, read_prompts
from kar_offline.stage import StageResult, run_stage
from kar_sidecar.errors import PreconditionError

__all__ = ["generate", "utc_now"]

COLUMNS: Final = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


class _Key(NamedTuple):
    """Which question an answer belongs to."""

    entity: int
    id: str
    prompt_sha256: str


class _Answer(NamedTuple):
    """A record, whose text is empty where the model declined, and what it took."""

    record: records_pb2.KnowledgeRecord
    input_tokens: int
    output_tokens: int


def utc_now() -> datetime:
    """The time of day."""
    return datetime.now(UTC)


def generate(
    work: Path,
    source: Pack | LanguageModel,
    *,
    out: Path | None = None,
    kind: Literal["item", "user"] | None = None,
    limit: int | None = None,
    now: Callable[[], datetime] = utc_now,
    console: Console | None = None,
) -> StageResult:
    """Run the stage `generate`: answer the prompts of `work`/prompts.

    Args:
        work: The work folder.
        source: Who answers: released knowledge, or a language model.
        out: The folder for the records; default: `work`/knowledge.
        kind: Only prompts about items, or about users; default: both.
        limit: Only so many prompts, from the first.
        now: Tells when a text was written.
        console: Where progress is shown; default: nowhere.

    Raises:
        PreconditionError: there are no prompts.
        IntegrityError: a pack does not belong to the prompts.
        UnavailableError: a language model stopped answering; the next run goes on where this one ended.
        InputError: an endpoint refuses the requests.
    """
    out = out or work / "knowledge"
    prompts = [prompt for prompt in read_prompts(work / "prompts") if kind in (None, prompt.entity)][:limit]
    journal = out.parent / f".{out.name}.journal.jsonl"

    def from_pack(pack: Pack, folder: Path) -> dict[str, Any]:
        records = pack.records(prompts)
        write_knowledge(folder, records)
        return _report(f"pack {pack.name}", records, {}, 0.0)

    def from_model(model: LanguageModel, folder: Path) -> dict[str, Any]:
        answered = _read_journal(journal, model.provenance)
        former = {key: record for key, record in _former(out, model.provenance) if key not in answered}
        missing = [prompt for prompt in prompts if _key(prompt) not in answered and _key(prompt) not in former]
        if missing:
            asyncio.run(_ask(model, missing, journal, answered, now, console))
        found = (answered[key].record if (key := _key(p)) in answered else former[key] for p in prompts)
        records = [record for record in found if record.text]
        write_knowledge(folder, records)
        tokens = (sum(a.input_tokens for a in answered.values()), sum(a.output_tokens for a in answered.values()))
        return _report(model.provenance, records, answered, model.cost_usd(*tokens))

    def build(folder: Path) -> Mapping[str, Any]:
        return from_pack(source, folder) if isinstance(source, Pack) else from_model(source, folder)

    identity = source.sha256 if isinstance(source, Pack) else source.provenance
    params = {"source": identity, "kind": kind, "limit": limit}
    inputs = {"prompts": work / "prompts"}
    result = run_stage("generate", out, build, inputs=inputs, params=params, version=2)
    journal.unlink(missing_ok=True)
    return result


def _report(
    source: str,
    records: Sequence[records_pb2.KnowledgeRecord],
    answered: Mapping[_Key, _Answer],
    cost_usd: float | None,
) -> dict[str, Any]:
    return {
        "source": source,
        "records": len(records),
        "kinds": {kind: sum(record.entity == ENTITY[kind] for record in records) for kind in KINDS},
        "calls": len(answered),
        "input_tokens": sum(answer.input_tokens for answer in answered.values()),
        "output_tokens": sum(answer.output_tokens for answer in answered.values()),
        "cost_usd": cost_usd,
        "quarantined": 0,
    }


def _key(about: Prompt | records_pb2.KnowledgeRecord) -> _Key:
    entity = ENTITY[about.entity] if isinstance(about, Prompt) else about.entity
    return _Key(entity, about.id, about.prompt_sha256)


def _former(out: Path, provenance: str) -> list[tuple[_Key, records_pb2.KnowledgeRecord]]:
    try:
        records = [record for kind in KINDS for record in read_knowledge(out, kind)]
    except PreconditionError:  # absent, or damaged: then it is of no use
        return []
    return [(_key(record), record) for record in records if record.llm == provenance]


def _read_journal(path: Path, provenance: str) -> dict[_Key, _Answer]:
    """The answers of an interrupted run. A last line that a kill cut short is removed, so that appending can go on."""
    if not path.is_file():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    answers = {}
    for line in map(json.loads, whole.splitlines()):
        record = parse_record(json.dumps(line.pop("record")))
        if record.llm == provenance:
            answers[_key(record)] = _Answer(record, **line)
    return answers


async def _ask(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    journal: Path,
    answered: dict[_Key, _Answer],
    now: Callable[[], datetime],
    console: Console | None,
) -> None:
    """Answer prompts into `answered` and the journal, `model.concurrency` at once."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    waiting = iter(prompts)
    with (
        journal.open("a") as file,
        Progress(*COLUMNS, console=console, disable=console is None, transient=True) as progress,
    ):
        bar = progress.add_task("generating", total=len(prompts))

        async def answer_next() -> None:
            for prompt in waiting:
                answer = _answer(prompt, await model.complete(prompt.prompt), model.provenance, now())
                record = json.loads(record_line(answer.record))
                file.write(json.dumps({**answer._asdict(), "record": record}) + "\n")
                file.flush()
                answered[_key(prompt)] = answer
                progress.advance(bar)

        async with model:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(model.concurrency, len(prompts))):
                        group.create_task(answer_next())
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None


def _answer(prompt: Prompt, completion: Completion, provenance: str, at: datetime) -> _Answer:
    record = records_pb2.KnowledgeRecord(
        id=prompt.id,
        entity=ENTITY[prompt.entity],
        text=completion.text,
        template=prompt.template,
        prompt_sha256=prompt.prompt_sha256,
        llm=provenance,
        history_cutoff=prompt.history_cutoff,
    )
    record.created_at.FromDatetime(at)
    return _Answer(record, completion.input_tokens, completion.output_tokens)
