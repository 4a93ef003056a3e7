"""Owns asking: what has no answer yet leaves for the provider, answers are judged, failing ones are asked for again.

Everything that happens here is replayed from the ledger: started again after a kill, the same cases get to the same
state without a question that was answered before.
"""

import hashlib
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from kar.records.v1 import records_pb2
from kar_offline.check import DUPLICATE_GATE, Rules, Subject, judge, near_duplicates
from kar_offline.generate.ledger import CachedAnswer, Ledger, Run
from kar_offline.generate.pack import Pack
from kar_offline.generate.provider import Answer, Failure, PendingBatch, Provider, Question, Reply
from kar_offline.prompts import Prompt
from kar_sidecar.errors import BudgetError, InputError

__all__ = ["Attempt", "GenerationTask", "Tally", "first_questions", "gate_counts", "take_from_pack", "work_through"]

ANSWER: Final = "answer"
"""Stands for the gates where there is no text to judge."""
FIRST: Final = 5
"""So many failures before the first reply mean that the request itself is wrong."""


@dataclass(slots=True)
class Attempt:
    """One question about an entity, what became of it, and what the gates found."""

    question: Question
    kept: CachedAnswer | None = None
    verdicts: tuple[records_pb2.Verdict, ...] = ()

    @property
    def text(self) -> str:
        """What the model wrote; empty where it wrote nothing."""
        return self.kept.outcome.text if self.kept and isinstance(self.kept.outcome, Reply) else ""

    @property
    def refused_by(self) -> list[str]:
        """The gates that refuse it, in their order."""
        return [verdict.gate for verdict in self.verdicts if verdict.outcome == records_pb2.OUTCOME_FAILED]


