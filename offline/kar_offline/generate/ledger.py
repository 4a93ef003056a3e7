"""Owns the ledger: every question that left for a language model, what became of it, and what it cost.

One SQLite file for a work folder, written by the process that generates and by no other. A question is known by the
SHA-256 of its prompt; an answer serves whoever asks the same prompt of the same model with the same parameters. What
the ledger was told is on disk when its method returns, so a kill loses at most the answers that were under way: they
are kept as `uncertain`, since the provider may have charged for them.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from kar_offline.generate.provider import Answer, Failure, PendingBatch, Provider, Question, Reply
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import BudgetError, IntegrityError, PreconditionError
from kar_sidecar.lock import held

__all__ = ["COLUMNS", "LEDGER", "CachedAnswer", "Column", "Ledger", "Run", "Spending", "Usage"]

LEDGER: Final = "ledger.sqlite"
VERSION: Final = 1
SCHEMA: Final = """
CREATE TABLE sources (
  id INTEGER PRIMARY KEY,
  provider TEXT NOT NULL,
  model TEXT NOT NULL,
  parameters TEXT NOT NULL,            -- JSON
  provenance TEXT NOT NULL,            -- as knowledge records name it
  UNIQUE (provider, provenance)
);
CREATE TABLE runs (
  id INTEGER PRIMARY KEY,
  source INTEGER NOT NULL REFERENCES sources,
  started_at TEXT NOT NULL,
  ended_at TEXT,                       -- NULL: it goes on, or was killed and the next one goes on with it
  outcome TEXT                         -- done, budget
);
CREATE TABLE requests (
  id INTEGER PRIMARY KEY,
  run INTEGER NOT NULL REFERENCES runs,
  source INTEGER NOT NULL REFERENCES sources,
  prompt_sha256 TEXT NOT NULL,
  prompt_chars INTEGER NOT NULL,
  entity TEXT NOT NULL,
  entity_id TEXT NOT NULL,
  template TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('sent', 'answered', 'failed', 'uncertain')),
  handle TEXT NOT NULL,                -- under which the provider finds it again; '': it cannot
  sent_at TEXT NOT NULL,
  ended_at TEXT,
  requests INTEGER NOT NULL DEFAULT 0, -- HTTP requests that it took
  text TEXT,                           -- answered: what the model wrote; failed: why not
  finish TEXT,
  input_tokens INTEGER NOT NULL DEFAULT 0,
  output_tokens INTEGER NOT NULL DEFAULT 0,
  latency_ms REAL,
  cost_usd REAL,                       -- of its tokens; NULL: price unknown
  risk_usd REAL                        -- what it may have cost beyond that: all it could, until it is answered
);
CREATE INDEX requests_by_prompt ON requests (prompt_sha256, source);
CREATE INDEX requests_by_run ON requests (run);
"""


class CachedAnswer(NamedTuple):
    """What became of a question."""

    outcome: Reply | Failure
    at: datetime


class Usage(NamedTuple):
    """What the answers to one template's prompts took, on average."""

    answers: int
    input_tokens_per_char: float
    output_tokens: float


class Spending(NamedTuple):
    """One line of `Ledger.costs`."""

    group: tuple[str, ...]
    calls: int
    """Questions that left."""
    answered: int
    failed: int
    under_way: int
    uncertain: int
    """Under way when a run was killed: they may have been charged for."""
    requests: int
    """HTTP requests, refused and failed ones included; of answered and failed questions."""
    input_tokens: int
    output_tokens: int
    cost_usd: float | None
    """Of all tokens; None where a price is unknown."""
    risk_usd: float
    """What uncertain questions and attempts without an answer may have cost at most, on top."""
    latency_ms: float | None
    """Mean, from the first attempt to the answer."""


Column = Literal["run", "day", "provider", "model", "template", "entity"]
COLUMNS: Final[Mapping[Column, str]] = {
    "run": "requests.run",
    "day": "substr(sent_at, 1, 10)",
    "provider": "provider",
    "model": "model",
    "template": "template",
    "entity": "entity",
}
"""What costs can be grouped by, each with its SQL."""


