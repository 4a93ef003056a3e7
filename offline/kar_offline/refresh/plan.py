"""Owns the phase `plan` of a refresh: it finds the texts that are due and chooses among them; nothing is sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import numpy as np

from kar_offline.check import Rules, Subject
from kar_offline.dataset.dataset import Dataset
from kar_offline.generate.estimate import estimate
from kar_offline.generate.ledger import Ledger, Usage
from kar_offline.generate.pack import Pack
from kar_offline.generate.provider import CachedAnswer, Provider
from kar_offline.generate.runner import first_questions
from kar_offline.generate.task import GenerationTask
from kar_offline.knowledge.knowledge_folder import RecordsByKind
from kar_offline.prompts import Prompt, Renderer
from kar_offline.refresh.knowledge_state import knowledge_states
from kar_offline.refresh.policy import Policy, RefreshCandidate, refresh_candidates, within_budget
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.releases.manifest import Release

__all__ = ["Budget", "Plan", "kinds_read", "plan_refresh"]


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one refresh; None: no limit."""

    calls: int | None = None
    """Questions to the language model."""
    usd: float | None = None
    """Cost in US dollars."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The texts that a refresh has written; all lists are ordered by value, the most valuable first."""

    due: Sequence[RefreshCandidate]
    """All candidates."""
    chosen: Sequence[RefreshCandidate]
    """Candidates whose text is written now."""
    waiting: Sequence[RefreshCandidate]
    """Candidates beyond the budget, or for whom the pack has no new text."""
    calls: int
    """Questions that the ledger has no answer to."""
    cost_usd: float | None
    """Expected cost of these questions; None: the price is unknown."""


class _Offers(NamedTuple):
    """Candidates by what a new text costs."""

    free: list[RefreshCandidate]
    """The ledger or the pack has the answer."""
    priced: list[RefreshCandidate]
    """The language model must be asked."""
    unavailable: list[RefreshCandidate]
    """The pack has no new text."""
    costs_usd: dict[RefreshCandidate, float | None]
    """Expected cost of each priced candidate; None: the price is unknown."""


def kinds_read(release: Release) -> frozenset[EntityKind]:
    """Kinds of entities whose vectors a release's model reads; texts about other kinds change no score."""
    return frozenset(release.towers) | ({ITEM} if release.affinity else frozenset())


def plan_refresh(
    work: WorkFolder,
    dataset: Dataset,
    records: RecordsByKind,
    renderer: Renderer,
    provider: Provider,
    *,
    policy: Policy,
    budget: Budget,
    now: datetime,
) -> Plan:
    """Choose the texts that are written anew.

    Candidates whose answer is in the ledger or in the pack cost nothing and are always chosen.

    Args:
        work: The work folder, for its ledger.
        dataset: The dataset with all events until now.
        records: The records in use.
        renderer: Renders the prompts.
        provider: Its pack or its answers in the ledger are looked up; it is not called.
        policy: The conditions for a text to be due.
        budget: Limits the calls and their cost.
        now: The time.
    """
    candidates = refresh_candidates(knowledge_states(dataset, records, renderer, now), policy)
    prompts = _prompts(candidates, dataset, renderer)
    if isinstance(provider, Pack):
        offers = _offers_of_pack(prompts, provider, records)
    else:
        offers = _offers_of_model(prompts, provider, renderer, work, now)
    bought, _ = within_budget(offers.priced, budget.calls)
    if budget.usd is not None:
        total_usd = np.cumsum([offers.costs_usd[candidate] or 0.0 for candidate in bought])
        bought = bought[: int(np.searchsorted(total_usd, budget.usd, side="right"))]
    chosen = {*offers.free, *bought}
    costs_usd = [offers.costs_usd[candidate] for candidate in bought]
    return Plan(
        due=candidates,
        chosen=[candidate for candidate in candidates if candidate in chosen],
        waiting=[candidate for candidate in candidates if candidate not in chosen],
        calls=len(bought),
        cost_usd=None if None in costs_usd else sum(cost or 0.0 for cost in costs_usd),
    )


def _prompts(
    candidates: Sequence[RefreshCandidate], dataset: Dataset, renderer: Renderer
) -> dict[RefreshCandidate, Prompt]:
    """The prompt about each candidate, with all events until now."""
    rows = {kind: {entity.id: row for row, entity in enumerate(dataset.entities[kind])} for kind in EntityKind}
    user_rows = [rows[USER][candidate.id] for candidate in candidates if candidate.kind == USER]
    until_now = dataset.advanced(np.array(user_rows, np.int64))
    prompts = {}
    for candidate in candidates:
        row = rows[candidate.kind][candidate.id]
        if candidate.kind == USER:
            prompts[candidate] = renderer.about_user(until_now, row)
        else:
            prompts[candidate] = renderer.factual(until_now.items[row])
    return prompts


def _offers_of_pack(prompts: Mapping[RefreshCandidate, Prompt], pack: Pack, records: RecordsByKind) -> _Offers:
    offers = _Offers([], [], [], {})
    for candidate, prompt in prompts.items():
        text = pack.text(candidate.kind, candidate.id, prompt.history_cutoff)
        record = records[candidate.kind].get(candidate.id)
        is_new = text and (record is None or record.text != text)
        (offers.free if is_new else offers.unavailable).append(candidate)
    return offers


def _offers_of_model(
    prompts: Mapping[RefreshCandidate, Prompt],
    provider: Provider,
    renderer: Renderer,
    work: WorkFolder,
    now: datetime,
) -> _Offers:
    offers = _Offers([], [], [], {})
    answers, usage = _ledger_answers(work, provider)
    rules = {kind: Rules.of(renderer.scenario, kind) for kind in EntityKind}
    for candidate, prompt in prompts.items():
        task = GenerationTask(prompt, Subject(candidate.kind, candidate.id), rules[candidate.kind])
        questions = first_questions([task], answers, now)
        if questions:
            offers.costs_usd[candidate] = estimate(questions, [task], provider, usage).cost_usd
            offers.priced.append(candidate)
        else:
            offers.free.append(candidate)
    return offers


def _ledger_answers(work: WorkFolder, provider: Provider) -> tuple[dict[str, CachedAnswer], dict[str, Usage]]:
    """Answers that the ledger holds, by prompt hash, and the tokens that they took, by template."""
    if not work.ledger.is_file():
        return {}, {}
    with Ledger.read(work) as ledger:
        return ledger.cached_answers(provider.provenance), ledger.usage(provider.provenance)
