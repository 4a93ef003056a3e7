"""Owns the run of generation tasks: it sends unanswered questions, judges answers, and asks again after refused ones.

The answers of earlier runs come from the ledger: started again after a kill, the same tasks reach the same state, and
no question that was answered is sent again.
"""

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from kar_offline.generate.judging import judge_tasks
from kar_offline.generate.ledger import Ledger
from kar_offline.generate.ledger_run import Run
from kar_offline.generate.pack import Pack
from kar_offline.generate.provider import Answer, CachedAnswer, Failure, PendingBatch, Provider, Question, Reply
from kar_offline.generate.task import GenerationTask
from kar_sidecar.errors import BudgetError, InputError

__all__ = ["Tally", "first_questions", "take_from_pack", "work_through"]

FIRST_FAILURES: Final = 5
"""This number of failures before the first reply means that the request itself is wrong."""


@dataclass(slots=True)
class Tally:
    """Counts of what this process sent and received."""

    calls: int = 0
    answered: int = 0
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = 0.0
    """None: the price is not known."""
    stopped: str = ""
    """Why the run ended before all questions were asked; empty: all were asked."""

    def add(self, outcome: Reply | Failure, cost_usd: float | None) -> None:
        """Count an answer and its cost."""
        self.answered += 1
        self.requests += outcome.requests
        if isinstance(outcome, Reply):
            self.input_tokens += outcome.input_tokens
            self.output_tokens += outcome.output_tokens
            self.cost_usd = None if cost_usd is None or self.cost_usd is None else self.cost_usd + cost_usd


class _CountingLog:
    """The log of a run that also counts the questions that are sent, and refuses more than `limit` of them."""

    def __init__(self, run: Run, tally: Tally, limit: int | None) -> None:
        self._run, self._tally, self._limit = run, tally, limit

    def sending(self, questions: Sequence[Question], handle: str = "") -> None:
        if self._limit is not None and self._tally.calls + len(questions) > self._limit:
            raise BudgetError(f"the budget of {self._limit} calls is spent: run this again to go on with a new budget")
        self._run.sending(questions, handle)
        self._tally.calls += len(questions)

    def pending_batches(self) -> Sequence[PendingBatch]:
        return self._run.pending_batches()


class _SilentLog:
    """The log of a provider that must not send anything."""

    def sending(self, questions: Sequence[Question], handle: str = "") -> None:
        raise RuntimeError("this provider must not send anything")

    def pending_batches(self) -> Sequence[PendingBatch]:
        return ()


def first_questions(
    tasks: Iterable[GenerationTask], answers: Mapping[str, CachedAnswer], now: datetime
) -> list[Question]:
    """The questions that would be sent first, each prompt once: those without a cached answer, or with an old one.

    Args:
        tasks: The tasks.
        answers: Cached answers by prompt hash.
        now: The time.
    """
    questions = {
        task.last.question.prompt_sha256: task.last.question
        for task in tasks
        if _valid_answer(task, answers, now) is None
    }
    return list(questions.values())


def _valid_answer(task: GenerationTask, answers: Mapping[str, CachedAnswer], now: datetime) -> CachedAnswer | None:
    """The cached answer to a task's last question, unless it is older than its prompt allows."""
    answer, days = answers.get(task.last.question.prompt_sha256), task.prompt.expires_after_days
    expired = answer and days is not None and answer.answered_at + timedelta(days=days) <= now
    return None if expired else answer


async def take_from_pack(
    tasks: Sequence[GenerationTask], pack: Pack, answered_at: datetime, *, existing: Sequence[GenerationTask] = ()
) -> None:
    """Answer tasks with the texts of a pack and judge them; nothing is sent, so no ledger is involved.

    `answered_at` becomes the time of the answers; `existing` is as for `work_through`.
    """
    by_entity = {(task.prompt.entity, task.prompt.id): task for task in tasks}
    async with aclosing(pack.ask([task.last.question for task in tasks], _SilentLog())) as answers:
        async for question, outcome in answers:
            if isinstance(outcome, Reply):
                by_entity[question.entity, question.id].last.answer = CachedAnswer(outcome, answered_at)
    judge_tasks([*existing, *tasks], tasks)


