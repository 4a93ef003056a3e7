"""The ledger: what it is told is there after a kill, budgets hold for a run, costs add up."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kar_offline.generate.ledger import LEDGER, Ledger, Spending, Usage
from kar_offline.generate.provider import Answer, CachedAnswer, Failure, PendingBatch, Question, Reply, ScriptedModel
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import BudgetError, IntegrityError, PreconditionError

pytestmark = pytest.mark.unit

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def ticking() -> Callable[[], datetime]:
    """A clock that goes on by a second each time it is read."""
    time = [NOON - timedelta(seconds=1)]

    def now() -> datetime:
        time[0] += timedelta(seconds=1)
        return time[0]

    return now


def question(number: int, words: int = 3) -> Question:
    return Question("item", str(number), " ".join(["word"] * words), f"sha{number}")


def dollars(read: int, written: int) -> float:
    """One dollar a token read, ten a token written."""
    return read + 10.0 * written


MODEL = ScriptedModel(str, price=dollars)
TEMPLATES = {f"sha{n}": "factual/2" if n < 5 else "reasoning/2" for n in range(10)}


def test_answers_are_kept_by_prompt_and_model(tmp_path: Path) -> None:
    with Ledger.open(WorkFolder(tmp_path), ticking()) as ledger:
        run = ledger.run(MODEL, TEMPLATES, None)
        run.sending([question(1), question(2)])
        run.answered(Answer(question(1), Reply("A text.", 3, 2, "stop", 12.5, 2, 1)))
        run.answered(Answer(question(2), Failure("too long", 1)))
        run.end("done")
    with Ledger.read(WorkFolder(tmp_path)) as ledger:
        assert ledger.cached_answers("scripted") == {
            "sha1": CachedAnswer(Reply("A text.", 3, 2, "stop", 12.5, 2), NOON + timedelta(seconds=2)),
            "sha2": CachedAnswer(Failure("too long", 1), NOON + timedelta(seconds=3)),
        }
        assert ledger.cached_answers("another") == {}


def test_what_a_dead_process_had_under_way_is_uncertain_unless_its_provider_can_find_it(tmp_path: Path) -> None:
    with Ledger.open(WorkFolder(tmp_path), ticking()) as ledger:
        run = ledger.run(MODEL, TEMPLATES, None)
        run.sending([question(1)])
        run.sending([question(2), question(3)], "batch-7")
    with Ledger.open(WorkFolder(tmp_path), ticking()) as ledger:
        assert ledger.uncertain() == 1
        run = ledger.run(MODEL, TEMPLATES, None)
        expected = [Question("item", number, "", f"sha{number}") for number in "23"]
        assert run.pending_batches() == [PendingBatch("batch-7", expected)]
        assert ledger.run(ScriptedModel(str, model="another"), TEMPLATES, None).pending_batches() == []
        # The provider does not know the batch, so its questions leave anew.
        run.sending([question(2), question(3)], "batch-8")
        assert [handle for handle, _ in run.pending_batches()] == ["batch-8"]
        assert ledger.uncertain() == 3


def test_a_budget_is_never_passed_and_counts_what_is_under_way_at_its_most(tmp_path: Path) -> None:
    # A question of 3 words can cost 3 + 10 * 100 dollars.
    with Ledger.open(WorkFolder(tmp_path), ticking()) as ledger:
        run = ledger.run(MODEL, TEMPLATES, 2006.0)
        run.sending([question(1), question(2)])
        assert run.spent_usd == 2006.0
        with pytest.raises(BudgetError, match=r"the budget of \$2006 has \$0\.0000 left .* could cost \$1003\.0000"):
            run.sending([question(3)])
        run.answered(Answer(question(1), Reply("Text.", 3, 1)))
        assert run.spent_usd == 13.0 + 1003.0
        with pytest.raises(BudgetError):
            run.sending([question(3)])
        run.answered(Answer(question(2), Failure("blocked")))
        run.sending([question(3)])
        assert run.spent_usd == 13.0 + 1003.0


def test_a_budget_survives_a_kill_and_ends_with_its_run(tmp_path: Path) -> None:
    with Ledger.open(WorkFolder(tmp_path), ticking()) as ledger:
        ledger.run(MODEL, TEMPLATES, 1003.0).sending([question(1)])
    with Ledger.open(WorkFolder(tmp_path), ticking()) as ledger:
        run = ledger.run(MODEL, TEMPLATES, 1003.0)
        with pytest.raises(BudgetError):
            run.sending([question(1)])
        other = ledger.run(ScriptedModel(str, model="another", price=dollars), TEMPLATES, 1003.0)
        other.sending([question(1)])
        run.end("budget")
        fresh = ledger.run(MODEL, TEMPLATES, 1003.0)
        assert fresh.spent_usd == 0.0
        fresh.sending([question(1)])


def test_attempts_that_may_have_been_charged_stay_in_the_account(tmp_path: Path) -> None:
    with Ledger.open(WorkFolder(tmp_path), ticking()) as ledger:
        run = ledger.run(MODEL, TEMPLATES, None)
        run.sending([question(1)])
        run.answered(Answer(question(1), Reply("Text.", 3, 1, requests=3, maybe_charged=2)))
        assert run.spent_usd == 13.0 + 2 * 1003.0


def test_costs_add_up_by_any_column(tmp_path: Path) -> None:
    with Ledger.open(WorkFolder(tmp_path), ticking()) as ledger:
        run = ledger.run(MODEL, TEMPLATES, None)
        run.sending([question(n) for n in (1, 2, 5, 6)])
        run.answered(Answer(question(1), Reply("A text.", 3, 2, latency_ms=10.0, requests=2)))
        run.answered(Answer(question(2), Failure("blocked")))
        run.answered(Answer(question(5), Reply("A text.", 4, 1, latency_ms=20.0)))
        run.end("done")
        free = ledger.run(ScriptedModel(str, model="unpriced"), TEMPLATES, None)
        free.sending([question(1)])
        free.answered(Answer(question(1), Reply("A text.", 7, 7)))
    with Ledger.open(WorkFolder(tmp_path), ticking()) as ledger:  # question 6 becomes uncertain
        assert ledger.costs(["model", "template"]) == [
            Spending(("scripted", "factual/2"), 2, 1, 1, 0, 0, 3, 3, 2, 23.0, 0.0, 10.0),
            Spending(("scripted", "reasoning/2"), 2, 1, 0, 0, 1, 1, 4, 1, 14.0, 1003.0, 20.0),
            Spending(("unpriced", "factual/2"), 1, 1, 0, 0, 0, 1, 7, 7, None, 0.0, 0.0),
        ]
        (total,) = ledger.costs([])
        assert (total.calls, total.input_tokens, total.cost_usd) == (5, 14, None)
        assert [spending.group for spending in ledger.costs(["day", "run"])] == [
            ("2026-11-22", "1"),
            ("2026-11-22", "2"),
        ]


def test_usage_is_a_mean_by_template(tmp_path: Path) -> None:
    with Ledger.open(WorkFolder(tmp_path), ticking()) as ledger:
        run = ledger.run(MODEL, TEMPLATES, None)
        asked = [question(1, 2), question(2, 3)]  # 9 and 14 characters
        run.sending(asked)
        run.answered(Answer(asked[0], Reply("Text.", 4, 10)))
        run.answered(Answer(asked[1], Reply("Text.", 6, 20)))
        assert ledger.usage("scripted") == {"factual/2": Usage(2, pytest.approx(10 / 23), 15.0)}


def test_one_process_writes_at_a_time_and_others_may_look(tmp_path: Path) -> None:
    with Ledger.open(WorkFolder(tmp_path), ticking()) as ledger:
        ledger.run(MODEL, TEMPLATES, None).sending([question(1)])
        with (
            pytest.raises(PreconditionError, match="another process is generating"),
            Ledger.open(WorkFolder(tmp_path), ticking()),
        ):
            pass
        with Ledger.read(WorkFolder(tmp_path)) as other:
            assert other.costs([])[0].under_way == 1


def test_reading_needs_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="no ledger in"), Ledger.read(WorkFolder(tmp_path)):
        pass


@pytest.mark.parametrize("damage", ["text", "version", "foreign"])
def test_a_file_that_is_no_ledger_is_left_alone(tmp_path: Path, damage: str) -> None:
    path = tmp_path / LEDGER
    if damage == "text":
        path.write_text("This is no database, though it is long enough to look like one at a first glance. " * 20)
    else:
        database = sqlite3.connect(path)
        database.execute("PRAGMA user_version = 99" if damage == "version" else "CREATE TABLE runs (id)")
        database.close()
    before = path.read_bytes()
    with (
        pytest.raises(IntegrityError, match=r"is no ledger|of version 99"),
        Ledger.open(WorkFolder(tmp_path), ticking()),
    ):
        pass
    assert path.read_bytes()[100:] == before[100:]  # the header may say that the journal is a write-ahead log


WRITER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from kar_offline.generate.ledger import Ledger
from kar_offline.generate.provider import Answer, Question, Reply, ScriptedModel
from kar_offline.work_folder import WorkFolder
model = ScriptedModel(str)
with Ledger.open(WorkFolder(Path(sys.argv[1])), lambda: datetime.now(UTC)) as ledger:
    templates = {}
    run = ledger.run(model, templates, None)
    for number in range(100_000):
        question = Question("item", str(number), "a question", f"sha{number}")
        templates[question.prompt_sha256] = "factual/2"
        run.sending([question])
        run.answered(Answer(question, Reply("text " * 100, 2, 100)))
        print(number, flush=True)
"""


@pytest.mark.service
def test_a_kill_loses_nothing_that_was_told(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) >= 40:
                os.kill(writer.pid, signal.SIGKILL)
                break
        told = max([int(line), *(int(rest) for rest in writer.stdout if rest.endswith("\n"))])
    with Ledger.open(WorkFolder(tmp_path), ticking()) as ledger:
        kept = ledger.cached_answers("scripted")
        assert {f"sha{number}" for number in range(told + 1)} <= kept.keys()
        assert len(kept) <= told + 2
        assert ledger.uncertain() <= 1
