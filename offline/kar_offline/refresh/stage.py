"""Owns one refresh: what is new into the work folder, what is due written anew, what is fresh into the store.

Every step is a function of what lies in the work folder and the store, and a step that is done is passed over: a
refresh that was killed is completed by running it again with the same files. Cut-offs move before a text is asked
for, so that no kill leaves a text that knows a sample.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from kar_offline.check import FactsTable, Rules, Subject
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.stage import extend_dataset
from kar_offline.encode.stage import encode
from kar_offline.encoders.text_encoder import TextEncoder
from kar_offline.generate.estimate import estimate
from kar_offline.generate.ledger import Ledger, Usage
from kar_offline.generate.pack import Pack
from kar_offline.generate.provider import CachedAnswer, Provider
from kar_offline.generate.runner import first_questions
from kar_offline.generate.stage import regenerate, utc_now
from kar_offline.generate.task import GenerationTask
from kar_offline.prompts import Renderer, read_renderer, render_again
from kar_offline.publish.knowledge_update import check_published, publish_knowledge
from kar_offline.refresh.ingest import read_arrivals
from kar_offline.refresh.knowledge_state import Records, read_records, states
from kar_offline.refresh.policy import Policy, Reason, RefreshCandidate, due, most_valuable
from kar_offline.stage_runner import settle
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import PreconditionError
from kar_sidecar.lock import held
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import Store

__all__ = ["Budget", "Plan", "kinds_read", "plan", "refresh"]

SHOWN: Final = 20
"""Entities that wait and are named in a report, the most valuable first."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that one refresh may ask for and cost; None: any amount."""

    calls: int | None = None
    usd: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a refresh would have written anew, most valuable first."""

    due: Sequence[RefreshCandidate]
    chosen: Sequence[RefreshCandidate]
    waiting: Sequence[RefreshCandidate]
    """For want of budget, or since the provider has nothing new to say."""
    calls: int
    """Questions that have no answer in the ledger."""
    cost_usd: float | None
    """What they are expected to cost; None: the price is not known."""


def kinds_read(release: Release) -> frozenset[str]:
    """Kinds of entities whose vectors a release's model reads: texts about others change no score."""
    items = {ITEM} if release.affinity else set()
    return frozenset({*release.towers, *items})


def plan(
    work: WorkFolder,
    dataset: Dataset,
    records: Records,
    renderer: Renderer,
    provider: Provider,
    *,
    policy: Policy,
    budget: Budget,
    now: datetime,
) -> Plan:
    """Choose what to write anew; nothing is sent.

    What the ledger or a pack answers costs nothing and is always chosen.

    Args:
        work: Holds the ledger, if there is one.
        dataset: With all events until now.
        records: What is in use.
        renderer: Renders the prompts.
        provider: Who would answer.
        policy: What is due.
        budget: What may be asked.
        now: The time.
    """
    found = due(states(dataset, records, renderer, now), policy)
    row_of = {(USER, user.id): row for row, user in enumerate(dataset.users)} | {
        (ITEM, item.id): row for row, item in enumerate(dataset.items)
    }
    users = np.array([row_of[USER, one.id] for one in found if one.kind == USER], np.int64)
    whole = dataset.advanced(users)
    kept, usage = _answers(work, provider)
    free: list[RefreshCandidate] = []
    asked: list[RefreshCandidate] = []
    silent: list[RefreshCandidate] = []
    costs: dict[RefreshCandidate, float | None] = {}
    for one in found:
        kind = EntityKind(one.kind)
        row = row_of[kind, one.id]
        prompt = renderer.about_user(whole, row) if kind == USER else renderer.factual(whole.items[row])
        if isinstance(provider, Pack):
            record = records[kind].get(one.id)
            text = provider.text(kind, one.id, prompt.history_cutoff)
            (free if text and (record is None or record.text != text) else silent).append(one)
            continue
        case = GenerationTask(prompt, Subject(kind, one.id), Rules.of(renderer.scenario, kind))
        questions = first_questions([case], kept, now)
        if questions:
            costs[one] = estimate(questions, [case], provider, usage).cost_usd
            asked.append(one)
        else:
            free.append(one)
    bought, waiting = most_valuable(asked, budget.calls)
    if budget.usd is not None:
        spent = np.cumsum([costs[one] or 0.0 for one in bought])
        affordable = int(np.searchsorted(spent, budget.usd, side="right"))
        bought, waiting = bought[:affordable], [*bought[affordable:], *waiting]
    chosen, left = set(free) | set(bought), set(waiting) | set(silent)
    prices = [costs[one] for one in bought]
    return Plan(
        found,
        [one for one in found if one in chosen],
        [one for one in found if one in left],
        len(bought),
        None if None in prices else sum(price or 0.0 for price in prices),
    )


def _answers(work: WorkFolder, provider: Provider) -> tuple[dict[str, CachedAnswer], dict[str, Usage]]:
    """What a model answered before by prompt hash, and what its answers took by template."""
    if isinstance(provider, Pack) or not work.ledger.is_file():
        return {}, {}
    with Ledger.read(work) as ledger:
        return ledger.cached_answers(provider.provenance), ledger.usage(provider.provenance)


