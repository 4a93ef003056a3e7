"""Owns the stage `generate`: prompts in; knowledge records with provenance and verdicts, and a quarantine, out."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from kar.records.v1 import records_pb2
from kar_offline.check import GATES_VERSION, FactsTable, Rules, Subject, subjects
from kar_offline.dataset.dataset import Dataset
from kar_offline.generate.batch import OpenAIBatch
from kar_offline.generate.estimate import Estimate, estimate
from kar_offline.generate.judging import gate_counts
from kar_offline.generate.ledger import Ledger
from kar_offline.generate.pack import Pack
from kar_offline.generate.progress import shown_progress
from kar_offline.generate.provider import Provider
from kar_offline.generate.report import FolderReport, RegenerationReport, RunReport
from kar_offline.generate.runner import Tally, first_questions, take_from_pack, work_through
from kar_offline.generate.sharing import Shared, Sharing, share_calls
from kar_offline.generate.task import GenerationTask
from kar_offline.generate.task_records import (
    answers_sha256,
    imputed_records,
    is_about_cluster,
    keep_record,
    task_record,
)
from kar_offline.knowledge.knowledge_folder import Knowledge, records_by_kind
from kar_offline.knowledge.records import record_line, write_knowledge, write_quarantine
from kar_offline.prompts import Prompt, RenderedPrompts, read_prompts, read_scenario
from kar_offline.prompts.scenario import Scenario
from kar_offline.stage_runner import StageResult, run_stage
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import EntityKind

__all__ = ["estimate_run", "generate", "generation_tasks", "regenerate", "utc_now"]

VERSION = 3


def utc_now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def generation_tasks(
    work: WorkFolder,
    kind: EntityKind | None,
    limit: int | None,
    facts: FactsTable | None,
    sharing: Sharing | None,
    on: date,
) -> tuple[list[GenerationTask], Shared | None]:
    """The tasks of a work folder's prompts, and how entities share calls.

    Raises:
        PreconditionError: there are no prompts, or not the dataset that they belong to.
    """
    prompts = [prompt for prompt in read_prompts(work.prompts) if kind in (None, prompt.entity)][:limit]
    shared = share_calls(work, prompts, sharing, on) if sharing else None
    task_of = _task_maker(work, read_scenario(work.prompts), facts)
    return [task_of(prompt) for prompt in ([*shared.own, *shared.clusters] if shared else prompts)], shared


def _task_maker(work: WorkFolder, scenario: Scenario, facts: FactsTable | None) -> Callable[[Prompt], GenerationTask]:
    """Makes the task of a prompt, with the facts about its entity and the rules for its text."""
    known_subjects = subjects(work.read(Dataset), scenario, facts)
    rules = {kind: Rules.of(scenario, kind) for kind in EntityKind}

    def task_of(prompt: Prompt) -> GenerationTask:
        key = prompt.entity, prompt.id
        # There are no facts about a cluster that a text could contradict.
        subject = Subject(*key) if is_about_cluster(prompt) else known_subjects[key]
        return GenerationTask(prompt, subject, rules[prompt.entity])

    return task_of


def generate(
    work: WorkFolder,
    provider: Provider,
    *,
    out: Path | None = None,
    kind: EntityKind | None = None,
    limit: int | None = None,
    facts: FactsTable | None = None,
    sharing: Sharing | None = None,
    retries: int | None = None,
    budget_usd: float | None = None,
    now: Callable[[], datetime] = utc_now,
    console: Console | None = None,
) -> StageResult:
    """Run the stage `generate`: have the prompts of `work`/prompts answered, judge the answers, write the records.

    The answers of a language model are kept in `work`'s ledger and never asked for twice. The folder is written anew if
    answers, gates or facts changed.

    Args:
        work: The work folder.
        provider: Answers the prompts: a language model, or a pack of released texts.
        out: The folder for the records; default: `work`/knowledge.
        kind: Only prompts about items, or about users; default: both.
        limit: Only the first prompts, up to this number.
        facts: Facts about items beside the dataset, with which the gate `facts` compares texts.
        sharing: How entities share calls; None: each has its own prompt.
        retries: How often to ask again for an answer that a gate refuses; default: as the scenario says.
        budget_usd: Highest cost of this run, in US dollars; None: no limit.
        now: Returns the time.
        console: Where progress is shown; default: nowhere.

    Returns:
        The result. Its report has the fields of `FolderReport` and `RunReport`, and `uncertain`: the number of
        questions that were under way when a run was killed.

    Raises:
        PreconditionError: there are no prompts, or another process generates for this work folder.
        IntegrityError: a pack does not belong to the prompts, or the ledger is damaged.
        UnavailableError: a language model stopped answering; the next run goes on where this one ended.
        InputError: an endpoint refuses the requests.
    """
    tasks, shared = generation_tasks(work, kind, limit, facts, sharing, now().date())
    answering = _answer(work, tasks, provider, retries, budget_usd, None, now, console)

    def build(folder: Path) -> Mapping[str, Any]:
        judged = _judged(tasks, provider.provenance)
        records = [record for task, record in judged.in_use if not is_about_cluster(task.prompt)]
        clusters = [record for task, record in judged.in_use if is_about_cluster(task.prompt)]
        imputed = imputed_records(shared.neighbours, records, clusters, provider.provenance) if shared else []
        write_knowledge(folder, [*records, *imputed], clusters)
        write_quarantine(folder, judged.refused)
        answered = [*(record for _, record in judged.in_use), *judged.refused]
        report = FolderReport(
            source=f"pack {provider.model}" if isinstance(provider, Pack) else provider.provenance,
            records=len(answered),
            kinds={kind: sum(record.entity == kind.number for record in answered) for kind in EntityKind},
            clusters=len(clusters),
            lent=len(imputed),
            quarantined=len(judged.refused),
            unanswered=len(tasks) - len(answered),
            gates=gate_counts(tasks),
        )
        return asdict(report)

    params = {
        "source": provider.provenance,
        "kind": kind,
        "limit": limit,
        "gates": GATES_VERSION,
        "share": sharing and [sharing.share, sharing.encoder.encoder_id],
        "answers": answers_sha256(tasks),
    }
    inputs = {"prompts": work.prompts}
    result = run_stage("generate", out or work.knowledge, build, inputs=inputs, params=params, version=VERSION)
    result.report.update(**asdict(answering.report), uncertain=answering.uncertain)
    return result


def regenerate(
    work: WorkFolder,
    provider: Provider,
    chosen: Sequence[tuple[EntityKind, str]],
    *,
    facts: FactsTable | None = None,
    retries: int | None = None,
    budget_usd: float | None = None,
    budget_calls: int | None = None,
    now: Callable[[], datetime] = utc_now,
    console: Console | None = None,
) -> StageResult:
    """Have texts about some entities of `work`/knowledge written again; every other record stays as it is.

    An entity keeps its record if its new text is refused or missing.

    Args:
        work: The work folder.
        provider: Answers the prompts.
        chosen: Kind and id of each entity, in the order to ask in.
        facts: As for `generate`.
        retries: As for `generate`.
        budget_usd: As for `generate`.
        budget_calls: Largest number of questions that may be sent; None: no limit.
        now: Returns the time.
        console: Where progress is shown; default: nowhere.

    Returns:
        The result. Its report has the fields of `RegenerationReport` and `RunReport`.

    Raises:
        PreconditionError: there are no prompts or no knowledge, or another process generates for this work folder.
        IntegrityError: a pack does not belong to the prompts, or the ledger is damaged.
        UnavailableError: a language model stopped answering; the next run goes on where this one ended.
        InputError: an endpoint refuses the requests.
    """
    folder = work.knowledge
    rendered, knowledge = work.read(RenderedPrompts), work.read(Knowledge)
    prompts = {(prompt.entity, prompt.id): prompt for prompt in rendered.prompts}
    task_of = _task_maker(work, rendered.scenario, facts)
    former = {(kind, id_): record for kind, records in knowledge.records.items() for id_, record in records.items()}
    tasks = [task_of(prompts[key]) for key in chosen]
    being_written = set(chosen)
    existing = [
        keep_record(task_of(prompts[key]), record)
        for key, record in former.items()
        if record.text and key in prompts and key not in being_written
    ]
    answering = _answer(work, tasks, provider, retries, budget_usd, budget_calls, now, console, existing)

    judged = _judged(tasks, provider.provenance)
    written = {(task.prompt.entity, task.prompt.id): record for task, record in judged.in_use}
    # In the order of the prompts, as `generate` writes them.
    records = [record for key in prompts if (record := written.get(key) or former.get(key))]
    records += [record for key, record in former.items() if key not in prompts]
    answered = {(record.entity, record.id) for record in (*written.values(), *judged.refused)}
    quarantined = [old for old in knowledge.quarantine if (old.entity, old.id) not in answered] + judged.refused
    clusters = [cluster for by_id in knowledge.clusters.values() for cluster in by_id.values()]

    def build(draft: Path) -> Mapping[str, Any]:
        write_knowledge(draft, records, clusters)
        write_quarantine(draft, quarantined)
        return {"records": len(records) + len(quarantined), "quarantined": len(quarantined), "clusters": len(clusters)}

    digest = hashlib.sha256("".join(map(record_line, (*records, *quarantined))).encode()).hexdigest()
    inputs = {"prompts": work.prompts}
    result = run_stage("generate", folder, build, inputs=inputs, params={"refreshed": digest}, version=VERSION)
    if result.ran:
        work.keep(Knowledge(records_by_kind(records), knowledge.clusters, quarantined))
    report = RegenerationReport(
        written=sum(former.get(key) != record for key, record in written.items()),
        refused=len(judged.refused),
        unanswered=len(tasks) - len(written) - len(judged.refused),
        gates=gate_counts(tasks),
    )
    result.report.update(**asdict(report), **asdict(answering.report))
    return result


def estimate_run(
    work: WorkFolder,
    provider: Provider,
    *,
    kind: EntityKind | None = None,
    limit: int | None = None,
    sharing: Sharing | None = None,
    now: Callable[[], datetime] = utc_now,
) -> Estimate:
    """Calls, tokens and cost that `generate` would need with these arguments; nothing is sent. Errors as for it."""
    tasks, _ = generation_tasks(work, kind, limit, None, sharing, now().date())
    if isinstance(provider, Pack):
        return Estimate(0, 0, 0, 0.0, 0.0, True)
    if not work.ledger.is_file():
        return estimate(first_questions(tasks, {}, now()), tasks, provider, {})
    with Ledger.read(work) as ledger:
        questions = first_questions(tasks, ledger.cached_answers(provider.provenance), now())
        return estimate(questions, tasks, provider, ledger.usage(provider.provenance))


class _Answering(NamedTuple):
    """The result of a run of tasks."""

    report: RunReport
    uncertain: int
    """Questions that were under way when a run was killed."""


def _answer(
    work: WorkFolder,
    tasks: Sequence[GenerationTask],
    provider: Provider,
    retries: int | None,
    budget_usd: float | None,
    budget_calls: int | None,
    now: Callable[[], datetime],
    console: Console | None,
    existing: Sequence[GenerationTask] = (),
) -> _Answering:
    """Have tasks answered and judged, by a pack or by a language model with the ledger of `work`."""
    if isinstance(provider, Pack):
        asyncio.run(take_from_pack(tasks, provider, now(), existing=existing))
        return _Answering(RunReport.of(Tally()), 0)
    if retries is None:
        retries = work.read(RenderedPrompts).scenario.limits.retries
    with Ledger.open(work, now) as ledger, shown_progress(console) as progress:
        if isinstance(provider, OpenAIBatch):
            provider.on_poll = progress.on_poll
        tally = asyncio.run(
            work_through(
                tasks,
                provider,
                ledger,
                retries=retries,
                budget_usd=budget_usd,
                budget_calls=budget_calls,
                existing=existing,
                on_round=progress.on_round,
                on_answer=progress.on_answer,
            )
        )
        return _Answering(RunReport.of(tally), ledger.uncertain())


class _Judged(NamedTuple):
    """The records of the tasks that have an answer."""

    in_use: list[tuple[GenerationTask, records_pb2.KnowledgeRecord]]
    refused: list[records_pb2.KnowledgeRecord]


def _judged(tasks: Sequence[GenerationTask], provenance: str) -> _Judged:
    answered = [(task, record) for task in tasks if (record := task_record(task, provenance))]
    in_use = [(task, record) for task, record in answered if not task.last.refused_by]
    return _Judged(in_use, [record for task, record in answered if task.last.refused_by])
