"""Owns the stage `generate`: prompts in; knowledge records with provenance and verdicts, and a quarantine, out."""

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kar.records.v1 import records_pb2
from kar_offline.check import GATES_VERSION, FactsTable, Rules, Subject, subjects
from kar_offline.dataset.dataset import Dataset
from kar_offline.generate.batch import OpenAIBatch
from kar_offline.generate.collective import CLUSTER_PREFIX
from kar_offline.generate.estimate import Estimate, estimate
from kar_offline.generate.ledger import CachedAnswer, Ledger
from kar_offline.generate.pack import Pack
from kar_offline.generate.provider import Provider, Reply
from kar_offline.generate.runner import (
    GenerationTask,
    Tally,
    first_questions,
    gate_counts,
    take_from_pack,
    work_through,
)
from kar_offline.generate.sharing import Shared, Sharing, share_calls
from kar_offline.knowledge.records import (
    read_clusters,
    read_knowledge,
    read_quarantine,
    record_line,
    write_knowledge,
    write_quarantine,
)
from kar_offline.prompts import Prompt, read_prompts, read_scenario
from kar_offline.prompts.scenario import Scenario
from kar_offline.stage_runner import StageResult, run_stage
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import EntityKind

__all__ = ["cases_of", "estimate_run", "generate", "regenerate", "utc_now"]

COLUMNS: Final = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[spent]}"),
)
UNKNOWN: Final = "unknown"


def utc_now() -> datetime:
    """The time of day."""
    return datetime.now(UTC)


def cases_of(
    work: WorkFolder,
    kind: EntityKind | None,
    limit: int | None,
    facts: FactsTable | None,
    sharing: Sharing | None,
    on: date,
) -> tuple[list[GenerationTask], Shared | None]:
    """What is to be written about `work`'s dataset, with what its texts are judged by, and how calls are shared.

    Raises:
        PreconditionError: there are no prompts, or no dataset that they belong to.
    """
    scenario = read_scenario(work.prompts)
    prompts = [prompt for prompt in read_prompts(work.prompts) if kind in (None, prompt.entity)][:limit]
    shared = share_calls(work, prompts, sharing, on) if sharing else None
    case_of = _judged(work, scenario, facts)
    return [case_of(prompt) for prompt in ([*shared.own, *shared.clusters] if shared else prompts)], shared