def refresh(
    work: WorkFolder,
    provider: Provider,
    encoder: Callable[[], TextEncoder],
    *,
    release_id: str,
    store: Callable[[], Store],
    events: Path | None = None,
    entities: Path | None = None,
    policy: Policy,
    budget: Budget,
    facts: FactsTable | None = None,
    retries: int | None = None,
    dry_run: bool = False,
    now: Callable[[], datetime] = utc_now,
    console: Console | None = None,
) -> dict[str, Any]:
    """Bring a work folder and a published release up to date.

    Args:
        work: The work folder, with `dataset`, `prompts`, `knowledge` and `encoding`.
        provider: Who writes texts.
        encoder: Makes the release's encoder.
        release_id: The release whose spaces take the fresh vectors.
        store: Opens the store where it is published.
        events: A file of new events; see `kar_offline.refresh.ingest`.
        entities: A file of new entities.
        policy: What is due.
        budget: What may be asked.
        facts: What texts must not contradict, beside the dataset.
        retries: How often to ask again for a text that fails a gate; default: what the scenario says.
        dry_run: Change nothing, send nothing.
        now: Tells the time.
        console: Where progress is shown; default: nowhere.

    Returns:
        The report: `arrived` (new users, items, events), `due` (by reason), `chosen`, `waiting` (by kind, and the most
        valuable), `calls` and `cost_usd` (in a dry run those expected), `texts` (written, refused, unanswered,
        gates), `encoded`, `written` (records of the store by part), `seconds`.

    Raises:
        InputError: a file is wrong; nothing was changed.
        PreconditionError: an earlier stage is missing, or another refresh of this work folder is under way.
        IntegrityError: stages or the release are corrupt or do not belong together.
        UnavailableError: the language model or the store does not answer; started again, a refresh goes on.
    """
    began = time.perf_counter()
    shown = console or Console(quiet=True)
    with held(
        work.root / ".refresh.lock", PreconditionError(f"another refresh of {work} is under way: wait until it ends")
    ):
        at = now()
        for stage in ("dataset", "prompts", "knowledge", "encoding"):
            settle(work.root / stage)
        dataset = work.read(Dataset)
        renderer = read_renderer(work.prompts, at.date())
        with shown.status("reading what is new"):
            title = renderer.scenario.item.title
            arrivals = read_arrivals(dataset, title, events=events, entities=entities, now=at)
        with shown.status("looking for what is due"):
            records = read_records(work)
            grown = arrivals.dataset
            planned = plan(work, grown, records, renderer, provider, policy=policy, budget=budget, now=at)
        report: dict[str, Any] = {
            "arrived": {"users": arrivals.users, "items": arrivals.items, "events": arrivals.events},
            **_told(planned),
            "calls": planned.calls,
            "cost_usd": planned.cost_usd,
            "release_id": release_id,
            "dry_run": dry_run,
        }
        if not dry_run:
            release = Release.load(work.releases, release_id)
            # Whatever would stop the way to the store is found before anything is paid for.
            with closing(store()) as opened:
                check_published(work, grown, release, opened)
            with shown.status("loading the encoder"):
                ready = encoder()
            if ready.encoder_id != release.manifest.encoder_id:
                raise PreconditionError(
                    f"release {release_id} reads vectors of {release.manifest.encoder_id}, not {ready.encoder_id}: "
                    "name its encoder"
                )
            row_of = {user.id: row for row, user in enumerate(grown.users)}
            users = np.array([row_of[one.id] for one in planned.chosen if one.kind == USER], np.int64)
            advanced = grown.advanced_to(_written_from(grown, records)).advanced(users)
            if grown is not dataset or not np.array_equal(advanced.cutoff, dataset.cutoff):
                extend_dataset(work, advanced)
            with shown.status("rendering prompts"):
                render_again(work, at.date())
            texts: dict[str, Any] = {"written": 0, "refused": 0, "unanswered": 0, "gates": {}, "stopped": ""}
            if planned.chosen:
                chosen: list[tuple[EntityKind, str]] = [(EntityKind(one.kind), one.id) for one in planned.chosen]
                result = regenerate(
                    work,
                    provider,
                    chosen,
                    facts=facts,
                    retries=retries,
                    budget_usd=budget.usd,
                    budget_calls=budget.calls,
                    now=now,
                    console=console,
                )
                texts = {name: result.report[name] for name in texts}
                report |= {name: result.report[name] for name in ("calls", "cost_usd")}
            encoded = encode(work, ready, console=console)
            with shown.status("publishing"), closing(store()) as opened:
                clock = partial(_milliseconds, now)
                written = publish_knowledge(work, release, opened, named=arrivals.named, clock=clock)
            report |= {
                "texts": texts,
                "encoded": encoded.report["encoded"] if encoded.ran else 0,
                "written": written,
            }
        return report | {"seconds": time.perf_counter() - began}


def _written_from(dataset: Dataset, records: Records) -> NDArray[np.int64]:
    """The events [U] that users' texts were written from, which a data set that was built again may not know of."""
    texts = records[USER]
    cutoffs = [texts[user.id].history_cutoff if user.id in texts else 0 for user in dataset.users]
    return np.array(cutoffs, np.int64)


def _milliseconds(now: Callable[[], datetime]) -> int:
    return round(now().timestamp() * 1000)


def _told(planned: Plan) -> dict[str, Any]:
    def by_kind(some: Sequence[RefreshCandidate]) -> dict[str, int]:
        counts = Counter(one.kind for one in some)
        return {kind: counts[kind] for kind in EntityKind}

    reasons = Counter((one.kind, one.reasons[0]) for one in planned.due)
    return {
        "due": {reason.value: {kind: reasons[kind, reason] for kind in EntityKind} for reason in Reason},
        "chosen": by_kind(planned.chosen),
        "waiting": {
            **by_kind(planned.waiting),
            "value": sum(one.value for one in planned.waiting),
            "most_valuable": [
                {"kind": one.kind, "id": one.id, "reasons": list(one.reasons), "value": one.value}
                for one in planned.waiting[:SHOWN]
            ],
        },
    }