async def work_through(
    tasks: Sequence[GenerationTask],
    provider: Provider,
    ledger: Ledger,
    *,
    retries: int,
    budget_usd: float | None = None,
    budget_calls: int | None = None,
    existing: Sequence[GenerationTask] = (),
    on_round: Callable[[int, int], None] = lambda attempt, questions: None,
    on_answer: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Have every task answered and judged, with up to `retries` further attempts where a gate refused the text.

    Args:
        tasks: The tasks, each at its first attempt.
        provider: The language model that answers.
        ledger: Has the answers of earlier runs; records the questions and answers of this run.
        retries: Largest number of further attempts at a task.
        budget_usd: Highest cost of this run, in US dollars; None: no limit.
        budget_calls: Largest number of questions that may be sent now; None: no limit.
        existing: Tasks whose texts are in use and stay; no new text may be nearly the same as one of theirs.
        on_round: Called before a round of questions, with the number of the attempt, from 0, and of questions.
        on_answer: Called after each answer.

    Raises:
        UnavailableError: the provider stopped answering; started again, the run goes on.
        InputError: the endpoint refuses all requests.
    """
    tally = Tally()
    answers = ledger.cached_answers(provider.provenance)
    run: Run | None = None
    async with AsyncExitStack() as stack:
        pending: Sequence[GenerationTask] = tasks
        for attempt in range(retries + 1):
            if questions := first_questions(pending, answers, ledger.now()):
                if run is None:
                    templates: dict[str, str] = {}
                    run = ledger.run(provider, templates, budget_usd)
                    await stack.enter_async_context(provider)
                templates |= {task.last.question.prompt_sha256: task.prompt.template for task in pending}
                on_round(attempt, len(questions))
                try:
                    log = _CountingLog(run, tally, budget_calls)
                    async with aclosing(provider.ask(questions, log)) as incoming:
                        async for answer in _checked_for_replies(incoming, answers):
                            answers[answer.question.prompt_sha256] = run.answered(answer)
                            tally.add(answer.outcome, _cost_usd(provider, answer))
                            on_answer(tally)
                except BudgetError as error:
                    tally.stopped = str(error)
            for task in pending:
                task.last.answer = _valid_answer(task, answers, ledger.now())
                if task.last.answer is None and attempt:
                    task.attempts.pop()  # the budget ended before this attempt; the one before it counts
            judge_tasks([*existing, *tasks], pending)
            pending = [task for task in pending if task.last.text and task.last.refused_by]
            if tally.stopped or not pending or attempt == retries:
                break
            for task in pending:
                task.ask_again()
    if run is not None:
        run.end("budget" if tally.stopped else "done")
    return tally


async def _checked_for_replies(
    incoming: AsyncIterable[Answer], answers: Mapping[str, CachedAnswer]
) -> AsyncIterator[Answer]:
    """Pass answers on; hold failures back until a reply shows that some requests succeed.

    Raises:
        InputError: the first `FIRST_FAILURES` answers are failures. They are not passed on, so they are not in the
            ledger, and the next run asks these questions again.
    """
    held_back: list[Answer] = []
    any_reply = any(isinstance(cached.outcome, Reply) for cached in answers.values())
    async for answer in incoming:
        any_reply = any_reply or isinstance(answer.outcome, Reply)
        held_back.append(answer)
        if not any_reply and len(held_back) == FIRST_FAILURES:
            assert isinstance(answer.outcome, Failure)
            raise InputError(
                f"each of the first {FIRST_FAILURES} questions failed (last: {answer.outcome.reason}): correct the "
                "model, its parameters or the endpoint, then run this again"
            )
        if any_reply:
            for released in held_back:
                yield released
            held_back.clear()
    for released in held_back:
        yield released


def _cost_usd(provider: Provider, answer: Answer) -> float | None:
    outcome = answer.outcome
    return provider.cost_usd(outcome.input_tokens, outcome.output_tokens) if isinstance(outcome, Reply) else 0.0
