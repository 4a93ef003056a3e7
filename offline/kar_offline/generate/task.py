"""Owns generation tasks: an entity that needs a text, the questions asked about it, and their answers."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from kar.records.v1 import records_pb2
from kar_offline.check import Rules, Subject
from kar_offline.generate.provider import CachedAnswer, Question, Reply
from kar_offline.prompts import Prompt

__all__ = ["Attempt", "GenerationTask"]


@dataclass(slots=True)
class Attempt:
    """One question about an entity, its answer, and the verdicts of the gates."""

    question: Question
    answer: CachedAnswer | None = None
    verdicts: tuple[records_pb2.Verdict, ...] = ()

    @property
    def text(self) -> str:
        """The model's text; empty where there is none."""
        return self.answer.outcome.text if self.answer and isinstance(self.answer.outcome, Reply) else ""

    @property
    def refused_by(self) -> list[str]:
        """Names of the gates that refuse the text, in the order of the gates."""
        return [verdict.gate for verdict in self.verdicts if verdict.outcome == records_pb2.OUTCOME_FAILED]


@dataclass(slots=True)
class GenerationTask:
    """An entity that needs a text: its prompt, the context of the gates, and the attempts so far."""

    prompt: Prompt
    subject: Subject
    rules: Rules
    attempts: list[Attempt] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin the first attempt, with the prompt itself."""
        prompt = self.prompt
        question = Question(prompt.entity, prompt.id, prompt.prompt, prompt.prompt_sha256, prompt.history_cutoff)
        self.attempts.append(Attempt(question))

    @property
    def last(self) -> Attempt:
        """The latest attempt, whose answer and verdicts count."""
        return self.attempts[-1]

    def ask_again(self) -> None:
        """Begin another attempt, whose prompt names the gates that refused the last answer."""
        prompt = f"{self.prompt.prompt}\n\n{_complaint(self.last.refused_by, len(self.attempts))}"
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        self.attempts.append(Attempt(self.last.question._replace(prompt=prompt, prompt_sha256=digest)))


def _complaint(gates: Sequence[str], attempt: int) -> str:
    # Only the names of gates, which are ours: no text of a model or of a stranger may enter a prompt here.
    names = ", ".join(gates)
    return f"Attempt {attempt + 1}: an earlier answer was refused by these checks: {names}. Write a better one."
