"""Owns estimates: the calls, tokens and money that questions will take, before anything is sent."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from kar_offline.generate.ledger import Usage
from kar_offline.generate.provider import Provider, Question
from kar_offline.generate.task import GenerationTask

__all__ = ["Estimate", "estimate"]

TOKENS_PER_CHAR: Final = 0.25
TOKENS_PER_WORD: Final = 1.35
"""English prose, where a model has answered nothing yet."""


class Estimate(NamedTuple):
    """What is expected, and the most that it can cost without further attempts."""

    calls: int
    input_tokens: int
    output_tokens: int
    cost_usd: float | None
    most_usd: float | None
    measured: bool
    """Whether tokens follow from earlier answers of this model, not from the length of texts alone."""


def estimate(
    questions: Sequence[Question], cases: Sequence[GenerationTask], provider: Provider, usage: Mapping[str, Usage]
) -> Estimate:
    """What `questions` will take.

    Args:
        questions: What would leave.
        cases: The cases that they belong to.
        provider: Who would be asked.
        usage: What earlier answers took, by template.
    """
    about = {case.last.question.prompt_sha256: case for case in cases}
    read = written = 0.0
    for question in questions:
        case = about[question.prompt_sha256]
        known = usage.get(case.prompt.template)
        read += len(question.prompt) * (known.input_tokens_per_char if known else TOKENS_PER_CHAR)
        written += known.output_tokens if known else sum(case.rules.words) / 2 * TOKENS_PER_WORD
    worst = [provider.worst_usd(question) for question in questions]
    return Estimate(
        len(questions),
        round(read),
        round(written),
        provider.cost_usd(round(read), round(written)),
        None if None in worst else sum(cost or 0.0 for cost in worst),
        all(about[question.prompt_sha256].prompt.template in usage for question in questions),
    )
