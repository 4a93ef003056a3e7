"""Owns one run's entries in the ledger: questions before they are sent, their answers, and the budget of the run."""

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from kar_offline.generate.provider import Answer, CachedAnswer, PendingBatch, Provider, Question, Reply
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import BudgetError

__all__ = ["Run"]


class Run:
    """One run in the ledger: the `kar_offline.generate.provider.Log` of its provider. Made by `Ledger.run`.

    A run lasts from its first start to its end, even if it is killed and started again in between. A budget is for one
    run.
    """

    def __init__(
        self,
        database: sqlite3.Connection,
        now: Callable[[], datetime],
        provider: Provider,
        templates: Mapping[str, str],
        budget_usd: float | None,
    ) -> None:
        """Go on with this model's run that did not end, or begin one."""
        self._database, self._now = database, now
        self._provider, self._templates, self._budget_usd = provider, templates, budget_usd
        with self._database:
            self._source = _source_id(database, provider)
            row = self._database.execute(
                "SELECT max(id) FROM runs WHERE ended_at IS NULL AND source = ?", (self._source,)
            ).fetchone()
            self._run: int = row[0] or self._begin()

    def _begin(self) -> int:
        row = self._database.execute(
            "INSERT INTO runs (source, started_at) VALUES (?, ?) RETURNING id", (self._source, self._time())
        ).fetchone()
        return int(row[0])

    def _time(self) -> str:
        """The time, as the tables hold it."""
        return self._now().isoformat()

    def end(self, outcome: Literal["done", "budget"]) -> None:
        """End the run; the next one has a budget of its own."""
        with self._database:
            self._database.execute(
                "UPDATE runs SET ended_at = ?, outcome = ? WHERE id = ?", (self._time(), outcome, self._run)
            )

    @property
    def spent_usd(self) -> float:
        """The cost of this run in US dollars; questions without an answer count with their highest possible cost."""
        row = self._database.execute(
            "SELECT coalesce(sum(coalesce(cost_usd, 0) + coalesce(risk_usd, 0)), 0) FROM requests WHERE run = ?",
            (self._run,),
        ).fetchone()
        return float(row[0])

    def sending(self, questions: Sequence[Question], handle: str = "") -> None:
        """See `Log`."""
        worst = [self._provider.worst_usd(question) for question in questions]
        risks = [None if risk is None else risk * self._provider.attempts for risk in worst]
        if self._budget_usd is not None:
            left_usd, next_usd = self._budget_usd - self.spent_usd, sum(risk or 0.0 for risk in risks)
            if next_usd > left_usd:
                raise BudgetError(
                    f"the budget of ${self._budget_usd:g} has ${max(left_usd, 0):.4f} left and the next questions "
                    f"could cost ${next_usd:.4f}: run this again to go on with a new budget"
                )
        sent_at = self._time()
        with self._database:
            # Questions of a batch that the provider does not know are sent again; their first row becomes uncertain.
            self._database.executemany(
                "UPDATE requests SET state = 'uncertain' WHERE state = 'sent' AND source = ? AND prompt_sha256 = ?",
                [(self._source, question.prompt_sha256) for question in questions],
            )
            self._database.executemany(
                "INSERT INTO requests (run, source, prompt_sha256, prompt_chars, entity, entity_id, template, state,"
                " handle, sent_at, risk_usd) VALUES (?, ?, ?, ?, ?, ?, ?, 'sent', ?, ?, ?)",
                [
                    (
                        *(self._run, self._source, question.prompt_sha256, len(question.prompt), question.entity),
                        *(question.id, self._templates[question.prompt_sha256], handle, sent_at, risk),
                    )
                    for question, risk in zip(questions, risks, strict=True)
                ],
            )

    def answered(self, answer: Answer) -> CachedAnswer:
        """Note the outcome of a question that was sent."""
        question, outcome = answer
        cached = CachedAnswer(outcome, self._now())
        risk = self._provider.worst_usd(question)
        values: dict[str, Any] = {
            "ended_at": cached.answered_at.isoformat(),
            "requests": outcome.requests,
            "risk_usd": None if risk is None else risk * outcome.maybe_charged,
        }
        if isinstance(outcome, Reply):
            tokens = (outcome.input_tokens, outcome.output_tokens)
            values |= {
                "state": "answered",
                "text": outcome.text,
                "finish": outcome.finish,
                "input_tokens": tokens[0],
                "output_tokens": tokens[1],
                "latency_ms": outcome.latency_ms,
                "cost_usd": self._provider.cost_usd(*tokens),
            }
        else:
            values |= {"state": "failed", "text": outcome.reason, "cost_usd": 0.0}
        with self._database:
            self._database.execute(
                f"UPDATE requests SET {', '.join(f'{name} = ?' for name in values)}"
                " WHERE state = 'sent' AND source = ? AND prompt_sha256 = ?",
                (*values.values(), self._source, question.prompt_sha256),
            )
        return cached

    def pending_batches(self) -> Sequence[PendingBatch]:
        """See `Log`."""
        questions: dict[str, list[Question]] = {}
        for handle, kind, entity_id, prompt_sha256 in self._database.execute(
            "SELECT handle, entity, entity_id, prompt_sha256 FROM requests"
            " WHERE state = 'sent' AND handle != '' AND source = ? ORDER BY id",
            (self._source,),
        ):
            questions.setdefault(handle, []).append(Question(EntityKind(kind), entity_id, "", prompt_sha256))
        return [PendingBatch(handle, in_batch) for handle, in_batch in questions.items()]


def _source_id(database: sqlite3.Connection, provider: Provider) -> int:
    """The number of a provider with its model and parameters; a new one is added."""
    parameters = json.dumps(dict(provider.parameters), sort_keys=True)
    database.execute(
        "INSERT OR IGNORE INTO sources (provider, model, parameters, provenance) VALUES (?, ?, ?, ?)",
        (provider.provider, provider.model, parameters, provider.provenance),
    )
    row = database.execute(
        "SELECT id FROM sources WHERE provider = ? AND provenance = ?", (provider.provider, provider.provenance)
    ).fetchone()
    return int(row[0])
