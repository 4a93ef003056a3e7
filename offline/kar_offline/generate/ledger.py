"""Owns the ledger: every question that was sent to a language model, its outcome, and its cost.

One SQLite file for a work folder, written by one process at a time. A question is known by the SHA-256 of its prompt,
and an answer serves every question with the same prompt to the same model with the same parameters. A note is on disk
when its method returns, so a kill loses at most the answers that were under way. Those questions are kept as
`uncertain`, because the provider may have charged for them.
"""

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from typing import Final, Literal, NamedTuple

from kar_offline.generate.ledger_run import Run
from kar_offline.generate.ledger_schema import connect
from kar_offline.generate.provider import CachedAnswer, Failure, Provider, Reply
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import PreconditionError
from kar_sidecar.lock import held

__all__ = ["COLUMNS", "LEDGER", "Column", "Ledger", "Spending", "Usage"]

LEDGER: Final = "ledger.sqlite"


class Usage(NamedTuple):
    """Mean tokens of the answers to one template's prompts."""

    answers: int
    input_tokens_per_char: float
    output_tokens: float


class Spending(NamedTuple):
    """One line of `Ledger.costs`."""

    group: tuple[str, ...]
    calls: int
    """Questions that were sent."""
    answered: int
    failed: int
    under_way: int
    uncertain: int
    """Questions under way when a run was killed; they may have been charged for."""
    requests: int
    """HTTP requests for answered and failed questions, including refused and failed requests."""
    input_tokens: int
    output_tokens: int
    cost_usd: float | None
    """Cost of all tokens; None where a price is unknown."""
    risk_usd: float
    """Highest possible further cost, of uncertain questions and of attempts without an answer."""
    latency_ms: float | None
    """Mean time from the first attempt to the answer; None without an answer."""


Column = Literal["run", "day", "provider", "model", "template", "entity"]
COLUMNS: Final[Mapping[Column, str]] = {
    "run": "requests.run",
    "day": "substr(sent_at, 1, 10)",
    "provider": "provider",
    "model": "model",
    "template": "template",
    "entity": "entity",
}
"""The columns by which costs can be grouped, with their SQL."""


class Ledger:
    """The ledger of a work folder: `Ledger.open` to write, `Ledger.read` to look."""

    def __init__(self, database: sqlite3.Connection, now: Callable[[], datetime]) -> None:
        """Use an open database that has the tables; `now` tells the time."""
        self._database, self.now = database, now

    @staticmethod
    @contextmanager
    def open(work: WorkFolder, now: Callable[[], datetime]) -> Iterator["Ledger"]:
        """Open the ledger of `work` for writing; questions that a killed process had under way become `uncertain`.

        Raises:
            PreconditionError: another process is generating for this work folder.
            IntegrityError: the file is no ledger, or one of another version.
        """
        busy = PreconditionError(f"another process is generating for {work}: wait until it is done")
        with held(work.root / f".{LEDGER}.lock", busy), closing(connect(work.ledger)) as database:
            with database:
                database.execute("UPDATE requests SET state = 'uncertain' WHERE state = 'sent' AND handle = ''")
            yield Ledger(database, now)

    @staticmethod
    @contextmanager
    def read(work: WorkFolder) -> Iterator["Ledger"]:
        """Open the ledger of `work` for reading; a run may write at the same time.

        Raises:
            PreconditionError: there is none.
            IntegrityError: the file is no ledger, or one of another version.
        """
        if not work.ledger.is_file():
            raise PreconditionError(f"no ledger in {work}: no language model was asked there")
        with closing(connect(work.ledger)) as database:
            yield Ledger(database, lambda: datetime.min)

    def run(self, provider: Provider, templates: Mapping[str, str], budget_usd: float | None) -> Run:
        """Begin a run, or go on with one that was killed; `templates` are by prompt hash."""
        return Run(self._database, self.now, provider, templates, budget_usd)

    def cached_answers(self, provenance: str) -> dict[str, CachedAnswer]:
        """The outcomes of all questions to a model that were answered or failed, by prompt hash."""
        rows = self._database.execute(
            "SELECT prompt_sha256, state, text, input_tokens, output_tokens, finish, latency_ms, requests, ended_at"
            " FROM requests JOIN sources ON sources.id = source"
            " WHERE provenance = ? AND state IN ('answered', 'failed') ORDER BY requests.id",
            (provenance,),
        )
        answers = {}
        for prompt_sha256, state, text, input_tokens, output_tokens, finish, latency_ms, requests, ended_at in rows:
            outcome = (
                Reply(text, input_tokens, output_tokens, finish, latency_ms, requests)
                if state == "answered"
                else Failure(text, requests)
            )
            answers[prompt_sha256] = CachedAnswer(outcome, datetime.fromisoformat(ended_at))
        return answers

    def uncertain(self) -> int:
        """The number of questions that were under way when a process was killed."""
        row = self._database.execute("SELECT count(*) FROM requests WHERE state = 'uncertain'").fetchone()
        return int(row[0])

    def usage(self, provenance: str) -> dict[str, Usage]:
        """Mean tokens of a model's answers, by template."""
        rows = self._database.execute(
            "SELECT template, count(*), 1.0 * sum(input_tokens) / sum(prompt_chars), avg(output_tokens)"
            " FROM requests JOIN sources ON sources.id = source"
            " WHERE provenance = ? AND state = 'answered' AND input_tokens > 0 GROUP BY template",
            (provenance,),
        )
        return {template: Usage(*numbers) for template, *numbers in rows}

    def costs(self, by: Sequence[Column]) -> list[Spending]:
        """Calls, tokens and money, grouped by columns, in the order of the columns."""
        sql_columns = [COLUMNS[column] for column in by]
        groups = ", ".join(sql_columns)
        rows = self._database.execute(
            f"SELECT {''.join(f'{column}, ' for column in sql_columns)} count(*), sum(state = 'answered'),"
            " sum(state = 'failed'), sum(state = 'sent'), sum(state = 'uncertain'), sum(requests), sum(input_tokens),"
            " sum(output_tokens), CASE WHEN sum(state = 'answered' AND cost_usd IS NULL) THEN NULL ELSE"
            " coalesce(sum(cost_usd), 0.0) END, coalesce(sum(risk_usd), 0.0), avg(latency_ms)"
            " FROM requests JOIN sources ON sources.id = source"
            + (f" GROUP BY {groups} ORDER BY {groups}" if sql_columns else "")
        )
        return [Spending(tuple(map(str, row[: len(by)])), *row[len(by) :]) for row in rows if row[len(by)]]