def _judged(work: WorkFolder, scenario: Scenario, facts: FactsTable | None) -> Callable[[Prompt], GenerationTask]:
    """Makes the case of a prompt, with what is known of its entity and what its texts must keep to."""
    known = subjects(work.read(Dataset), scenario, facts)
    rules = {kind: Rules.of(scenario, kind) for kind in EntityKind}

    def case_of(prompt: Prompt) -> GenerationTask:
        # Nothing is known of a cluster that a text about it could contradict.
        of_cluster = prompt.id.startswith(CLUSTER_PREFIX)
        subject = Subject(prompt.entity, prompt.id) if of_cluster else known[prompt.entity, prompt.id]
        return GenerationTask(prompt, subject, rules[prompt.entity])

    return case_of


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

    What a language model answers is kept in `work`'s ledger and never asked for twice. The folder is written anew
    where answers, gates or facts changed.

    Args:
        work: The work folder.
        provider: Who answers: a language model, or released knowledge.
        out: The folder for the records; default: `work`/knowledge.
        kind: Only prompts about items, or about users; default: both.
        limit: Only so many prompts, from the first.
        facts: What is known of items beside the dataset; the gate `facts` compares texts with it.
        sharing: How entities share calls; None: each is asked about by itself.
        retries: How often to ask again for an answer that fails a gate; default: what the scenario says.
        budget_usd: The most that this run may cost; None: any amount.
        now: Tells the time.
        console: Where progress is shown; default: nowhere.

    Returns:
        The result. Its report tells of the folder (completed `records`, by `kinds`, `quarantined` of them, `clusters`
        whose texts are lent to `lent` entities, `unanswered` questions, `gates`: refusals by gate) and of this run
        (`calls`, `requests`, tokens, `cost_usd`, `stopped`).

    Raises:
        PreconditionError: there are no prompts, or another process generates for this work folder.
        IntegrityError: a pack does not belong to the prompts, or the ledger is damaged.
        UnavailableError: a language model stopped answering; the next run goes on where this one ended.
        InputError: an endpoint refuses the requests.
    """
    cases, shared = cases_of(work, kind, limit, facts, sharing, now().date())
    out = out or work.knowledge
    uncertain, tally = 0, Tally()
    if isinstance(provider, Pack):
        asyncio.run(take_from_pack(cases, provider, now()))
    else:
        if retries is None:
            retries = read_scenario(work.prompts).limits.retries
        with Ledger.open(work, now) as ledger:
            tally = _work_through(cases, provider, ledger, retries, budget_usd, console)
            uncertain = ledger.uncertain()

    def build(folder: Path) -> Mapping[str, Any]:
        made = [(case, record) for case in cases if (record := _record(case, provider.provenance))]
        kept = [(case, record) for case, record in made if not case.last.refused_by]
        records = [record for case, record in kept if not _is_cluster(case)]
        clusters = [record for case, record in kept if _is_cluster(case)]
        borrowers = _borrowers(shared, records, clusters, provider.provenance) if shared else []
        write_knowledge(folder, [*records, *borrowers], clusters)
        write_quarantine(folder, [record for case, record in made if case.last.refused_by])
        return {
            "source": f"pack {provider.model}" if isinstance(provider, Pack) else provider.provenance,
            "records": len(made),
            "kinds": {kind: sum(record.entity == kind.number for _, record in made) for kind in EntityKind},
            "clusters": len(clusters),
            "lent": len(borrowers),
            "quarantined": len(made) - len(kept),
            "unanswered": len(cases) - len(made),
            "gates": gate_counts(cases),
        }

    params = {
        "source": provider.provenance,
        "kind": kind,
        "limit": limit,
        "gates": GATES_VERSION,
        "share": sharing and [sharing.share, sharing.encoder.encoder_id],
        "answers": _digest(cases),
    }
    result = run_stage("generate", out, build, inputs={"prompts": work.prompts}, params=params, version=3)
    result.report.update(
        **_spent(tally),
        uncertain=uncertain,
    )
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
    """Have some entities of `work`/knowledge written about anew; every other record stays as it is.

    An entity whose new text is refused, or does not come, keeps the record that it has.

    Args:
        work: The work folder.
        provider: Who answers.
        chosen: Kind and id of each entity, in the order to ask in.
        facts: As of `generate`.
        retries: As of `generate`.
        budget_usd: As of `generate`.
        budget_calls: The most questions that may leave; None: any number.
        now: Tells the time.
        console: Where progress is shown; default: nowhere.

    Returns:
        The result. Its report tells what was `written`, `refused` and left `unanswered`, the `gates`' refusals, and
        of this run `calls`, `requests`, tokens, `cost_usd` and `stopped`.

    Raises:
        PreconditionError: there are no prompts or no knowledge, or another process generates for this work folder.
        IntegrityError: a pack does not belong to the prompts, or the ledger is damaged.
        UnavailableError: a language model stopped answering; the next run goes on where this one ended.
        InputError: an endpoint refuses the requests.
    """
    folder = work.knowledge
    prompts = {(prompt.entity, prompt.id): prompt for prompt in read_prompts(work.prompts)}
    scenario = read_scenario(work.prompts)
    case_of = _judged(work, scenario, facts)
    former = {(kind, record.id): record for kind in EntityKind for record in read_knowledge(folder, kind)}
    cases = [case_of(prompts[key]) for key in chosen]
    asked = set(chosen)
    standing = [
        _standing(case_of(prompts[key]), record)
        for key, record in former.items()
        if record.text and key in prompts and key not in asked
    ]
    tally = Tally()
    if isinstance(provider, Pack):
        asyncio.run(take_from_pack(cases, provider, now(), standing=standing))
    else:
        with Ledger.open(work, now) as ledger:
            tally = _work_through(
                cases,
                provider,
                ledger,
                scenario.limits.retries if retries is None else retries,
                budget_usd,
                console,
                budget_calls=budget_calls,
                standing=standing,
            )
    made = [(case, record) for case in cases if (record := _record(case, provider.provenance))]
    written = {(case.prompt.entity, case.prompt.id): record for case, record in made if not case.last.refused_by}
    refused = [record for case, record in made if case.last.refused_by]
    # In the order of the prompts, as `generate` writes them.
    records = [found for key in prompts if (found := written.get(key) or former.get(key))]
    records += [record for key, record in former.items() if key not in prompts]
    again = {(record.entity, record.id) for _, record in made}
    quarantined = [r for r in read_quarantine(folder) if (r.entity, r.id) not in again] + refused
    clusters = [cluster for kind in EntityKind for cluster in read_clusters(folder, kind)]
    digest = hashlib.sha256("".join(map(record_line, (*records, *quarantined))).encode()).hexdigest()

    def build(draft: Path) -> Mapping[str, Any]:
        write_knowledge(draft, records, clusters)
        write_quarantine(draft, quarantined)
        return {"records": len(records) + len(quarantined), "quarantined": len(quarantined), "clusters": len(clusters)}

    inputs = {"prompts": work.prompts}
    result = run_stage("generate", folder, build, inputs=inputs, params={"refreshed": digest}, version=3)
    result.report.update(
        written=sum(former.get(key) != record for key, record in written.items()),
        refused=len(refused),
        unanswered=len(cases) - len(made),
        gates=gate_counts(cases),
        **_spent(tally),
    )
    return result


def _spent(tally: Tally) -> dict[str, Any]:
    """What a report tells of a run."""
    return {
        "calls": tally.calls,
        "requests": tally.requests,
        "input_tokens": tally.input_tokens,
        "output_tokens": tally.output_tokens,
        "cost_usd": tally.cost_usd,
        "stopped": tally.stopped,
    }


def _standing(case: GenerationTask, record: records_pb2.KnowledgeRecord) -> GenerationTask:
    """A case that is answered by a record: nobody is asked, and it only takes part in comparisons."""
    case.last.kept = CachedAnswer(Reply(record.text, 0, 0, requests=0), record.created_at.ToDatetime(UTC))
    return case


def estimate_run(
    work: WorkFolder,
    provider: Provider,
    *,
    kind: EntityKind | None = None,
    limit: int | None = None,
    sharing: Sharing | None = None,
    now: Callable[[], datetime] = utc_now,
) -> Estimate:
    """What `generate` with these arguments would take; nothing is sent. Errors as of `generate`."""
    cases, _ = cases_of(work, kind, limit, None, sharing, now().date())
    if isinstance(provider, Pack):
        return Estimate(0, 0, 0, 0.0, 0.0, True)
    if not work.ledger.is_file():
        return estimate(first_questions(cases, {}, now()), cases, provider, {})
    with Ledger.read(work) as ledger:
        questions = first_questions(cases, ledger.kept(provider.provenance), now())
        return estimate(questions, cases, provider, ledger.usage(provider.provenance))


def _work_through(
    cases: Sequence[GenerationTask],
    provider: Provider,
    ledger: Ledger,
    retries: int,
    budget_usd: float | None,
    console: Console | None,
    *,
    budget_calls: int | None = None,
    standing: Sequence[GenerationTask] = (),
) -> Tally:
    with Progress(*COLUMNS, console=console, disable=console is None, transient=True) as progress:
        bar = progress.add_task("generating", total=None, spent="")
        began = 0

        def on_round(attempt: int, questions: int) -> None:
            nonlocal began
            began = progress.tasks[0].fields.get("answered", 0)
            name = "generating" if attempt == 0 else "asking again"
            progress.update(bar, description=name, total=questions, completed=0)

        def on_answer(tally: Tally) -> None:
            spent = f"${tally.cost_usd:.4f}" if tally.cost_usd else ""
            progress.update(bar, completed=tally.answered - began, answered=tally.answered, spent=spent)

        if isinstance(provider, OpenAIBatch):
            provider.on_poll = lambda answered, under_way: progress.update(
                bar, description=f"waiting for batches ({answered:,} of {under_way:,} answered)"
            )
        return asyncio.run(
            work_through(
                cases,
                provider,
                ledger,
                retries=retries,
                budget_usd=budget_usd,
                budget_calls=budget_calls,
                standing=standing,
                on_round=on_round,
                on_answer=on_answer,
            )
        )


def _digest(cases: Sequence[GenerationTask]) -> str:
    """Content hash of the answers that count and of what the gates found."""
    digest = hashlib.sha256()
    for case in cases:
        kept, found = case.last.kept, [[v.gate, v.outcome, v.reason] for v in case.last.verdicts]
        # When a pack was read does not matter; when a model answered becomes part of the record.
        at = kept.at.isoformat() if kept and not (isinstance(kept.outcome, Reply) and kept.outcome.origin) else None
        outcome = kept and kept.outcome._asdict()
        line = json.dumps([case.prompt.entity, case.prompt.id, outcome, at, found], default=str)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _record(case: GenerationTask, provenance: str) -> records_pb2.KnowledgeRecord | None:
    """The record of a case; None where there is no answer yet."""
    prompt, last = case.prompt, case.last
    if last.kept is None:
        return None
    outcome, at = last.kept
    record = records_pb2.KnowledgeRecord(
        id=prompt.id,
        entity=prompt.entity.number,
        text=last.text,
        template=prompt.template,
        prompt_sha256=last.question.prompt_sha256,
        llm=provenance,
        history_cutoff=prompt.history_cutoff,
        context=prompt.context,
        verdicts=last.verdicts,
        retries=len(case.attempts) - 1,
    )
    origin = outcome.origin if isinstance(outcome, Reply) else None
    if origin is None:
        record.created_at.FromDatetime(at)
        if expires_at := _expiry(prompt, at):
            record.expires_at.FromDatetime(expires_at)
    else:  # written for another prompt, some time: what it was told and how long it holds is not known
        record.template, record.llm, record.confidence = origin.template, origin.llm, origin.confidence
        record.prompt_sha256 = UNKNOWN
        record.ClearField("context")
        if origin.created_at:
            record.created_at.FromDatetime(origin.created_at)
    return record


def _is_cluster(case: GenerationTask) -> bool:
    return case.prompt.id.startswith(CLUSTER_PREFIX)


def _borrowers(
    shared: Shared,
    records: Sequence[records_pb2.KnowledgeRecord],
    clusters: Sequence[records_pb2.KnowledgeRecord],
    provenance: str,
) -> list[records_pb2.KnowledgeRecord]:
    """A record for each entity that has no text of its own in use, but somebody's to borrow."""
    own = {(record.entity, record.id) for record in records}
    lenders = {(record.entity, record.id) for record in (*records, *clusters)}
    found = []
    for (kind, id_), loans in shared.neighbours.items():
        entity = kind.number
        usable = [loan for loan in loans if (entity, loan.id) in lenders]
        if (entity, id_) not in own and usable:
            total = sum(loan.weight for loan in usable)
            rest = [records_pb2.Loan(id=loan.id, weight=loan.weight / total) for loan in usable]
            found.append(records_pb2.KnowledgeRecord(id=id_, entity=entity, llm=provenance, loans=rest))
    return found


def _expiry(prompt: Prompt, at: datetime) -> datetime | None:
    """When a text stops being true: by its age or with its season, whichever is earlier."""
    ends = []
    if prompt.expires_after_days is not None:
        ends.append(at + timedelta(days=prompt.expires_after_days))
    if prompt.expires_on is not None:
        ends.append(datetime.fromisoformat(prompt.expires_on).replace(tzinfo=UTC) + timedelta(days=1))
    return min(ends, default=None)