@dataclass(slots=True)
class GenerationTask:
    """An entity to be written about: its prompt, what its text is judged by, and the attempts so far."""

    prompt: Prompt
    subject: Subject
    rules: Rules
    attempts: list[Attempt] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with the prompt as it is."""
        prompt = self.prompt
        self.attempts.append(
            Attempt(Question(prompt.entity, prompt.id, prompt.prompt, prompt.prompt_sha256, prompt.history_cutoff))
        )

    @property
    def last(self) -> Attempt:
        """The attempt that counts."""
        return self.attempts[-1]

    def ask_again(self) -> None:
        """Begin another attempt, which tells the model what was wrong with its last answer."""
        prompt = f"{self.prompt.prompt}\n\n{_complaint(self.last.refused_by, len(self.attempts))}"
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        self.attempts.append(Attempt(self.last.question._replace(prompt=prompt, prompt_sha256=digest)))


def _complaint(gates: Sequence[str], attempt: int) -> str:
    # Gates' names are ours: nothing that a model or a stranger wrote may enter a prompt here.
    said = ", ".join(gates)
    return f"Attempt {attempt + 1}: an earlier answer was refused by these checks: {said}. Write a better one."


@dataclass(slots=True)
class Tally:
    """What this process sent and got."""

    calls: int = 0
    answered: int = 0
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = 0.0
    stopped: str = ""
    """Why it ended before all was asked; empty: it did not."""

    def add(self, outcome: Reply | Failure, cost_usd: float | None) -> None:
        """Count an answer, and what it cost."""
        self.answered += 1
        self.requests += outcome.requests
        if isinstance(outcome, Reply):
            self.input_tokens += outcome.input_tokens
            self.output_tokens += outcome.output_tokens
            self.cost_usd = None if cost_usd is None or self.cost_usd is None else self.cost_usd + cost_usd


class _Counted:
    """The log of a run that also counts what leaves, and lets no more than so many questions leave."""

    def __init__(self, run: Run, tally: Tally, most: int | None) -> None:
        self._run, self._tally, self._most = run, tally, most

    def sending(self, questions: Sequence[Question], handle: str = "") -> None:
        if self._most is not None and self._tally.calls + len(questions) > self._most:
            raise BudgetError(f"the budget of {self._most} calls is spent: run this again to go on with a new budget")
        self._run.sending(questions, handle)
        self._tally.calls += len(questions)

    def opened(self) -> Sequence[PendingBatch]:
        return self._run.opened()


class _Nothing:
    """The log of a provider that sends nothing."""

    def sending(self, questions: Sequence[Question], handle: str = "") -> None:
        raise RuntimeError("this provider was to send nothing")

    def opened(self) -> Sequence[PendingBatch]:
        return ()


def first_questions(cases: Iterable[GenerationTask], kept: Mapping[str, CachedAnswer], now: datetime) -> list[Question]:
    """The questions that would leave first, each prompt once: those without an answer, or with one past its age."""
    questions = {
        case.last.question.prompt_sha256: case.last.question for case in cases if _known(case, kept, now) is None
    }
    return list(questions.values())


def _known(case: GenerationTask, kept: Mapping[str, CachedAnswer], now: datetime) -> CachedAnswer | None:
    found, days = kept.get(case.last.question.prompt_sha256), case.prompt.expires_after_days
    return None if found and days is not None and found.at + timedelta(days=days) <= now else found


async def take_from_pack(
    cases: Sequence[GenerationTask], pack: Pack, at: datetime, *, standing: Sequence[GenerationTask] = ()
) -> None:
    """Give the cases that a pack knows its texts, and judge them: nothing is sent, so no ledger is told.

    `standing` are cases as in `work_through`.
    """
    by_entity = {(case.prompt.entity, case.prompt.id): case for case in cases}
    async with aclosing(pack.ask([case.last.question for case in cases], _Nothing())) as answers:
        async for question, outcome in answers:
            if isinstance(outcome, Reply):
                by_entity[question.entity, question.id].last.kept = CachedAnswer(outcome, at)
    _judge([*standing, *cases], cases)


async def work_through(
    cases: Sequence[GenerationTask],
    provider: Provider,
    ledger: Ledger,
    *,
    retries: int,
    budget_usd: float | None = None,
    budget_calls: int | None = None,
    standing: Sequence[GenerationTask] = (),
    on_round: Callable[[int, int], None] = lambda attempt, questions: None,
    on_answer: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Bring every case as far as it gets: answered and judged, with up to `retries` further attempts where it failed.

    Args:
        cases: What to write about, each at its first attempt.
        provider: The language model that answers.
        ledger: Knows what was answered before, and is told what is sent.
        retries: The most further attempts at a case.
        budget_usd: The most that this run may cost; None: any amount.
        budget_calls: The most questions that may leave now; None: any number.
        standing: Cases with an answer that stays as it is: no other may say nearly the same.
        on_round: Called before a round of questions, with the number of the attempt, from 0, and of questions.
        on_answer: Called after each answer.

    Raises:
        UnavailableError: the provider stopped answering; started again, it goes on.
        InputError: the endpoint refuses the requests altogether.
    """
    tally = Tally()
    kept = ledger.kept(provider.provenance)
    run: Run | None = None
    async with AsyncExitStack() as stack:
        pending: Sequence[GenerationTask] = cases
        for attempt in range(retries + 1):
            if questions := first_questions(pending, kept, ledger.now()):
                if run is None:
                    templates: dict[str, str] = {}
                    run = ledger.run(provider, templates, budget_usd)
                    await stack.enter_async_context(provider)
                templates |= {case.last.question.prompt_sha256: case.prompt.template for case in pending}
                on_round(attempt, len(questions))
                try:
                    async with aclosing(provider.ask(questions, _Counted(run, tally, budget_calls))) as answers:
                        async for answer in _proven(answers, kept):
                            kept[answer.question.prompt_sha256] = run.answered(answer)
                            tally.add(answer.outcome, _cost(provider, answer))
                            on_answer(tally)
                except BudgetError as error:
                    tally.stopped = str(error)
            for case in pending:
                case.last.kept = _known(case, kept, ledger.now())
                if case.last.kept is None and attempt:
                    case.attempts.pop()  # the budget ended before it; the answer before it counts
            _judge([*standing, *cases], pending)
            pending = [case for case in pending if case.last.text and case.last.refused_by]
            if tally.stopped or not pending or attempt == retries:
                break
            for case in pending:
                case.ask_again()
    if run is not None:
        run.end("budget" if tally.stopped else "done")
    return tally


