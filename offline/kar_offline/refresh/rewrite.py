"""Owns the phase `rewrite` of a refresh: it moves cut-offs, renders prompts again and writes the chosen texts.

Cut-offs move before a text is requested: even if the run is killed, no text was written from a training sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kar_offline.check import FactsTable
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.stage import extend_dataset
from kar_offline.generate.stage import regenerate
from kar_offline.knowledge.knowledge_folder import Knowledge, RecordsByKind
from kar_offline.prompts import Prompt, RenderedPrompts, Renderer, render_again
from kar_offline.refresh.context import RefreshContext
from kar_offline.refresh.ingest import Arrivals
from kar_offline.refresh.plan import Budget, Plan
from kar_offline.refresh.policy import RefreshCandidate
from kar_sidecar.entities import USER

__all__ = ["RewrittenKnowledge", "TextCounts", "rewrite"]


@dataclass(frozen=True, slots=True)
class TextCounts:
    """Numbers of the chosen texts by outcome."""

    written: int = 0
    refused: int = 0
    unanswered: int = 0
    gates: dict[str, int] | None = None
    """Refused texts by gate; None: no text was chosen."""
    stopped: str = ""
    """Why the run ended early, such as the budget; empty if it did not."""


@dataclass(frozen=True, slots=True)
class RewrittenKnowledge:
    """The work folder's content after the phase."""

    dataset: Dataset
    """With the new users, items and events, and the moved cut-offs."""
    prompts: Sequence[Prompt]
    knowledge: Knowledge
    texts: TextCounts
    calls: int
    """Questions that were sent."""
    cost_usd: float | None
    """Cost of these questions; None: the price is unknown."""


def rewrite(
    context: RefreshContext,
    arrivals: Arrivals,
    plan: Plan,
    knowledge: Knowledge,
    renderer: Renderer,
    *,
    budget: Budget,
    facts: FactsTable | None = None,
    retries: int | None = None,
) -> RewrittenKnowledge:
    """Write the chosen texts; all other texts stay as they are.

    Args:
        context: The work folder, the provider and the clock.
        arrivals: The dataset with the new entities and events.
        plan: The chosen entities.
        knowledge: The knowledge in use.
        renderer: Renders the prompts.
        budget: Ends the run before it is exceeded.
        facts: Facts that texts must not contradict, beside the dataset's.
        retries: How often to ask again for a text that a gate refuses; default: as the scenario says.

    Raises:
        UnavailableError: the language model does not answer; a refresh that is started again continues.
        PreconditionError: another process generates for this work folder.
        InputError: an endpoint refuses the requests.
    """
    work = context.work
    _move_cutoffs(context, arrivals, plan.chosen, knowledge.records)
    with context.status("rendering prompts"):
        render_again(work, renderer)
    texts, calls, cost_usd = TextCounts(), plan.calls, plan.cost_usd
    if plan.chosen:
        report = regenerate(
            work,
            context.provider,
            [(candidate.kind, candidate.id) for candidate in plan.chosen],
            facts=facts,
            retries=retries,
            budget_usd=budget.usd,
            budget_calls=budget.calls,
            now=context.now,
            console=context.console,
        ).report
        texts = TextCounts(**{name: report[name] for name in TextCounts.__slots__})
        calls, cost_usd = report["calls"], report["cost_usd"]
    return RewrittenKnowledge(
        work.read(Dataset), work.read(RenderedPrompts).prompts, work.read(Knowledge), texts, calls, cost_usd
    )


def _move_cutoffs(
    context: RefreshContext, arrivals: Arrivals, chosen: Sequence[RefreshCandidate], records: RecordsByKind
) -> None:
    """Write the dataset if it changed; cut-offs of the chosen users move to their last event.

    A cut-off also moves to the one in the user's record, since a dataset that was built again from its source has lost
    the cut-offs of earlier refreshes.
    """
    dataset = arrivals.dataset
    row_of = {user.id: row for row, user in enumerate(dataset.users)}
    chosen_rows = np.array([row_of[candidate.id] for candidate in chosen if candidate.kind == USER], np.int64)
    texts = records[USER]
    written_from = [texts[user.id].history_cutoff if user.id in texts else 0 for user in dataset.users]
    advanced = dataset.advanced_to(np.array(written_from, np.int64)).advanced(chosen_rows)
    if arrivals.any_new or not np.array_equal(advanced.cutoff, dataset.cutoff):
        extend_dataset(context.work, advanced)
