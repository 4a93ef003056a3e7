"""Owns estimates: the calls, tokens and money that questions will take, before they are sent."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from kar_offline.generate.ledger import Usage
from kar_offline.generate.provider import Provider, Question
from kar_offline.generate.task import GenerationTask

__all__ = ["Estimate", "estimate"]

TOKENS_PER_CHAR: Final = 0.25
"""For English prompts to a model without answers in the ledger."""
TOKENS_PER_WORD: Final = 1.35
"""For English answers of a model without answers in the ledger."""


class Estimate(NamedTuple):
    """The expected calls, tokens and cost, and the highest cost without further attempts."""

    calls: int
    input_tokens: int
    output_tokens: int
    cost_usd: float | None
    most_usd: float | None
    measured: bool
    """Whether tokens were estimated from earlier answers of this model, not only from the length of texts."""


def estimate(
    questions: Sequence[Question], tasks: Sequence[GenerationTask], provider: Provider, usage: Mapping[str, Usage]
) -> Estimate:
    """Estimate questions.

    Args:
        questions: The questions that would be sent.
        tasks: The tasks to which they belong.
        provider: The provider that would answer.
        usage: Mean tokens of earlier answers, by template.
    """
    task_of = {task.last.question.prompt_sha256: task for task in tasks}
    input_tokens = output_tokens = 0.0
    for question in questions:
        task = task_of[question.prompt_sha256]
        measured = usage.get(task.prompt.template)
        input_tokens += len(question.prompt) * (measured.input_tokens_per_char if measured else TOKENS_PER_CHAR)
        output_tokens += measured.output_tokens if measured else sum(task.rules.words) / 2 * TOKENS_PER_WORD
    worst = [provider.worst_usd(question) for question in questions]
    return Estimate(
        len(questions),
        round(input_tokens),
        round(output_tokens),
        provider.cost_usd(round(input_tokens), round(output_tokens)),
        None if None in worst else sum(cost or 0.0 for cost in worst),
        all(task_of[question.prompt_sha256].prompt.template in usage for question in questions),
    )