async def _proven(answers: AsyncIterable[Answer], kept: Mapping[str, CachedAnswer]) -> AsyncIterator[Answer]:
    """The answers, failures held back until a reply shows that not every request is wrong.

    Raises:
        InputError: the first `FIRST` are failures; they are forgotten, so that a mended endpoint is asked again.
    """
    held: list[Answer] = []
    proven = any(isinstance(known.outcome, Reply) for known in kept.values())
    async for answer in answers:
        proven = proven or isinstance(answer.outcome, Reply)
        held.append(answer)
        if not proven and len(held) == FIRST:
            assert isinstance(answer.outcome, Failure)
            raise InputError(
                f"each of the first {FIRST} questions failed (last: {answer.outcome.reason}): correct the model, its "
                "parameters or the endpoint, then run this again"
            )
        if proven:
            for ready in held:
                yield ready
            held.clear()
    for ready in held:
        yield ready


def _cost(provider: Provider, answer: Answer) -> float | None:
    outcome = answer.outcome
    return provider.cost_usd(outcome.input_tokens, outcome.output_tokens) if isinstance(outcome, Reply) else 0.0


def _judge(cases: Sequence[GenerationTask], fresh: Sequence[GenerationTask]) -> None:
    """Judge the `fresh` cases, each by itself; then all of them by one another."""
    for case in fresh:
        attempt = case.last
        if attempt.kept is None:
            continue
        outcome = attempt.kept.outcome
        if isinstance(outcome, Failure) or not outcome.text:
            reason = outcome.reason if isinstance(outcome, Failure) else "the model wrote nothing"
            attempt.verdicts = (records_pb2.Verdict(gate=ANSWER, outcome=records_pb2.OUTCOME_FAILED, reason=reason),)
        else:
            attempt.verdicts = judge(outcome.text, case.subject, case.rules, outcome.finish)
    for entity in dict.fromkeys(case.prompt.entity for case in cases):
        # Entities that the same was asked about share the answer; that is no accident.
        alike: dict[tuple[str, str], list[GenerationTask]] = {}
        for case in cases:
            if case.prompt.entity == entity and case.last.text and set(case.last.refused_by) <= {DUPLICATE_GATE}:
                alike.setdefault((case.last.question.prompt_sha256, case.last.text), []).append(case)
        first = {group[0].prompt.id: group[0] for group in alike.values()}
        twins = near_duplicates(
            {id_: case.last.text for id_, case in first.items()}, {id_: case.subject for id_, case in first.items()}
        )
        for group in alike.values():
            verdict = _duplicate_verdict(twins.get(group[0].prompt.id), entity)
            for case in group:
                others = (found for found in case.last.verdicts if found.gate != DUPLICATE_GATE)
                case.last.verdicts = (*others, verdict)


def _duplicate_verdict(twin: tuple[str, float] | None, entity: str) -> records_pb2.Verdict:
    if twin is None:
        return records_pb2.Verdict(gate=DUPLICATE_GATE, outcome=records_pb2.OUTCOME_PASSED)
    reason = f"{twin[1]:.0%} of its wording is that of {entity} {twin[0]}"
    return records_pb2.Verdict(gate=DUPLICATE_GATE, outcome=records_pb2.OUTCOME_FAILED, reason=reason)


def gate_counts(cases: Iterable[GenerationTask]) -> dict[str, int]:
    """How many of the answers that count each gate refuses."""
    return dict(Counter(gate for case in cases for gate in case.last.refused_by))
