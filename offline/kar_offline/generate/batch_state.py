"""Owns the state of sending questions in batches: batches under way, questions waiting, why no more are created."""

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from kar_offline.generate.provider import Failure, Reply
from kar_sidecar.errors import KarError

__all__ = ["Job", "Outcome", "Sending"]


class Job(NamedTuple):
    """A batch under way."""

    batch_id: str
    keys: list[str]
    """Hashes of the prompts that it answers."""
    adopted: bool
    """Whether an earlier run created it."""


Outcome = Reply | Failure | str
"""The outcome of a question in a batch; a str is the reason why there is no answer."""


@dataclass(slots=True)
class Sending:
    """The state of one call of `OpenAIBatch.ask`."""

    jobs: list[Job]
    waiting: deque[str]
    """Hashes of the prompts that are not in a batch."""
    room: int
    """Largest number of batches under way at once."""
    rounds: Counter[str] = field(default_factory=Counter)
    """By prompt hash, the number of batches that left it unanswered."""
    silent_polls: int = 0
    """Polls in a row without an answer."""
    stopped: KarError | None = None
    """The error after which no more batches are created; None: none so far."""
