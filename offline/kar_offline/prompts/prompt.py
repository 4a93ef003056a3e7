"""Owns the prompt: one question about one entity or cluster, as `prompts.jsonl` holds it."""

from dataclasses import dataclass
from typing import Literal

from kar_sidecar.entities import EntityKind

__all__ = ["Prompt", "PromptKind"]

PromptKind = Literal["factual", "reasoning"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question about one entity, or one cluster; the fields are those of a line of `prompts.jsonl`."""

    id: str
    kind: PromptKind
    entity: EntityKind
    template: str
    prompt: str
    prompt_sha256: str
    history_cutoff: int
    """Number of the user's events when the prompt was rendered; it shows the latest. 0 for items and clusters."""
    raw_text: str
    """The facts that the prompt shows, without the instruction."""
    title: str
    """An item's name as shown; empty for users and clusters, and where it is withheld."""
    context: dict[str, str]
    """The seasons that the prompt mentions, under "season", "about" and "events"; empty if it mentions none."""
    expires_after_days: int | None
    """Age in days from which an answer is stale; None: never."""
    expires_on: str | None
    """ISO date of the last day of the mentioned season that ends first; None if no season is mentioned."""