class Run:
    """What one run tells the ledger: a `kar_offline.generate.provider.Log`. Made by `Ledger.run`.

    A run lasts from its first start to its end, however often it is killed on the way; a budget holds for a run.
    """

    def __init__(
        self, ledger: "Ledger", provider: Provider, templates: Mapping[str, str], budget_usd: float | None
    ) -> None:
        """Go on with the run of this model that did not end, or begin one."""
        self._ledger, self._database = ledger, ledger.database
        self._provider, self._templates, self._budget_usd = provider, templates, budget_usd
        with self._database:
            self._source = ledger.source(provider)
            row = self._database.execute(
                "SELECT max(id) FROM runs WHERE ended_at IS NULL AND source = ?", (self._source,)
            ).fetchone()
            self._run: int = (
                row[0]
                or self._database.execute(
                    "INSERT INTO runs (source, started_at) VALUES (?, ?) RETURNING id", (self._source, ledger.time())
                ).fetchone()[0]
            )

    def end(self, outcome: Literal["done", "budget"]) -> None:
        """End the run; the next one has a budget of its own."""
        with self._database:
            self._database.execute(
                "UPDATE runs SET ended_at = ?, outcome = ? WHERE id = ?", (self._ledger.time(), outcome, self._run)
            )

    @property
    def spent_usd(self) -> float:
        """What this run has cost; what is not known to be answered, at the most that it can cost."""
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
            left, more = self._budget_usd - self.spent_usd, sum(risk or 0.0 for risk in risks)
            if more > left:
                raise BudgetError(
                    f"the budget of ${self._budget_usd:g} has ${max(left, 0):.4f} left and what comes next could cost "
                    f"${more:.4f}: run this again to go on with a new budget"
                )
        at = self._ledger.time()
        with self._database:
            # A batch that its provider does not know was never made: what it held leaves anew.
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
                        *(question.id, self._templates[question.prompt_sha256], handle, at, risk),
                    )
                    for question, risk in zip(questions, risks, strict=True)
                ],
            )

    def answered(self, answer: Answer) -> CachedAnswer:
        """Keep what became of a question that was sent."""
        question, outcome = answer
        kept = CachedAnswer(outcome, self._ledger.now())
        risk = self._provider.worst_usd(question)
        values: dict[str, Any] = {
            "ended_at": kept.at.isoformat(),
            "requests": outcome.requests,
            "risk_usd": None if risk is None else risk * outcome.unsure,
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
        return kept

    def opened(self) -> Sequence[PendingBatch]:
        """See `Log`."""
        found: dict[str, list[Question]] = {}
        for handle, *about in self._database.execute(
            "SELECT handle, entity, entity_id, prompt_sha256 FROM requests"
            " WHERE state = 'sent' AND handle != '' AND source = ? ORDER BY id",
            (self._source,),
        ):
            entity, entity_id, prompt_sha256 = about
            found.setdefault(handle, []).append(Question(EntityKind(entity), entity_id, "", prompt_sha256))
        return [PendingBatch(handle, questions) for handle, questions in found.items()]


class Ledger:
    """The ledger of a work folder: `Ledger.open` to write, `Ledger.read` to look."""

    def __init__(self, database: sqlite3.Connection, now: Callable[[], datetime]) -> None:
        """Take over an open database with the tables in it; `now` tells when things happen."""
        self.database, self.now = database, now

    @staticmethod
    @contextmanager
    def open(work: WorkFolder, now: Callable[[], datetime]) -> Iterator["Ledger"]:
        """The ledger of `work`, for writing; what a killed process had under way becomes `uncertain`.

        Raises:
            PreconditionError: another process is generating for this work folder.
            IntegrityError: the file is no ledger, or one of another version.
        """
        taken = PreconditionError(f"another process is generating for {work}: wait until it is done")
        with held(work.root / f".{LEDGER}.lock", taken), closing(_connect(work.ledger)) as database:
            with database:
                database.execute("UPDATE requests SET state = 'uncertain' WHERE state = 'sent' AND handle = ''")
            yield Ledger(database, now)

    @staticmethod
    @contextmanager
    def read(work: WorkFolder) -> Iterator["Ledger"]:
        """The ledger of `work`, to look at; a run may go on writing meanwhile.

        Raises:
            PreconditionError: there is none.
            IntegrityError: as of `open`.
        """
        if not work.ledger.is_file():
            raise PreconditionError(f"no ledger in {work}: no language model was asked there")
        with closing(_connect(work.ledger)) as database:
            yield Ledger(database, lambda: datetime.min)

    def time(self) -> str:
        """Now, as the tables have it."""
        return self.now().isoformat()

    def source(self, provider: Provider) -> int:
        """The number of a provider with its model and parameters; a new one is noted."""
        about = (provider.provider, provider.model, json.dumps(dict(provider.parameters), sort_keys=True))
        self.database.execute(
            "INSERT OR IGNORE INTO sources (provider, model, parameters, provenance) VALUES (?, ?, ?, ?)",
            (*about, provider.provenance),
        )
        row = self.database.execute(
            "SELECT id FROM sources WHERE provider = ? AND provenance = ?", (provider.provider, provider.provenance)
        ).fetchone()
        return int(row[0])

    def run(self, provider: Provider, templates: Mapping[str, str], budget_usd: float | None) -> Run:
        """Begin a run, or go on with the one that was killed; `templates` are by prompt hash."""
        return Run(self, provider, templates, budget_usd)

    def kept(self, provenance: str) -> dict[str, CachedAnswer]:
        """What became of each prompt that a model answered or could not answer, by prompt hash."""
        rows = self.database.execute(
            "SELECT prompt_sha256, state, text, input_tokens, output_tokens, finish, latency_ms, requests, ended_at"
            " FROM requests JOIN sources ON sources.id = source"
            " WHERE provenance = ? AND state IN ('answered', 'failed') ORDER BY requests.id",
            (provenance,),
        )
        found = {}
        for prompt_sha256, state, text, read, written, finish, latency_ms, requests, at in rows:
            answered = state == "answered"
            outcome = Reply(text, read, written, finish, latency_ms, requests) if answered else Failure(text, requests)
            found[prompt_sha256] = CachedAnswer(outcome, datetime.fromisoformat(at))
        return found

    def uncertain(self) -> int:
        """How many questions were under way when a process was killed."""
        row = self.database.execute("SELECT count(*) FROM requests WHERE state = 'uncertain'").fetchone()
        return int(row[0])

    def usage(self, provenance: str) -> dict[str, Usage]:
        """What a model's answers took, by template."""
        rows = self.database.execute(
            "SELECT template, count(*), 1.0 * sum(input_tokens) / sum(prompt_chars), avg(output_tokens)"
            " FROM requests JOIN sources ON sources.id = source"
            " WHERE provenance = ? AND state = 'answered' AND input_tokens > 0 GROUP BY template",
            (provenance,),
        )
        return {template: Usage(*numbers) for template, *numbers in rows}

    def costs(self, by: Sequence[Column]) -> list[Spending]:
        """What was spent, grouped by columns, in their order."""
        chosen = [COLUMNS[column] for column in by]
        groups = ", ".join(chosen)
        rows = self.database.execute(
            f"SELECT {''.join(f'{column}, ' for column in chosen)} count(*), sum(state = 'answered'),"
            " sum(state = 'failed'), sum(state = 'sent'), sum(state = 'uncertain'), sum(requests), sum(input_tokens),"
            " sum(output_tokens), CASE WHEN sum(state = 'answered' AND cost_usd IS NULL) THEN NULL ELSE"
            " coalesce(sum(cost_usd), 0.0) END, coalesce(sum(risk_usd), 0.0), avg(latency_ms)"
            " FROM requests JOIN sources ON sources.id = source"
            + (f" GROUP BY {groups} ORDER BY {groups}" if chosen else "")
        )
        return [Spending(tuple(map(str, row[: len(by)])), *row[len(by) :]) for row in rows if row[len(by)]]


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path)
    try:
        # Readers look while a run writes; a commit is on disk when it returns.
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            database.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        elif version != VERSION:
            raise IntegrityError(f"{path} is a ledger of version {version}, not {VERSION}: move it away to begin anew")
    except sqlite3.DatabaseError as error:
        database.close()
        raise IntegrityError(f"{path} is no ledger ({error}): restore it, or move it away to begin anew") from error
    except IntegrityError:
        database.close()
        raise
    return database
