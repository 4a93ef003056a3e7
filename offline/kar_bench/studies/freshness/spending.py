"""Owns the cost of calls in the study of freshness: tokens and US dollars."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kar_bench.studies.freshness.simulation import Call, Month, SimulatedHistory
from kar_bench.studies.freshness.study import FreshnessStudy
from kar_offline.generate.estimate import TOKENS_PER_CHAR
from kar_offline.knowledge.records import read_knowledge
from kar_offline.prompts import read_prompts
from kar_sidecar.entities import ITEM, EntityKind

__all__ = ["Prices", "Spending"]


@dataclass(frozen=True, slots=True)
class Spending:
    """The calls of one history in the month, and before it."""

    calls: Mapping[str, int]
    """In the month, by kind of entity."""
    calls_by_reason: Mapping[str, int]
    """In the month, by kind and reason."""
    calls_before: int
    waiting: int
    """Entities due and not bought on the last evening."""
    tokens_read: int
    tokens_written: int
    usd: float
    usd_before: float


@dataclass(frozen=True, slots=True)
class Prices:
    """Lengths of prompts and answers, in characters, and the price of tokens."""

    item_prompt_chars: Mapping[str, int]
    """By item id."""
    user_prompt_chars: Mapping[str, int]
    """By version of a user's text."""
    item_answer_chars: Mapping[str, int]
    """By item id; items whose text the gates refused are missing."""
    mean_answer_chars: Mapping[str, float]
    """By kind, for users, and for items that are missing."""
    usd_per_million: tuple[float, float]
    """Price of a million tokens, read and written."""

    @staticmethod
    def of(study: FreshnessStudy) -> "Prices":
        """Read the lengths from a study's prompts and texts."""
        answers = {
            kind: {record.id: len(record.text) for record in read_knowledge(study.work.knowledge, kind)}
            for kind in EntityKind
        }
        prompts = read_prompts(study.work.prompts)
        reads_users = any(study.reads_users(arm) for arm in study.options.arms)
        return Prices(
            {prompt.id: len(prompt.prompt) for prompt in prompts if prompt.entity == "item"},
            study.user_texts().prompt_chars if reads_users else {},
            answers[ITEM],
            {kind: float(np.mean([*lengths.values()] or [0])) for kind, lengths in answers.items()},
            study.options.usd_per_million,
        )

    def spending(self, month: Month, history: SimulatedHistory) -> Spending:
        """The calls of a history and their cost."""
        within = [call for call in history.calls if call.day >= month.first]
        before = [call for call in history.calls if call.day < month.first]
        read, written = self._tokens(month, within)
        return Spending(
            calls=Counter(call.kind for call in within),
            calls_by_reason=Counter(f"{call.kind} {call.reason}" for call in within),
            calls_before=len(before),
            waiting=int(history.waiting[-1]),
            tokens_read=round(read),
            tokens_written=round(written),
            usd=self._usd(read, written),
            usd_before=self._usd(*self._tokens(month, before)),
        )

    def _tokens(self, month: Month, calls: Sequence[Call]) -> tuple[float, float]:
        """Tokens that calls read and write."""
        read_chars = written_chars = 0.0
        for call in calls:
            item_id = month.dataset.items[call.row].id if call.kind == "item" else ""
            read_chars += self.item_prompt_chars[item_id] if item_id else self.user_prompt_chars[call.version]
            written_chars += self.item_answer_chars.get(item_id, self.mean_answer_chars[call.kind])
        return TOKENS_PER_CHAR * read_chars, TOKENS_PER_CHAR * written_chars

    def _usd(self, read: float, written: float) -> float:
        return (read * self.usd_per_million[0] + written * self.usd_per_million[1]) / 1e6
